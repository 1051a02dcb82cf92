import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DiTConfig
from ditx.training.step import TrainState, drop_label, train_step

CONFIG = DiTConfig(8, 4, 2, 16, 2, 2, num_classes=5)
BATCH = 16


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (BATCH, 8, 8, 2)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, 5, BATCH).astype(np.int32)}


PAPER = ObjectiveConfig()


def make_step(optimizer, objective=PAPER, config=CONFIG, **options):
    state = TrainState.create(config, optimizer, power_emas=len(options.get("ema_gammas", ())), key=jax.random.key(0))
    objective = make_objective(objective)
    return state, partial(train_step, objective=objective, optimizer=optimizer, **({"ema_decay": 0.9} | options))


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_average_starts_as_a_copy_and_follows_every_update():
    state, step = make_step(optax.adamw(1e-2))
    assert same(state.ema, state.model)
    after, _ = jax.jit(step)(state, make_batch(), jax.random.key(1))
    assert not same(after.model, state.model)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.model, after.model)
    for average, value in zip(jax.tree.leaves(after.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(average, value, atol=1e-6)
    assert int(after.step) == 1


def test_profiles_follow_every_update_at_their_rates():
    ema_gammas = (16.97, 6.94)
    state, step = make_step(optax.adamw(1e-2), ema_gammas=ema_gammas)
    step, models = jax.jit(step), []
    for _ in range(3):
        state, _ = step(state, make_batch(), jax.random.key(1))
        models.append(jax.tree.leaves(state.model))
    for profile, gamma in zip(state.power_emas, ema_gammas, strict=True):
        shares = np.diff((np.arange(4) / 3) ** (gamma + 1))
        for average, *values in zip(jax.tree.leaves(profile), *models, strict=True):
            np.testing.assert_allclose(average, sum(s * v for s, v in zip(shares, values, strict=True)), atol=1e-6)


def test_first_loss_of_the_papers_objective_is_that_of_a_zero_output():
    state, step = make_step(optax.sgd(0.0))
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((512, 8, 8, 2)).astype(np.float32), "y": np.zeros(512, np.int32)}
    _, terms = jax.jit(step)(state, batch, jax.random.key(0))
    assert set(terms) == {"loss", "mse", "vb", "grad_norm", "skipped", "by_time"}
    # 1.000 + 0.0162 for data of unit variance; the mean over 65,536 draws wanders by less than 0.02.
    np.testing.assert_allclose(terms["mse"], 1.0, atol=0.02)
    np.testing.assert_allclose(terms["vb"], 0.0162, atol=0.01)
    np.testing.assert_allclose(terms["loss"], terms["mse"] + terms["vb"], rtol=1e-6)


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig("flow", "velocity")], ids=str)
def test_training_lowers_the_loss(objective):
    config = dataclasses.replace(CONFIG, learn_sigma=not objective.is_flow)
    state, step = make_step(optax.adam(3e-3), objective, config)
    step, losses = jax.jit(step), []
    for _ in range(60):
        state, terms = step(state, make_batch(), jax.random.key(2))
        losses.append(float(terms["loss"]))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_every_step_draws_anew_and_the_same_step_draws_alike():
    state, step = make_step(optax.sgd(0.0))
    step = jax.jit(step)
    second, first = step(state, make_batch(), jax.random.key(3))
    assert float(step(state, make_batch(), jax.random.key(3))[1]["loss"]) == float(first["loss"])
    assert float(step(second, make_batch(), jax.random.key(3))[1]["loss"]) != float(first["loss"])
    assert float(step(state, make_batch(), jax.random.key(4))[1]["loss"]) != float(first["loss"])


def test_gradient_norm_is_that_of_the_gradients():
    state, step = make_step(optax.sgd(1.0))
    after, terms = jax.jit(step)(state, make_batch(), jax.random.key(0))
    gradients = jax.tree.map(lambda old, new: old - new, state.model, after.model)
    np.testing.assert_allclose(terms["grad_norm"], optax.tree.norm(gradients), rtol=1e-3)


def test_labels_drop_at_the_given_rate_and_never_without_a_null_label():
    keys = jax.random.split(jax.random.key(0), 4000)
    dropped = jax.vmap(lambda key: drop_label(jnp.array(3), CONFIG, key=key))(keys)
    assert set(np.unique(dropped)) == {3, 5}
    assert abs(float((dropped == 5).mean()) - 0.1) < 0.02
    without = dataclasses.replace(CONFIG, label_dropout=0.0)
    assert int(drop_label(jnp.array(3), without, key=keys[0])) == 3
    assert int(drop_label(jnp.array(3), dataclasses.replace(CONFIG, num_classes=0), key=keys[0])) == 0


def test_half_precision_computes_near_float32_and_keeps_float32_state():
    state, step = make_step(optax.adam(1e-3))
    _, plain_terms = jax.jit(step)(state, make_batch(), jax.random.key(0))
    half, half_terms = jax.jit(partial(step, dtype=jnp.dtype("bfloat16")))(state, make_batch(), jax.random.key(0))
    kinds = {leaf.dtype for leaf in jax.tree.leaves((half.model, half.ema, half.opt_state[0].mu))}
    assert kinds == {jnp.dtype("float32")}
    # Eight bits of mantissa, averaged over the batch.
    np.testing.assert_allclose(half_terms["loss"], plain_terms["loss"], rtol=2e-2)
    assert float(half_terms["grad_norm"]) != float(plain_terms["grad_norm"])


def test_remat_and_unroll_change_nothing_but_rounding():
    state, step = make_step(optax.sgd(1.0))
    plain, _ = jax.jit(step)(state, make_batch(), jax.random.key(0))
    for options in (
        {"remat": "full"},
        {"remat": "dots"},
        {"unroll": 2},
        {"unroll": 2, "remat": "full"},
        {"accumulate": 4},
    ):
        other, _ = jax.jit(partial(step, **options))(state, make_batch(), jax.random.key(0))
        for a, b in zip(jax.tree.leaves(plain.model), jax.tree.leaves(other.model), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(accumulate):
    state, step = make_step(optax.adam(1e-3), accumulate=accumulate)
    batch = make_batch()
    batch["x"][3, 0, 0, 0] = np.nan
    after, terms = jax.jit(step)(state, batch, jax.random.key(0))
    assert float(terms["skipped"]) == 1 and not np.isfinite(terms["loss"]) and int(after.step) == 1
    assert same((after.model, after.ema, after.opt_state), (state.model, state.ema, state.opt_state))
    again, terms = jax.jit(step)(after, make_batch(), jax.random.key(0))
    assert float(terms["skipped"]) == 0 and not same(again.model, state.model)


def test_mean_velocities_train_through_remat_and_unroll_with_guidance():
    objective = ObjectiveConfig("flow", "mean-velocity", mean_equal=0.25, mean_guidance=(1.5, 0.2))
    config = dataclasses.replace(CONFIG, learn_sigma=False, mean_velocity=True, label_dropout=0.5)
    state, step = make_step(optax.sgd(1.0), objective, config)
    plain, terms = jax.jit(step)(state, make_batch(), jax.random.key(0))
    assert {"loss", "mse", "by_time"} <= set(terms) and float(terms["grad_norm"]) > 0
    assert not same(plain.model.final, state.model.final)
    options = {"remat": "full", "unroll": 2, "apply_block": KernelConfig(attention="xla").apply_block()}
    other, _ = jax.jit(partial(step, **options))(state, make_batch(), jax.random.key(0))
    for a, b in zip(jax.tree.leaves(plain.model), jax.tree.leaves(other.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
