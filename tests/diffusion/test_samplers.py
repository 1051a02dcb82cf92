import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from references import assert_close, hwc, load
from strategies import FULL, images, step_of, steps, x64

import ditx
from ditx import flow
from ditx.diffusion.samplers import ddim_step, ddpm_step, euler_step, heun_step, sample
from ditx.diffusion.schedule import at

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
def test_recorded_noise_replays_the_references_runs(steps, name):
    golden = {k: hwc(v) for k, v in load("diffusion.npz").items() if k.startswith(f"sample/{steps}/")}
    schedule, prefix = ditx.respace(FULL, steps), f"sample/{steps}"
    run = jax.jit(jax.vmap(lambda x, noises: sample(STEPS[name], toy, schedule, x, noises=noises)))
    last, states = run(golden[f"{prefix}/x_T"], golden[f"{prefix}/noises"].swapaxes(0, 1))
    assert_close(states[:, 0], golden[f"{prefix}/{name}/first"], 1e-5)
    assert_close(last, golden[f"{prefix}/{name}/last"], 1e-5)


# Gaussian data of mean MU and deviation S: the marginal at signal a and noise b is N(a MU, a^2 S^2 + b^2), and the best
# prediction of noise, of data and of velocity given x is linear in x.

MU, S = 0.7, 0.4


def expected_noise(x, a, b):
    return b * (x - a * MU) / (a**2 * S**2 + b**2)


def expected_data(x, a, b):
    return MU + a * S**2 * (x - a * MU) / (a**2 * S**2 + b**2)


def oracle(schedule, *, variance=False):
    """The best network for that data, which finds its place in the schedule by the time it is fed."""

    def predict(x, t):
        i = jnp.searchsorted(jnp.asarray(schedule.time), t)
        a, b = at(schedule.sqrt_alpha_bar, i), at(schedule.sqrt_one_minus_alpha_bar, i)
        noise = expected_noise(x, a, b)
        if not variance:
            return noise
        # The true reverse step is Gaussian: the posterior's variance, and that of the data behind its mean.
        data = S**2 * b**2 / (a**2 * S**2 + b**2)
        log_variance = jnp.log(at(schedule.posterior_variance, i) + at(schedule.posterior_mean_x0, i) ** 2 * data)
        low, high = at(schedule.posterior_log_variance, i), at(schedule.log_beta, i)
        return jnp.concatenate([noise, jnp.full_like(x, 2 * (log_variance - low) / (high - low) - 1)], -1)

    return predict


def velocity(x, t):
    a, b = 1 - t / 1000, t / 1000
    return expected_noise(x, a, b) - expected_data(x, a, b)


def outcome(step, predict, schedule, mean, variance):
    """Exact mean and variance of a sampler that is affine in its start and its noises, from N(mean, variance).

    The pixels of one image are as many runs: from 0, from 1, and from 0 with each of the noises in turn.
    """
    count = len(schedule)
    starts = jnp.zeros((count + 2, 1, 1)).at[1].set(1)
    noises = jnp.concatenate([jnp.zeros((count, 2)), jnp.eye(count)], 1)[:, :, None, None]
    last, _ = jax.jit(lambda: sample(step, predict, schedule, starts, noises=noises))()
    offset, slopes = last[0, 0, 0], last[1:, 0, 0] - last[0, 0, 0]
    return offset + slopes[0] * mean, slopes[0] ** 2 * variance + jnp.square(slopes[1:]).sum()


def marginal(schedule):
    """Mean and variance of the data in the last, noisiest state of a schedule."""
    a, b = schedule.sqrt_alpha_bar[-1], schedule.sqrt_one_minus_alpha_bar[-1]
    return a * MU, a**2 * S**2 + b**2


@pytest.mark.parametrize("steps", ["10", "ddim50", 250])
@x64
def test_ddpm_with_the_true_variance_is_exact_in_any_number_of_steps(steps):
    schedule = ditx.respace(FULL, steps)
    mean, variance = outcome(ddpm_step, oracle(schedule, variance=True), schedule, *marginal(schedule))
    # Without noise at the last step, what the first state hides of the data is not drawn.
    a, b = schedule.sqrt_alpha_bar[0], schedule.sqrt_one_minus_alpha_bar[0]
    close(mean, MU)
    close(variance, S**2 - S**2 * b**2 / (a**2 * S**2 + b**2))


def orders(errors):
    """Observed orders of convergence between runs of ever twice as many steps."""
    errors = np.abs(errors)
    return np.log2(errors[:-1] / errors[1:])


@x64
def test_ddim_converges_to_the_probability_flow_with_order_1():
    errors = []
    for count in (50, 100, 200, 400):
        schedule = ditx.linear_schedule(count)
        mean, variance = marginal(schedule)
        x = jnp.full((1, 1, 1), 1.5)
        last, _ = jax.jit(
            functools.partial(sample, ddim_step, oracle(schedule), schedule, noises=jnp.zeros((count, 1, 1, 1)))
        )(x)
        # Along the flow a state keeps its distance from the mean in deviations, whatever the schedule.
        exact = MU + S * (1.5 - mean) / math.sqrt(variance)
        errors.append(last[0, 0, 0] - exact)
    np.testing.assert_allclose(orders(errors)[1:], 1, atol=0.1)
    assert abs(errors[-1]) < 0.01


@pytest.mark.parametrize("name", [*STEPS])
@x64
def test_samplers_of_noise_predictions_reach_the_datas_mean_and_converge_to_its_variance(name):
    errors = []
    for count in (400, 800):
        schedule = ditx.linear_schedule(count)
        mean, variance = outcome(STEPS[name], oracle(schedule), schedule, *marginal(schedule))
        close(mean, MU)
        errors.append(variance - S**2)
    np.testing.assert_allclose(orders(errors), 1, atol=0.1)
    assert abs(errors[-1]) < 0.03 * S**2


@pytest.mark.parametrize(("step", "order", "counts"), [(euler_step, 1, (32, 64, 128)), (heun_step, 2, (16, 32, 64))])
@x64
def test_flow_samplers_converge_with_their_order(step, order, counts):
    errors = []
    for count in counts:
        grid = flow.uniform_grid(count)
        noises = jnp.zeros((count, 1, 1, 1))
        last, _ = jax.jit(functools.partial(sample, step, velocity, grid, noises=noises))(jnp.full((1, 1, 1), 1.5))
        errors.append(last[0, 0, 0] - (MU + S * 1.5))
    np.testing.assert_allclose(orders(errors), order, atol=0.1 * order)


@pytest.mark.parametrize(
    ("step", "tolerance"),
    [
        (euler_step, 0.05),
        (heun_step, 1e-3),  # errors of order 1 and 2 in 1 / steps
    ],
)
@x64
def test_flow_samplers_reach_the_data(step, tolerance):
    mean, variance = outcome(step, velocity, flow.uniform_grid(100), 0.0, 1.0)
    assert mean == pytest.approx(MU, rel=tolerance)
    assert variance == pytest.approx(S**2, rel=tolerance)


@x64
def test_flow_samplers_are_exact_where_paths_do_not_bend():
    """One point of data: every velocity is constant along its path."""

    def predict(x, t):
        return (x - MU) / (t / 1000)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 1)))
    last, states = sample(euler_step, predict, flow.uniform_grid(4), x, key=jax.random.key(0))
    close(last, MU)
    close(states[1], 0.5 * x + 0.5 * MU)


@given(steps(), images(), images(), images())
@x64
def test_ddim_at_eta_1_is_ddpm_with_the_posteriors_variance(step, x, predicted, noise):
    schedule, i = step_of(step)
    arguments = lambda x, t: jnp.asarray(predicted), schedule, jnp.asarray(x), i, jnp.asarray(noise)
    close(ddim_step(*arguments, eta=1.0), ddpm_step(*arguments))


@given(steps(first=1), images(), images())
@x64
def test_ddim_at_eta_0_moves_to_the_next_level_with_the_same_data_and_noise(step, x0, noise):
    schedule, i = step_of(step)
    x0, noise = jnp.asarray(x0), jnp.asarray(noise)
    x = ditx.gaussian.q_sample(schedule, x0, i, noise)
    moved = ddim_step(lambda x, t: noise, schedule, x, i, 100 * jnp.ones_like(x))
    close(moved, ditx.gaussian.q_sample(schedule, x0, i - 1, noise))


@given(steps(), images(), images())
@x64
def test_no_noise_enters_at_the_last_step(step, x, noise):
    schedule, x = step_of(step)[0], jnp.asarray(x)
    for ours in STEPS.values():
        np.testing.assert_array_equal(
            ours(toy, schedule, x, 0, jnp.asarray(noise)), ours(toy, schedule, x, 0, jnp.zeros_like(x))
        )
    close(ddpm_step(toy, schedule, x, 0, jnp.asarray(noise)), ddim_step(toy, schedule, x, 0, jnp.asarray(noise)))


@given(steps(first=1), images(), images())
@x64
def test_noise_enters_every_other_step_with_its_deviation(step, x, noise):
    schedule, i = step_of(step)
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
        (heun_step, flow.uniform_grid(2), [1000, 500, 500, 0]),
    ],
)
def test_network_is_fed_the_times_of_training(step, schedule, expected):
    seen = []

    def predict(x, t):
        seen.append(float(t))
        return x

    x = jnp.ones((1, 1, 1))
    for i in reversed(range(len(schedule))):
        x = step(predict, schedule, x, i, x)
    assert seen == expected


def test_a_batch_of_draws_equals_each_alone():
    schedule = ditx.respace(FULL, "10")
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(keys)

    @jax.jit
    def draw(x, key):
        return sample(ddpm_step, toy, schedule, x, key=key)[0]

    together = jax.jit(jax.vmap(draw))(x, keys)
    for i in range(3):
        np.testing.assert_allclose(together[i], draw(x[i], keys[i]), rtol=1e-6, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_fresh_noise_is_the_keys_by_index_of_step():
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
    with pytest.raises(ValueError, match="give either key, for fresh noise, or noises, to replay"):
        sample(ddim_step, toy, FULL, x, **noise)


def test_odd_output_is_refused_before_it_runs():
    with pytest.raises(ValueError, match="an output of 3 channels fits no input of 1"):
        sample(ddim_step, lambda x, t: jnp.zeros((2, 2, 3)), FULL, jnp.zeros((2, 2, 1)), key=jax.random.key(0))
