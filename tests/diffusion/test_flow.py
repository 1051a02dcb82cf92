import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import images, x64

from ditx import flow

close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@given(images(), images(), st.floats(0, 1))
@x64
def test_path_is_straight_from_data_to_noise(x0, noise, s):
    path = functools.partial(flow.interpolate, jnp.asarray(x0), noise=jnp.asarray(noise))
    close(path(jnp.asarray(0.0)), x0)
    close(path(jnp.asarray(1.0)), noise)
    point, velocity = jax.jvp(path, (jnp.asarray(s),), (jnp.asarray(1.0),))
    close(point, x0 + s * (noise - x0))
    close(velocity, noise - x0)


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


def test_logit_normal_is_normal_behind_the_sigmoid():
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: flow.logit_normal(0.5, 2.0, key=key)))
    s = np.asarray(draw(keys), np.float64)
    assert np.all((s > 0) & (s < 1))
    logits = np.log(s / (1 - s))
    assert logits.mean() == pytest.approx(0.5, abs=0.05)  # standard error 0.014
    assert logits.std() == pytest.approx(2, abs=0.04)  # standard error 0.01


@given(st.integers(1, 200))
def test_grid_runs_from_noise_to_data_without_gaps(steps):
    grid = flow.uniform_grid(steps)
    assert len(grid) == steps
    assert grid.start[-1] == 1 and grid.end[0] == 0
    np.testing.assert_array_equal(grid.start[:-1], grid.end[1:])
    np.testing.assert_allclose(grid.start - grid.end, 1 / steps, atol=1e-12)


@pytest.mark.parametrize("steps", [0, -3])
def test_grid_of_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"cannot sample in {steps} steps; give at least 1"):
        flow.uniform_grid(steps)
