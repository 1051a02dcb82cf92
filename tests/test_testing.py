"""The checks of ditx.testing pass for the library and fail for schedules, samplers and losses with a mistake."""

import dataclasses
import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import ditx
from ditx import flow
from ditx.diffusion import samplers
from ditx.diffusion.gaussian import predict_x0_eps
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.testing import check_marginals, check_minimiser, check_order, marginal, oracle, outcome, schedules

FULL = ditx.linear_schedule()


@given(schedules())
def test_marginals_of_our_schedules_are_kept(schedule):
    check_marginals(schedule)
    for spacing in ("time", "log-snr", "karras"):
        check_marginals(ditx.sampling_grid(FULL, 20, spacing))


def test_marginals_of_flows_and_of_the_cosine_schedule_are_kept():
    check_marginals(ditx.cosine_schedule())
    check_marginals(flow.uniform_grid(30, shift=2.0))
    check_marginals(flow.uniform_grid(1))


@pytest.mark.parametrize(
    "table", ["beta", "log_beta", "posterior_mean_x0", "posterior_mean_xt", "posterior_variance", "log_snr", "alpha"]
)
def test_a_schedule_with_one_wrong_table_is_refused(table):
    broken = dataclasses.replace(FULL, **{table: getattr(FULL, table) * (1 + 1e-4)})
    with pytest.raises(AssertionError, match="of the schedule does not keep the marginals"):
        check_marginals(broken)


def test_a_schedule_off_its_path_or_with_unordered_times_is_refused():
    with pytest.raises(AssertionError, match="path linear of the schedule"):
        check_marginals(dataclasses.replace(FULL, path="linear"))
    with pytest.raises(AssertionError, match=r"time .rising. of the schedule"):
        check_marginals(dataclasses.replace(FULL, time=FULL.time[::-1]))


def test_samplers_that_are_wrong_are_refused():
    def stretched(predict, schedule, x, i, noise, *, factor):
        """DDIM, with a move that is longer by a factor."""
        moved = samplers.ddim_step(predict, schedule, x, i, noise)
        return moved + (factor - 1) * (moved - x) * (jnp.asarray(i) > 0)

    def noisy(predict, schedule, x, i, noise):
        return samplers.ddim_step(predict, schedule, x, i, noise) + 0.2 * noise

    def clipped(predict, schedule, x, i, noise):
        return jnp.clip(samplers.ddim_step(predict, schedule, x, i, noise), -1, 1)

    for step, order, sentence in [
        (functools.partial(stretched, factor=1.01), 1, "the mean of the samples is"),
        (noisy, 1, "the variance of the samples is off by"),
        (samplers.euler_step, 2, "the order of convergence is 0.98, not 2"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            check_order(step, order)
    with pytest.raises(ValueError, match="the sampler is not affine"):
        check_order(clipped, 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
def test_the_oracle_minimises_the_loss_of_every_schedule_and_prediction(schedule, prediction):
    config = ObjectiveConfig(schedule, prediction)
    check_minimiser(make_objective(config), config.sampler_grid())


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig("linear", "v", "min-snr"),
        ObjectiveConfig("cosine", "x0", "sigmoid"),
        ObjectiveConfig("flow", "velocity", flow_times="uniform", flow_shift=3.0),
    ],
    ids=str,
)
def test_the_oracle_minimises_weighted_losses(config):
    check_minimiser(make_objective(config), config.sampler_grid())


def test_losses_that_are_wrong_are_refused():
    loss, v = make_objective(ObjectiveConfig()), dataclasses.replace(FULL, prediction="v")

    def offset(predict, x0, key):  # the target is off by 0.05
        return loss(lambda x, t: predict(x, t) - 0.05, x0, key)

    for wrong, schedule in [(offset, FULL), (loss, v)]:
        with pytest.raises(AssertionError, match="the best predictor does not minimise the loss"):
            check_minimiser(wrong, schedule)
    for wrong in (lambda predict, x0, key: jnp.zeros(()), lambda *arguments: -loss(*arguments)["loss"]):
        with pytest.raises(AssertionError, match="the loss does not rise away from the best predictor"):
            check_minimiser(wrong)


def test_the_oracle_is_the_regression_of_the_data():
    """Against the least squares of a million draws, at a level of each path."""
    rng = np.random.default_rng(0)
    x0, noise = 0.7 + 0.4 * rng.standard_normal(10**6), rng.standard_normal(10**6)
    for schedule, i in itertools.product((FULL, flow.uniform_grid(1000)), (200, 700)):
        x = schedule.alpha[i] * x0 + schedule.sigma[i] * noise
        slope, intercept = np.polyfit(x, x0, 1)
        points = jnp.asarray([0.0, 1.0]).reshape(2, 1, 1)
        data, _ = predict_x0_eps(schedule, oracle(schedule), points, i)
        np.testing.assert_allclose(data.ravel(), [intercept, intercept + slope], atol=3e-3)
        np.testing.assert_allclose(marginal(schedule, i), [x.mean(), x.var()], atol=5e-3)


def test_outcome_equals_the_moments_of_many_samples():
    grid = ditx.respace(FULL, "10")
    mean, variance = outcome(samplers.ddpm_step, oracle(grid), grid, 0.0, 1.0)
    x = jax.random.normal(jax.random.key(0), (200, 200, 1))
    samples, _ = samplers.sample(samplers.ddpm_step, oracle(grid), grid, x, key=jax.random.key(1))
    # 40,000 draws: standard errors of 0.002 and 0.001.
    assert samples.mean() == pytest.approx(float(mean), abs=0.01)
    assert samples.var() == pytest.approx(float(variance), abs=0.005)


def test_the_extra_is_named_where_hypothesis_is_missing():
    code = "import sys; sys.modules['hypothesis'] = None; import ditx.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ImportError: ditx.testing needs hypothesis; install it with the extra: ditx[testing]"
