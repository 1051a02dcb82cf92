"""The paper's runs: each preset built by shapes alone, with the paper's hyperparameters."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from references import load

import train
from ditx.diffusion.objective import make_objective
from ditx.training import run as runs
from ditx.training.config import CHANGEABLE_ON_RESUME
from ditx.training.step import TrainState, train_step

ROWS = load("paper_tables.json")["table4"]
PAPER = sorted(name for name in train.PRESETS if name.startswith("imagenet"))


def row_of(config):
    """The row of the paper's table that a configuration is."""
    model = config.model
    name = {384: "S", 768: "B", 1024: "L", 1152: "XL"}[model.hidden_size]
    key = f"DiT-{name}/{model.patch_size}", model.block, model.input_size
    (row,) = (row for row in ROWS if (row["model"], row["block"], row["latent_size"]) == key)
    return row


def test_the_whole_table_is_there():
    found = [row_of(train.PRESETS[name]) for name in PAPER]
    assert len(found) == len(ROWS) == 16 and all(row in found for row in ROWS)


@pytest.mark.parametrize("name", PAPER)
def test_preset_builds_and_is_the_papers(name):
    config = train.PRESETS[name]
    train.check(config)
    row, optimizer = row_of(config), train.make_optimizer(config)
    assert (config.batch_size, config.learning_rate, config.weight_decay, config.warmup) == (256, 1e-4, 0, 0)
    assert (config.decay, config.beta2, config.ema_decay, config.flip) == ("constant", 0.999, 0.9999, True)
    assert (config.schedule, config.prediction, config.dataset, config.model.label_dropout) == (
        "linear",
        "eps",
        "latents",
        0.1,
    )
    assert config.steps >= 1000 * row["steps_thousands"]
    assert (config.sampling.steps, config.sampling.guidance_channels) == (250, 3)

    state = jax.eval_shape(lambda key: TrainState.create(config.model, optimizer, key=key), jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(state.model)) / 1e6) == row["params_millions"]
    size = config.model.input_size
    latents = jax.ShapeDtypeStruct((config.batch_size, size, size, 4), jnp.float16)
    batch = {"x": latents, "std": latents, "y": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    step = partial(
        train_step,
        objective=make_objective(config),
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        dtype=jnp.dtype(config.dtype),
    )
    after, terms = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.model)} == {jnp.dtype("float32")}
    assert set(terms) == {"mse", "vb", "loss", "grad_norm", "skipped", "by_time"}


def test_what_computes_may_differ_when_a_run_goes_on_but_not_how_products_are_rounded():
    before = {"kernels": "fused", "attention": "xla", "products": "fp8"}
    now = {"kernels": "plain", "attention": "auto", "products": "plain"}
    assert runs.diff(before, now, ignore=CHANGEABLE_ON_RESUME) == "products was 'fp8' and is 'plain'"
    del before["products"]  # as in a run of before there was a choice
    assert not runs.diff(before, now, ignore=CHANGEABLE_ON_RESUME)
