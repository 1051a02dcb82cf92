import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ditx
from ditx import flow
from ditx.diffusion.gaussian import prior_bpd, q_sample, variational_bound
from ditx.diffusion.likelihood import ode_bpd, ode_log_density, variational_bpd
from ditx.testing import MEAN, STD, marginal, oracle, x64

FULL = ditx.linear_schedule()
# Of data N(MEAN, STD^2) in bins of width 2/255: its differential entropy, and the bins. The open ends cut off little.
BITS = math.log2(STD * math.sqrt(2 * math.pi * math.e)) + math.log2(255 / 2)


def log_normal(x, mean, variance):
    return -0.5 * (np.square(x - mean) / variance + np.log(2 * np.pi * variance)).sum()


@pytest.mark.parametrize("base", [FULL, ditx.cosine_schedule(prediction="v"), flow.uniform_grid(1000, prediction="x0")])
@x64
def test_ode_density_of_gaussian_data_converges_with_order_2(base):
    x = jnp.asarray(np.random.default_rng(0).normal(MEAN, 2 * STD, (2, 3, 1)))
    probes = jnp.ones((1, *x.shape))  # exact, because the network treats each pixel separately
    errors = []
    for count in (64, 128):
        grid = ditx.sampling_grid(base, count, "log-snr")
        actual = jax.jit(functools.partial(ode_log_density, grid, oracle(grid)))(x, probes)
        # The flow is affine: it keeps distances from the mean in deviations.
        (mean0, variance0), (mean1, variance1) = marginal(grid, 0), marginal(grid)
        slope = math.sqrt(variance1 / variance0)
        exact = log_normal(mean1 + slope * (x - mean0), 0, 1) + x.size * math.log(slope)
        errors.append(actual - exact)
    assert np.log2(np.abs(errors[0] / errors[1])) == pytest.approx(2, abs=0.1)
    assert abs(errors[1]) < 0.01


@x64
def test_divergence_is_the_mean_over_probes():
    """Averaged over all signs, Hutchinson's estimate is the trace. Single signs differ if pixels mix."""
    grid, mix = ditx.respace(FULL, [100, 600]), jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)))
    x = jnp.asarray([0.3, -0.2, 0.9]).reshape(3, 1, 1)

    def predict(x, t):
        return (mix @ jnp.sin(x[:, :, 0]))[..., None]

    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=3))).reshape(8, 3, 1, 1)
    density = jax.jit(functools.partial(ode_log_density, grid, predict, x))
    a, b = (jnp.asarray(table) for table in (grid.alpha, grid.sigma))

    def change(x, j):
        noise = mix @ jnp.sin(x)
        return (a[1] - a[0]) * (x - b[j] * noise) / a[j] + (b[1] - b[0]) * noise

    flat = x[:, 0, 0]
    first = change(flat, 0)
    trace = sum(jnp.trace(jax.jacfwd(change)(*at)) for at in ((flat, 0), (flat + first, 1))) / 2
    end = flat + (first + change(flat + first, 1)) / 2
    np.testing.assert_allclose(density(signs), log_normal(end, 0, 1) + trace, rtol=1e-10)
    np.testing.assert_allclose(np.mean([density(sign[None]) for sign in signs]), density(signs), rtol=1e-10)
    assert np.std([density(sign[None]) for sign in signs]) > 0.01


@functools.cache
def draws():
    return jnp.asarray(np.random.default_rng(0).normal(MEAN, STD, (4000, 1, 1)), jnp.float32)


def test_both_bounds_equal_the_entropy_of_gaussian_data():
    x0 = jnp.where(jnp.abs(draws()) < 1, draws(), MEAN)
    nats = -log_normal(np.asarray(x0, np.float64), MEAN, STD**2) / x0.size
    exact = nats / math.log(2) + math.log2(255 / 2)
    predict = oracle(FULL, variance=True)
    variational = jax.jit(lambda x0: variational_bpd(FULL, predict, x0, key=jax.random.key(0)))(x0)
    # Standard errors below 0.01: of the draw of x_t, over 4000 pixels.
    assert float(variational["total"]) == pytest.approx(exact, abs=0.04)
    assert variational["terms"].shape == (1000,)
    grid = ditx.sampling_grid(FULL, 60, "log-snr")
    ode = jax.jit(lambda x0: ode_bpd(grid, first_variance(grid), x0, key=jax.random.key(1)))(x0)
    assert float(ode) == pytest.approx(exact, abs=0.04)


def first_variance(grid):
    return oracle(grid, variance=True)


@x64
def test_variational_bound_is_the_sum_of_its_terms_and_the_prior():
    schedule = ditx.respace(FULL, "10")
    x0, key = draws()[:6].astype(jnp.float64), jax.random.key(3)
    predict = oracle(schedule, variance=True)
    actual = variational_bpd(schedule, predict, x0, key=key)
    for i in range(10):
        x = q_sample(schedule, x0, i, jax.random.normal(jax.random.fold_in(key, i), x0.shape, x0.dtype))
        expected = variational_bound(schedule, predict(x, jnp.asarray(schedule.time[i])), x0, x, i)
        np.testing.assert_allclose(actual["terms"][i], expected, rtol=1e-8)
    np.testing.assert_allclose(actual["prior"], prior_bpd(schedule, x0), rtol=1e-12)
    np.testing.assert_allclose(actual["total"], actual["terms"].sum() + actual["prior"], rtol=1e-12)
