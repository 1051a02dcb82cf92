import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from references import assert_close, hwc, load

import ditx
from ditx import flow
from ditx.diffusion.parameterization import to_target
from ditx.diffusion.samplers import (
    ddim_step,
    ddpm_step,
    dpm_solver_step,
    euler_maruyama_step,
    euler_step,
    heun_step,
    sample,
)
from ditx.diffusion.schedule import at, noise_level
from ditx.testing import MEAN, STD, check_order, images, marginal, oracle, outcome, steps, x64

FULL = ditx.linear_schedule()
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
STEPS = {
    "ddpm": ddpm_step,
    "ddim_eta0.0": ddim_step,
    "ddim_eta0.5": functools.partial(ddim_step, eta=0.5),
    "ddim_eta1.0": functools.partial(ddim_step, eta=1.0),
}


def toy(x, t):
    """The network of the references' recorded runs."""
    return jnp.concatenate([0.6 * x + 0.2 * jnp.sin(3 * x) * t / 1000, jnp.tanh(0.5 * x - t / 1000)], -1)


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta0.0", "ddim_eta0.5"])
@pytest.mark.parametrize("steps", ["10", "50", "ddim10", "ddim50"])
def test_recorded_noise_reproduces_the_reference_runs(steps, name):
    golden = {k: hwc(v) for k, v in load("diffusion.npz").items() if k.startswith(f"sample/{steps}/")}
    schedule, prefix = ditx.respace(FULL, steps), f"sample/{steps}"
    run = jax.jit(jax.vmap(lambda x, noises: sample(STEPS[name], toy, schedule, x, noises=noises)))
    last, states = run(golden[f"{prefix}/x_T"], golden[f"{prefix}/noises"].swapaxes(0, 1))
    assert_close(states[:, 0], golden[f"{prefix}/{name}/first"], 1e-5)
    assert_close(last, golden[f"{prefix}/{name}/last"], 1e-5)


@pytest.mark.parametrize("steps", ["10", "ddim50", 250])
@x64
def test_ddpm_with_the_true_variance_is_exact_in_any_number_of_steps(steps):
    schedule = ditx.respace(FULL, steps)
    mean, variance = outcome(ddpm_step, oracle(schedule, variance=True), schedule, *marginal(schedule))
    # The last step adds no noise, so the variance of the data given the first level is missing.
    a, b = schedule.alpha[0], schedule.sigma[0]
    close(mean, MEAN)
    close(variance, STD**2 - STD**2 * b**2 / (a**2 * STD**2 + b**2))


ALL = {
    "ddpm": (ddpm_step, 1),
    "ddim": (functools.partial(ddim_step, eta=0.5), 1),
    "euler": (euler_step, 1),
    "heun": (heun_step, 2),
    "dpm-solver": (dpm_solver_step, 2),
    "euler-maruyama": (euler_maruyama_step, 1),
}
BASES = {"linear": FULL, "cosine": ditx.cosine_schedule(prediction="v"), "flow": flow.uniform_grid(1000)}


def test_euler_is_ddim_without_noise():
    x, noise = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
    np.testing.assert_array_equal(euler_step(toy, FULL, x, 50, noise), ddim_step(toy, FULL, x, 50, noise, eta=0.0))


@pytest.mark.parametrize("base", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("name", ALL)
def test_samplers_converge_with_their_order(name, base):
    step, order = ALL[name]
    assert check_order(step, order, BASES[base]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2), (euler_maruyama_step, 1)])
@x64
def test_flows_converge_from_pure_noise_in_uniform_steps(step, order):
    errors = []
    for count in (32, 64):
        grid = flow.uniform_grid(count)
        mean, variance = outcome(step, oracle(grid), grid, 0.0, 1.0)
        close(mean, MEAN)
        errors.append(variance - STD**2)
    assert np.log2(np.abs(errors[0] / errors[1])) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("base", "kinds"), [("linear", ["eps", "v", "score", "velocity"]), ("flow", ["velocity", "v"])]
)
@x64
def test_samples_do_not_depend_on_the_prediction(base, kinds):
    """The network computes the same function and expresses it as different predictions."""
    x, key = jax.random.normal(jax.random.key(0), (2, 2, 1)), jax.random.key(1)
    grid = ditx.respace(BASES[base], [100, 400, 700, 999])

    def draws(schedule, predict):
        return jax.jit(lambda: [sample(step, predict, schedule, x, key=key)[1] for step, _ in ALL.values()])()

    def network(schedule):
        def predict(x, t):
            level = noise_level(schedule, jnp.argmin(jnp.abs(jnp.asarray(schedule.time) - t)))
            x0 = jnp.tanh(2 * x + level.sigma)
            prediction = to_target(schedule.prediction, x0, (x - level.alpha * x0) / level.sigma, level)
            return jnp.concatenate([prediction, jnp.cos(x)], -1)

        return predict

    plain = dataclasses.replace(grid, prediction="x0")
    expected = draws(plain, network(plain))
    for kind in kinds:
        schedule = dataclasses.replace(grid, prediction=kind)
        for name, actual, reference in zip(ALL, draws(schedule, network(schedule)), expected, strict=True):
            np.testing.assert_allclose(actual, reference, rtol=1e-8, atol=1e-8, err_msg=f"{name} {kind}")


@x64
def test_dpm_solver_extrapolates_the_data_in_log_snr():
    grid = ditx.respace(FULL, [100, 300, 600, 999])
    x, x0, previous = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    grid = dataclasses.replace(grid, prediction="x0")
    half = grid.log_snr / 2
    for i, share in [(3, 0.0), (2, (half[1] - half[2]) / (half[2] - half[3])), (0, 0.0)]:
        moved, prediction = dpm_solver_step(lambda x, t: x0, grid, x, i, x, previous)
        close(prediction, x0)
        data = x0 + share / 2 * (x0 - previous)
        if i == 0:
            close(moved, data)
        else:  # Lu et al. 2022b, Eq. 14
            growth = np.expm1(-(half[i - 1] - half[i]))
            close(moved, grid.sigma[i - 1] / grid.sigma[i] * x - grid.alpha[i - 1] * growth * data)


@x64
def test_flow_samplers_are_exact_on_straight_paths():
    """For a single data point every velocity is constant along its path."""

    def predict(x, t):
        return (x - MEAN) / (t / 1000)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 1)))
    last, states = sample(euler_step, predict, flow.uniform_grid(4), x, key=jax.random.key(0))
    close(last, MEAN)
    close(states[1], 0.5 * x + 0.5 * MEAN)


@given(steps(), images(), images(), images())
@x64
def test_ddim_at_eta_1_is_ddpm_with_the_posteriors_variance(step, x, predicted, noise):
    schedule, i = step
    arguments = lambda x, t: jnp.asarray(predicted), schedule, jnp.asarray(x), i, jnp.asarray(noise)
    close(ddim_step(*arguments, eta=1.0), ddpm_step(*arguments))


@given(steps(first=1), images(), images())
@x64
def test_ddim_at_eta_0_moves_to_the_next_level_with_the_same_data_and_noise(step, x0, noise):
    schedule, i = step
    x0, noise = jnp.asarray(x0), jnp.asarray(noise)
    x = ditx.gaussian.q_sample(schedule, x0, i, noise)
    moved = ddim_step(lambda x, t: noise, schedule, x, i, 100 * jnp.ones_like(x))
    close(moved, ditx.gaussian.q_sample(schedule, x0, i - 1, noise))


@given(steps(), images(), images())
@x64
def test_last_step_adds_no_noise(step, x, noise):
    schedule, x = step[0], jnp.asarray(x)
    for ours in STEPS.values():
        np.testing.assert_array_equal(
            ours(toy, schedule, x, 0, jnp.asarray(noise)), ours(toy, schedule, x, 0, jnp.zeros_like(x))
        )
    close(ddpm_step(toy, schedule, x, 0, jnp.asarray(noise)), ddim_step(toy, schedule, x, 0, jnp.asarray(noise)))


@given(steps(first=1), images(), images())
@x64
def test_other_steps_add_noise_with_their_standard_deviation(step, x, noise):
    schedule, i = step
    x, noise = jnp.asarray(x), jnp.asarray(noise)
    deviation = math.sqrt(schedule.posterior_variance[i])
    learned = jnp.exp(ditx.gaussian.p_mean_variance(schedule, toy(x, at(schedule.time, i)), x, i).log_variance / 2)
    for name, expected in [("ddim_eta0.5", 0.5 * deviation), ("ddim_eta1.0", deviation), ("ddpm", learned)]:
        quiet, loud = (STEPS[name](toy, schedule, x, i, n) for n in (jnp.zeros_like(x), noise))
        close(loud - quiet, expected * noise)


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (ddpm_step, ditx.respace(FULL, [3, 500, 999]), [999, 500, 3]),
        (ddim_step, ditx.respace(FULL, [3, 500, 999]), [999, 500, 3]),
        (euler_step, flow.uniform_grid(4), [1000, 750, 500, 250]),
        (heun_step, flow.uniform_grid(2), [1000, 500, 500]),  # the last step is Euler's
    ],
)
def test_network_reads_the_training_times(step, schedule, expected):
    seen = []

    def predict(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return x

    x = jnp.ones((1, 1, 1))
    for i in reversed(range(len(schedule))):
        x = step(predict, schedule, x, i, x)
        jax.effects_barrier()
    assert seen == expected


def test_batch_of_samples_equals_single_samples():
    schedule = ditx.respace(FULL, "10")
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(keys)

    @jax.jit
    def draw(x, key):
        return sample(ddpm_step, toy, schedule, x, key=key)[0]

    batch = jax.jit(jax.vmap(draw))(x, keys)
    for i in range(3):
        np.testing.assert_allclose(batch[i], draw(x[i], keys[i]), rtol=1e-6, atol=1e-6)
    assert np.abs(batch[0] - batch[1]).max() > 0.1


def test_noise_of_a_step_comes_from_the_key_and_the_index():
    schedule, key = ditx.respace(FULL, "10"), jax.random.key(5)
    x = jax.random.normal(jax.random.key(6), (4, 4, 1))
    noises = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in reversed(range(10))])
    fresh, states = sample(ddpm_step, toy, schedule, x, key=key)
    np.testing.assert_allclose(fresh, sample(ddpm_step, toy, schedule, x, noises=noises)[0], rtol=1e-6, atol=1e-6)
    assert states.shape == (10, 4, 4, 1)
    np.testing.assert_array_equal(states[-1], fresh)
    np.testing.assert_allclose(states[0], ddpm_step(toy, schedule, x, 9, noises[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given_both", [True, False])
def test_exactly_one_source_of_noise_is_required(given_both):
    x = jnp.zeros((1, 1, 1))
    noise = {"key": jax.random.key(0), "noises": jnp.zeros((1000, 1, 1, 1))} if given_both else {}
    with pytest.raises(ValueError, match="give either key, for new noise, or noises, to replay"):
        sample(ddim_step, toy, FULL, x, **noise)


def test_wrong_number_of_channels_is_refused_before_running():
    with pytest.raises(ValueError, match="the output has 3 channels and the input 1; give as many or twice"):
        sample(ddim_step, lambda x, t: jnp.zeros((2, 2, 3)), FULL, jnp.zeros((2, 2, 1)), key=jax.random.key(0))
