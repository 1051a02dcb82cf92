import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditx import flow
from ditx.diffusion.parameterization import add_noise, to_target
from ditx.diffusion.schedule import noise_level
from ditx.testing import images, x64

close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@given(images(), images(), st.floats(0, 1))
@x64
def test_path_is_straight_from_data_to_noise(x0, noise, s):
    level = flow.noise_level(jnp.asarray(s))
    close(add_noise(level, jnp.asarray(x0), jnp.asarray(noise)), x0 + s * (noise - x0))
    close(level.time, 1000 * s)
    close(to_target("velocity", jnp.asarray(x0), jnp.asarray(noise), level), noise - x0)


@given(images(), images(), images(), st.floats(0, 1))
@x64
def test_loss_is_the_squared_error_of_the_velocity(x0, noise, error, s):
    seen = []

    def predict(x, t):
        seen.append((x, t))
        return jnp.asarray(noise - x0 + error)

    losses = flow.training_loss(predict, jnp.asarray(x0), jnp.asarray(s), jnp.asarray(noise))
    ((x, t),) = seen
    close(t, 1000 * s)
    close(x, (1 - s) * x0 + s * noise)
    assert set(losses) == {"loss"}
    close(losses["loss"], np.square(error).mean())


def test_logit_of_logit_normal_times_is_normal():
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: flow.logit_normal(0.5, 2.0, key=key)))
    s = np.asarray(draw(keys), np.float64)
    assert np.all((s > 0) & (s < 1))
    logits = np.log(s / (1 - s))
    assert logits.mean() == pytest.approx(0.5, abs=0.05)  # standard error 0.014
    assert logits.std() == pytest.approx(2, abs=0.04)  # standard error 0.01


@given(images(), images(), images(), st.floats(0, 1))
@x64
def test_loss_of_a_data_prediction_is_the_error_of_the_implied_velocity_down_to_the_floor(x0, noise, error, s):
    loss = functools.partial(
        flow.training_loss, lambda x, t: jnp.asarray(x0 + error), jnp.asarray(x0), jnp.asarray(s), jnp.asarray(noise)
    )
    close(loss(prediction="x0")["loss"], np.square(error).mean() / max(s, 0.05) ** 2)
    close(loss(prediction="x0", floor=0.5)["loss"], np.square(error).mean() / max(s, 0.5) ** 2)


@given(images(), images(), images(), st.floats(0, 1))
@x64
def test_loss_ignores_variance_channels(x0, noise, error, s):
    def predict(x, t):
        return jnp.concatenate([jnp.asarray(noise - x0 + error), 1e6 * x], -1)

    losses = flow.training_loss(predict, jnp.asarray(x0), jnp.asarray(s), jnp.asarray(noise))
    close(losses["loss"], np.square(error).mean())


@given(st.floats(0.01, 0.99), st.floats(0.1, 10))
@x64
def test_shift_multiplies_sigma_over_alpha(s, shift):
    moved = flow.shifted(jnp.asarray(s), shift)
    close(moved / (1 - moved), shift * s / (1 - s))
    close(flow.shifted(moved, 1 / shift), s)


@given(st.integers(1, 200))
def test_grid_runs_from_noise_to_data_in_equal_steps(steps):
    grid = flow.uniform_grid(steps)
    s = np.arange(1, steps + 1) / steps
    assert len(grid) == steps and grid.alpha[-1] == 0 and grid.sigma[-1] == 1
    np.testing.assert_allclose(grid.sigma, s, rtol=1e-12)
    np.testing.assert_allclose(grid.alpha, 1 - s, atol=1e-12)
    np.testing.assert_allclose(grid.time, 1000 * s, atol=1e-12)
    np.testing.assert_allclose(grid.log_snr[:-1], 2 * np.log((1 - s[:-1]) / s[:-1]), rtol=1e-9, atol=1e-9)
    assert noise_level(grid, 0)[3:] == (-1, 1)
    assert (grid.path, grid.prediction) == ("linear", "velocity")


def test_shifted_grid_and_grid_of_eps():
    grid = flow.uniform_grid(4, shift=3.0, prediction="x0")
    np.testing.assert_allclose(grid.sigma, [0.5, 0.75, 0.9, 1], rtol=1e-12)
    np.testing.assert_allclose(grid.time, 1000 * grid.sigma, rtol=1e-12)
    assert grid.prediction == "x0"
    without_pure_noise = flow.uniform_grid(4, prediction="eps")
    np.testing.assert_allclose(without_pure_noise.sigma, 0.999 * np.arange(1, 5) / 4, rtol=1e-12)
    with pytest.raises(ValueError, match=r"shift is 0\.0; give a number above 0"):
        flow.uniform_grid(4, shift=0.0)


@pytest.mark.parametrize("steps", [0, -3])
def test_grid_of_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"cannot sample in {steps} steps; give at least 1"):
        flow.uniform_grid(steps)
