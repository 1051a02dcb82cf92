import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditx import flow
from ditx.diffusion.parameterization import NoiseLevel, Prediction, add_noise, convert, loss_ratio, to_target, to_x0_eps
from ditx.testing import images, x64

close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
KINDS = get_args(Prediction)


def on_circle(angle):
    """The level of a variance-preserving path at an angle; velocities are derivatives by the angle."""
    angle = jnp.asarray(angle)
    alpha, sigma = jnp.cos(angle), jnp.sin(angle)
    return NoiseLevel(angle, alpha, sigma, -sigma, alpha)


PATHS = {"vp": lambda s: on_circle(s * math.pi / 2), "linear": lambda s: flow.noise_level(jnp.asarray(s))}


def draws():
    return st.sampled_from(sorted(PATHS)), st.floats(0.02, 0.98), images(), images()


@pytest.mark.parametrize("source", KINDS)
@given(*draws())
@x64
def test_conversion_to_any_prediction_and_back_is_the_identity(source, path, s, x, prediction):
    level, x, prediction = PATHS[path](s), jnp.asarray(x), jnp.asarray(prediction)
    for target in KINDS:
        other = convert(prediction, x, level, source=source, target=target)
        close(convert(other, x, level, source=target, target=source), prediction, atol=1e-9)  # two divisions by 0.02


@given(*draws())
@x64
def test_every_prediction_determines_data_and_noise(path, s, x0, noise):
    level, x0, noise = PATHS[path](s), jnp.asarray(x0), jnp.asarray(noise)
    x = add_noise(level, x0, noise)
    for kind in KINDS:
        actual = to_x0_eps(to_target(kind, x0, noise, level), kind, x, level)
        close(actual[0], x0)
        close(actual[1], noise)


@given(st.floats(0.02, 0.98), images(), images())
@x64
def test_each_prediction_has_its_papers_definition(s, x0, noise):
    x0, noise = jnp.asarray(x0), jnp.asarray(noise)
    for name, path in PATHS.items():
        level = path(s)
        target = functools.partial(to_target, x0=x0, noise=noise, level=level)
        close(target("eps"), noise)
        close(target("x0"), x0)
        close(target("v"), level.alpha * noise - level.sigma * x0)
        # The score of q(x | x0), by differentiation of its log density.
        x = add_noise(level, x0, noise)
        density = jax.grad(lambda x, mean, b: -jnp.square(x - mean).sum() / (2 * b**2))
        close(target("score"), density(x, level.alpha * x0, level.sigma), rtol=1e-9)
        scale = {"vp": math.pi / 2, "linear": 1}[name]
        _, velocity = jax.jvp(
            lambda s, path=path: add_noise(path(s), x0, noise), (jnp.asarray(s),), (jnp.asarray(1.0),)
        )
        close(target("velocity") * scale, velocity)
    close(to_target("velocity", x0, noise, PATHS["vp"](s)), to_target("v", x0, noise, PATHS["vp"](s)))


@given(*draws(), images(bound=1))
@x64
def test_errors_of_two_predictions_have_the_stated_ratio(path, s, x, prediction, error):
    level, x, prediction, error = PATHS[path](s), jnp.asarray(x), jnp.asarray(prediction), jnp.asarray(error)
    for source in KINDS:
        for target in KINDS:
            turn = functools.partial(convert, x=x, level=level, source=source, target=target)
            squared = jnp.square(turn(prediction + error) - turn(prediction))
            ratio = loss_ratio(source, target, level)
            np.testing.assert_allclose(squared, ratio * error**2, rtol=1e-8, atol=1e-7 * ratio)


def test_a_floor_bounds_the_ratio():
    level = flow.noise_level(jnp.asarray(0.01))
    assert float(loss_ratio("x0", "velocity", level)) == pytest.approx(1e4, rel=1e-5)
    assert float(loss_ratio("x0", "velocity", level, floor=0.05)) == pytest.approx(400, rel=1e-5)
