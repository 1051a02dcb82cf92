"""Tiny networks for tests."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, settings

import ditx
from ditx.nn.dit import BlockName

# Each example compiles its own network: few of them, and no search for the smallest that fails.
NETWORKS = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
BLOCKS = get_args(BlockName)


def abstract_dit(config):
    """Shapes and types of a network, without building it."""
    return jax.eval_shape(lambda key: ditx.DiT(config, key=key), jax.random.key(0))


@jax.jit
def forward(model, x, t, y):
    return model(x, t, y)


def random_dit(config, *, seed=0, scale=0.3):
    """A network without zeros among its weights, so that every part of it affects the output."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * random.standard_normal(leaf.shape), leaf.dtype), abstract_dit(config)
    )


def example(config, *, seed=0):
    """An input, a time and a label for a network."""
    x = jax.random.normal(jax.random.key(seed), config.input_shape)
    return x, jnp.asarray(417), jnp.asarray(config.num_classes - 1)
