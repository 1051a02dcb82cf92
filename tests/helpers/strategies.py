"""What the property tests draw, and how they run in double precision."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ditx
from ditx.nn.dit import BlockName

# Networks are compiled anew for each example: few of them, and no search for the smallest that fails.
NETWORKS = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
FULL = ditx.linear_schedule()
SHAPE = (2, 3, 2)
BLOCKS = get_args(BlockName)


def x64(test):
    """Run a test in double precision, where the mathematics holds to 1e-10."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


def indices_to_keep(total=1000, sizes=(2, 7, 20)):
    """Indices for `respace`; few lengths, since each is compiled anew."""
    indices = st.integers(0, total - 1)
    return st.sampled_from(sizes).flatmap(
        lambda size: st.lists(indices, min_size=size, max_size=size, unique=True).map(sorted)
    )


def schedules():
    """What `schedule_of` takes: the full schedule, its published respacings, and any other."""
    return st.sampled_from(["full", "10", "250", "ddim50", "ddim250"]) | indices_to_keep().map(tuple)


@functools.cache
def schedule_of(kept):
    """A schedule from its short name (made in the test: beartype draws random numbers, which strategies must not)."""
    return FULL if kept == "full" else ditx.respace(FULL, kept if isinstance(kept, str) else list(kept))


@st.composite
def steps(draw, first=0):
    """What `step_of` takes: a schedule and one of its indices, from `first` on."""
    kept = draw(schedules())
    named = {"full": 1000, "10": 10, "250": 250, "ddim50": 50, "ddim250": 250}
    last = (named[kept] if isinstance(kept, str) else len(kept)) - 1
    return kept, draw(st.sampled_from([first, last]) | st.integers(first, last))


def step_of(step):
    return schedule_of(step[0]), step[1]


def images(shape=SHAPE, bound=4):
    return hnp.arrays(np.float64, shape, elements=st.floats(-bound, bound, width=32))


@st.composite
def configs(draw, blocks=BLOCKS):
    """Tiny networks of every kind of size and, unless told otherwise, of block."""
    patch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return ditx.DiTConfig(
        input_size=patch * draw(st.integers(1, 3)),
        patch_size=patch,
        in_channels=draw(st.integers(1, 4)),
        hidden_size=heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5, 4.0])),
        num_classes=draw(st.integers(1, 5)),
        label_dropout=draw(st.sampled_from([0.0, 0.1])),
        learn_sigma=draw(st.booleans()),
        block=draw(st.sampled_from(blocks)),
    )


def abstract_dit(config):
    """Shapes and types of a network, without building it."""
    return jax.eval_shape(lambda key: ditx.DiT(config, key=key), jax.random.key(0))


@jax.jit
def forward(model, x, t, y):
    return model(x, t, y)


def random_dit(config, *, seed=0, scale=0.3):
    """A network none of whose weights is 0, so that every part of it shows in the output."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * random.standard_normal(leaf.shape), leaf.dtype), abstract_dit(config)
    )


def example(config, *, seed=0):
    """An input, a time and a label for a network."""
    shape = (config.input_size, config.input_size, config.in_channels)
    return jax.random.normal(jax.random.key(seed), shape), jnp.asarray(417), jnp.asarray(config.num_classes - 1)
