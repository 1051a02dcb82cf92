import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_close, hwc, load

import ditx
from ditx.diffusion.gaussian import (
    discretized_log_likelihood,
    normal_kl,
    p_mean_variance,
    posterior,
    predict_x0_eps,
    prior_bpd,
    q_sample,
    training_loss,
    variational_bound,
)
from ditx.testing import images, steps, x64

FULL = ditx.linear_schedule()
SHAPE = (2, 3, 2)
SIDES = (*SHAPE[:2], 2 * SHAPE[2])
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@functools.cache
def golden():
    return {k: hwc(v) if v.ndim == 4 else v for k, v in load("diffusion.npz").items() if k.startswith(("q", "l", "p"))}


def test_q_sample_equals_the_reference():
    g = golden()
    x = jax.vmap(functools.partial(q_sample, FULL))(g["q/x0"], g["q/t"], g["q/noise"])
    assert x.dtype == jnp.float32
    assert_close(x, g["q/x_t"], 1e-5)


def test_p_mean_variance_equals_the_reference():
    g = golden()
    step = jax.vmap(functools.partial(p_mean_variance, FULL))(g["loss/model_output"], g["q/x_t"], g["q/t"])
    assert_close(step.mean, g["p/mean"], 1e-5)
    assert_close(step.log_variance, g["p/log_variance"], 1e-5)
    np.testing.assert_allclose(jnp.exp(step.log_variance), g["p/variance"], rtol=1e-5)
    assert_close(step.x0, g["p/pred_xstart"], 1e-5)


def test_loss_equals_the_reference():
    g = golden()

    def one(x0, i, noise, output):
        return training_loss(FULL, lambda x, t: output, x0, i, noise)

    losses = jax.vmap(one)(g["q/x0"], g["q/t"], g["q/noise"], g["loss/model_output"])
    assert 0 in g["q/t"]
    for name in ("mse", "vb", "loss"):
        np.testing.assert_allclose(losses[name], g[f"loss/{name}"], rtol=1e-5, atol=1e-5)


def test_prior_equals_the_reference():
    g = golden()
    # Where alpha_bar is 4e-5 the divergence is a difference of numbers near 1, in float32 in both programs.
    np.testing.assert_allclose(jax.vmap(functools.partial(prior_bpd, FULL))(g["q/x0"]), g["prior_bpd"], atol=1e-7)


@given(steps(), images(), images())
@x64
def test_true_prediction_recovers_data_and_noise_with_and_without_variance(step, x0, noise):
    schedule, i = step
    x0, noise = jnp.asarray(x0), jnp.asarray(noise)
    x = q_sample(schedule, x0, i, noise)
    for kind, target in [("eps", noise), ("x0", x0)]:
        other = dataclasses.replace(schedule, prediction=kind)
        for output in (target, jnp.concatenate([target, x], -1)):
            for actual, true in zip(predict_x0_eps(other, lambda x, t, o=output: o, x, i), (x0, noise), strict=True):
                close(actual, true)


@given(steps(), images(), images())
@x64
def test_noised_data_has_the_mean_and_standard_deviation_of_the_betas(step, x0, noise):
    schedule, i = step
    signal = np.prod(1 - schedule.beta[: i + 1])
    x = q_sample(schedule, jnp.asarray(x0), i, jnp.asarray(noise))
    close(x, math.sqrt(signal) * x0 + math.sqrt(1 - signal) * noise)


@given(steps(first=1), images(), images())
@x64
def test_posterior_is_bayes_rule(step, x0, x):
    schedule, i = step
    beta, before = schedule.beta[i], np.prod(1 - schedule.beta[:i])
    # Two Gaussians in x_{t-1}: the likelihood q(x_t | x_{t-1}) and the prior q(x_{t-1} | x_0).
    likelihood, prior = (1 - beta) / beta, 1 / (1 - before)
    mean = (math.sqrt(1 - beta) / beta * x + prior * math.sqrt(before) * x0) / (likelihood + prior)
    result = posterior(schedule, jnp.asarray(x0), jnp.asarray(x), i)
    close(result.mean, mean)
    close(np.exp(result.log_variance) * (likelihood + prior), 1)


@given(steps(), images(), images())
@x64
def test_first_posterior_is_the_data(step, x0, x):
    close(posterior(step[0], jnp.asarray(x0), jnp.asarray(x), 0).mean, x0)


@given(steps(), images(SIDES), images())
@x64
def test_variance_interpolates_its_bounds_and_is_not_clamped(step, output, x):
    schedule, i = step
    lower, upper = schedule.posterior_log_variance[i], schedule.log_beta[i]
    for v, expected in [(-1, lower), (1, upper), (0, (lower + upper) / 2), (3, 2 * upper - lower)]:
        steered = jnp.asarray(output).at[..., SHAPE[2] :].set(v)
        close(p_mean_variance(schedule, steered, jnp.asarray(x), i).log_variance, expected)


@given(steps(), images(SIDES), images())
@x64
def test_mean_is_the_posterior_mean_at_the_predicted_data(step, output, x):
    schedule, i = step
    output, x = jnp.asarray(output), jnp.asarray(x)
    result = p_mean_variance(schedule, output, x, i)
    x0, _ = predict_x0_eps(schedule, lambda x, t: output, x, i)
    close(result.x0, x0)
    close(result.mean, posterior(schedule, x0, x, i).mean)
    fixed = p_mean_variance(schedule, output[..., : SHAPE[2]], x, i)
    close(fixed.mean, result.mean)
    close(fixed.log_variance, schedule.posterior_log_variance[i])


@settings(max_examples=10)
@given(steps(), images(SIDES, bound=2), images(), images())
@x64
def test_bound_trains_only_the_variance_and_mse_only_the_noise(step, output, x0, noise):
    schedule, i = step

    @jax.jacrev
    def gradients(output):
        return training_loss(schedule, lambda x, t: output, jnp.asarray(x0), i, jnp.asarray(noise))

    gradient, channels = gradients(jnp.asarray(output)), SHAPE[2]
    assert not np.any(gradient["vb"][..., :channels])
    assert np.any(gradient["vb"][..., channels:])
    assert not np.any(gradient["mse"][..., channels:])
    close(gradient["mse"][..., :channels], 2 * (output[..., :channels] - noise) / noise.size)
    close(gradient["loss"], gradient["vb"] + gradient["mse"])


@given(steps(first=1), images(SIDES, bound=2), images(), images())
@x64
def test_bound_is_the_divergence_in_bits_per_dimension(step, output, x0, noise):
    schedule, i = step
    x = q_sample(schedule, jnp.asarray(x0), i, jnp.asarray(noise))
    true, model = posterior(schedule, jnp.asarray(x0), x, i), p_mean_variance(schedule, jnp.asarray(output), x, i)
    v1, v2 = np.exp(true.log_variance), np.exp(model.log_variance)
    nats = np.log(np.sqrt(v2 / v1)) + (v1 + np.square(true.mean - model.mean)) / (2 * v2) - 0.5
    bound = variational_bound(schedule, jnp.asarray(output), jnp.asarray(x0), x, i)
    np.testing.assert_allclose(bound, nats.mean() / math.log(2), rtol=1e-9, atol=1e-10)  # sums that cancel


@given(steps(), images(SIDES, bound=2), images(bound=1))
@x64
def test_first_term_is_the_likelihood_of_the_data(step, output, x0):
    schedule, output, x0 = step[0], jnp.asarray(output), jnp.asarray(x0)
    x = q_sample(schedule, x0, 0, jnp.ones_like(x0))
    model = p_mean_variance(schedule, output, x, 0)
    nats = -discretized_log_likelihood(x0, model.mean, model.log_variance / 2).mean()
    close(variational_bound(schedule, output, x0, x, 0), nats / math.log(2))


@given(st.floats(-2, 2), st.floats(-6, 1))
@x64
def test_likelihoods_of_all_bins_sum_to_one(mean, log_std):
    bins = jnp.linspace(-1, 1, 256).reshape(16, 16, 1)
    logs = discretized_log_likelihood(bins, jnp.full_like(bins, mean), jnp.full_like(bins, log_std))
    # The floor of 1e-12 in each of 256 bins is all that may be in excess.
    assert -1e-10 < np.exp(logs).sum() - 1 < 1e-10 + 256e-12


@x64
def test_likelihood_is_near_the_normal_distribution():
    x = jnp.linspace(-1, 1, 256).reshape(16, 16, 1)
    for mean, std in [(0.1, 0.3), (-0.9, 0.05), (0.0, 0.004)]:
        probability = np.exp(discretized_log_likelihood(x, jnp.full_like(x, mean), jnp.full_like(x, math.log(std))))
        edges = np.linspace(-1 - 1 / 255, 1 + 1 / 255, 257)
        edges[[0, -1]] = -np.inf, np.inf
        cdf = np.array([0.5 * (1 + math.erf((edge - mean) / std / math.sqrt(2))) for edge in edges])
        # The tanh form of the distribution function is off by up to 3e-4 (Page 1977), at either end of a bin.
        np.testing.assert_allclose(probability.ravel(), np.diff(cdf), atol=6e-4)


@given(images(), images(), images(bound=2), images(bound=2))
@x64
def test_kl_divergence_is_not_negative_and_zero_for_equal_gaussians(mean1, mean2, log1, log2):
    kl = functools.partial(normal_kl, jnp.asarray(mean1), jnp.asarray(log1))
    assert np.all(kl(jnp.asarray(mean2), jnp.asarray(log2)) >= -1e-12)
    close(kl(jnp.asarray(mean1), jnp.asarray(log1)), 0)


def test_zero_output_on_unit_data_costs_1_016():
    """The first loss of a new network, averaged over time."""

    @jax.jit
    @jax.vmap
    def losses(key, i):
        x0, noise = jax.random.normal(key, (2, 16, 16, 4))
        return training_loss(FULL, lambda x, t: jnp.zeros((16, 16, 8)), x0, i, noise)

    mean = jax.tree.map(jnp.mean, losses(jax.random.split(jax.random.key(0), 1000), jnp.arange(1000)))
    # A million squares of standard normals: a standard error of 1.4e-3.
    assert mean["mse"] == pytest.approx(1.0, abs=4e-3)
    assert mean["vb"] == pytest.approx(0.0162, abs=2e-4)
    assert mean["loss"] == pytest.approx(1.016, abs=4e-3)


@given(steps(), images(), images())
@x64
def test_network_reads_noised_data_at_the_training_time(step, x0, noise):
    schedule, i = step
    seen = []

    def predict(x, t):
        seen.append((x, t))
        return x

    losses = training_loss(schedule, predict, jnp.asarray(x0), i, jnp.asarray(noise))
    ((x, t),) = seen
    assert t == schedule.time[i]
    close(x, q_sample(schedule, jnp.asarray(x0), i, jnp.asarray(noise)))
    assert set(losses) == {"loss", "mse"}, "a network without variance channels has no bound"
    close(losses["loss"], np.square(noise - np.asarray(x)).mean())
    assert losses["loss"] == losses["mse"]


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@given(step=steps(), output=images(SIDES, bound=2), x0=images(), noise=images())
@x64
def test_other_predictions_train_on_their_target_and_weights_apply_to_the_noise_error(kind, step, output, x0, noise):
    schedule, i = step
    schedule = dataclasses.replace(schedule, prediction=kind)
    a, b = schedule.alpha[i], schedule.sigma[i]
    target = {"eps": noise, "x0": x0, "v": a * noise - b * x0}[kind]
    loss = functools.partial(
        training_loss, schedule, lambda x, t: jnp.asarray(output), jnp.asarray(x0), i, jnp.asarray(noise)
    )
    plain, weighted = loss(), loss(weight=3.0)
    close(plain["mse"], np.square(output[..., : SHAPE[2]] - target).mean())
    close(plain["loss"], plain["mse"] + plain["vb"])
    x = q_sample(schedule, jnp.asarray(x0), i, jnp.asarray(noise))
    _, seen = predict_x0_eps(schedule, lambda x, t: jnp.asarray(output), x, i)
    error = np.square(seen - noise).mean()
    np.testing.assert_allclose(weighted["loss"] - weighted["vb"], 3 * error, rtol=1e-7, atol=1e-7)  # up to SNR 1e4
    assert weighted["mse"] == plain["mse"] and weighted["vb"] == plain["vb"]


@given(images())
@x64
def test_prior_is_the_kl_divergence_of_the_last_state_from_noise(x0):
    signal = FULL.alpha_bar[-1]
    variance = 1 - signal
    nats = 0.5 * (variance + signal * x0**2 - 1 - np.log(variance))
    close(prior_bpd(FULL, jnp.asarray(x0)), nats.mean() / math.log(2))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_output_of_odd_channels_is_refused(channels):
    with pytest.raises(ValueError, match=f"the output has {channels} channels and the input 2; give as many"):
        p_mean_variance(FULL, jnp.zeros((4, 4, channels)), jnp.zeros((4, 4, 2)), 5)


def test_formulas_keep_their_dtype():
    x, i = jax.ShapeDtypeStruct((2, 2, 1), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    schedule = ditx.respace(FULL, "10")
    with jax.numpy_dtype_promotion("strict"):
        losses = jax.eval_shape(
            lambda x, i: training_loss(schedule, lambda x, t: jnp.concatenate([x, x], -1), x, i, x), x, i
        )
    assert {loss.dtype for loss in losses.values()} == {jnp.dtype("float32")}
