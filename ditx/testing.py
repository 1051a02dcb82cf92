"""Oracles, checks and hypothesis strategies for your own schedules, samplers, losses and networks (extra `testing`).

The oracle is Gaussian data of mean MEAN and standard deviation STD in every pixel. Its marginal at a noise level is
N(alpha MEAN, alpha^2 STD^2 + sigma^2), and the best predictor is linear in x. The three checks raise AssertionError:

    check_marginals(schedule)        # the tables of a schedule describe one diffusion
    check_order(step, 2, schedule)   # a sampler converges to the data with this order
    check_minimiser(loss, schedule)  # the best predictor minimises a loss
"""

import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion.parameterization import Image, NoiseLevel, Predict, to_target
from ditx.diffusion.samplers import Step, sample
from ditx.diffusion.schedule import Index, Schedule, at, linear_schedule, respace, sampling_grid
from ditx.nn.dit import DiTConfig

try:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp
except ImportError as error:
    raise ImportError("ditx.testing needs hypothesis; install it with the extra: ditx[testing]") from error

MEAN, STD = 0.7, 0.4
Scalar = Float[Array, ""] | float


def x64(test: Callable) -> Callable:
    """Run a test in double precision, in which formulas hold to 1e-10."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


def expected_noise(x: Image, alpha: Scalar, sigma: Scalar) -> Image:
    """E[noise | x]."""
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def expected_data(x: Image, alpha: Scalar, sigma: Scalar) -> Image:
    """E[x0 | x]."""
    return MEAN + alpha * STD**2 * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def marginal(schedule: Schedule, i: int = -1) -> tuple[float, float]:
    """Mean and variance of the noised data at level `i`."""
    alpha, sigma = schedule.alpha[i], schedule.sigma[i]
    return float(alpha * MEAN), float(alpha**2 * STD**2 + sigma**2)


def oracle(schedule: Schedule, *, variance: bool = False) -> Predict:
    """The best predictor for a schedule and its prediction, at any time; on its levels, with the best variance, too."""

    def predict(x, t):
        level = _level_at(schedule, t)
        data, noise = (expected(x, level.alpha, level.sigma) for expected in (expected_data, expected_noise))
        prediction = to_target(schedule.prediction, data, noise, level)
        if not variance:
            return prediction
        # The true reverse step is Gaussian: the posterior's variance, plus that of the data in the posterior's mean.
        i = jnp.argmin(jnp.abs(jnp.asarray(schedule.time) - t))
        data_variance = STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)
        total = at(schedule.posterior_variance, i) + at(schedule.posterior_mean_x0, i) ** 2 * data_variance
        low, high = at(schedule.posterior_log_variance, i), at(schedule.log_beta, i)
        return jnp.concatenate([prediction, jnp.full_like(x, 2 * (jnp.log(total) - low) / (high - low) - 1)], -1)

    return predict


def _level_at(schedule: Schedule, t: Float[Array, ""]) -> NoiseLevel:
    """The level at any time: between levels log alpha is linear in time or, on the linear path, alpha."""
    time, alphas = jnp.asarray(schedule.time), jnp.asarray(schedule.alpha)
    if schedule.path == "vp":
        log_alpha = jnp.interp(t, time, jnp.log(alphas))
        alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
        return NoiseLevel(t, alpha, sigma, -sigma, alpha)
    slope = (alphas[-1] - alphas[0]) / (time[-1] - time[0]) if len(schedule) > 1 else 0.0
    alpha = alphas[0] + slope * (t - time[0])
    return NoiseLevel(t, alpha, 1 - alpha, -jnp.ones_like(alpha), jnp.ones_like(alpha))


def mean_oracle(x: Image, t: Scalar, duration: Scalar) -> Image:
    """The exact mean velocity of the flow over `duration` training steps, from `t` towards the data."""
    s, r = t / 1000, (t - duration) / 1000
    std, std_after = (jnp.sqrt((1 - time) ** 2 * STD**2 + time**2) for time in (s, r))
    # (std - std_after) / (s - r), in a form that also holds at s = r.
    slope = ((s + r) * (1 + STD**2) - 2 * STD**2) / (std + std_after)
    return (x - (1 - s) * MEAN) / std * slope - MEAN


def outcome(
    step: Step, predict: Predict, schedule: Schedule, mean: float, variance: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Exact mean and variance of the samples of an affine sampler that starts from N(mean, variance).

    The pixels of one image are independent runs: from 0, from 1, from 0 with each unit of noise, and from 2 with all
    noise -1. Raises ValueError if the last contradicts the others, as in a sampler that is not affine in start and
    noise.
    """
    count = len(schedule)
    starts = jnp.zeros((count + 3, 1, 1)).at[1].set(1).at[-1].set(2)
    noises = jnp.concatenate([jnp.zeros((count, 2)), jnp.eye(count), -jnp.ones((count, 1))], 1)[:, :, None, None]
    samples = jax.jit(lambda: sample(step, predict, schedule, starts, noises=noises)[0])()[:, 0, 0]
    offset, start_slope, noise_slopes = samples[0], samples[1] - samples[0], samples[2:-1] - samples[0]
    expected = offset + 2 * start_slope - noise_slopes.sum()
    if not jnp.allclose(samples[-1], expected, rtol=1e-3, atol=1e-3):
        raise ValueError(f"the sampler is not affine: {samples[-1]:.4g} in place of {expected:.4g}; leave out clipping")
    return offset + start_slope * mean, start_slope**2 * variance + jnp.square(noise_slopes).sum()


def check_marginals(schedule: Schedule) -> None:
    """The tables of a schedule agree: forward step and posterior join neighbouring levels (Ho et al. 2020, Eqs. 2-7).

    Raises AssertionError with the first table that has a relative error above 1e-8.
    """
    tables = {name: np.asarray(t, np.float64) for name, t in vars(schedule).items() if not isinstance(t, str)}
    alpha, sigma, beta, variance = (tables[name] for name in ("alpha", "sigma", "beta", "posterior_variance"))
    mean_x0, mean_xt = tables["posterior_mean_x0"], tables["posterior_mean_xt"]
    alpha_before, sigma_before = np.concatenate([[1.0], alpha[:-1]]), np.concatenate([[0.0], sigma[:-1]])
    scale = alpha / alpha_before
    with np.errstate(divide="ignore"):  # at pure noise
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    for name, actual, expected in [
        ("time (rising)", np.diff(tables["time"]) > 0, True),
        (f"path {schedule.path}", alpha**2 + sigma**2 if schedule.path == "vp" else alpha + sigma, 1.0),
        ("beta", (scale * sigma_before) ** 2 + beta, sigma**2),
        ("posterior_mean", mean_x0 + mean_xt * alpha, alpha_before),
        ("posterior_mean_xt", mean_xt * beta, scale * variance),
        ("posterior_variance", (mean_xt * sigma) ** 2 + variance, sigma_before**2),
        ("posterior_log_variance", np.exp(tables["posterior_log_variance"][1:]), variance[1:]),
        ("log_beta", np.exp(tables["log_beta"]), beta),
        ("log_snr", tables["log_snr"], log_snr),
    ]:
        message = f"{name} of the schedule does not keep the marginals"
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-12, err_msg=message)


@x64
def check_order(step: Step, order: int | float, schedule: Schedule | None = None, *, tolerance: float = 0.1) -> float:
    """Samples of Gaussian data have its mean, and a variance whose error falls with this order. Returns the order.

    Compares 64 with 128 steps equal in log-SNR on a long `schedule` of any path and prediction (the paper's by
    default). Raises AssertionError for a wrong limit or a lower order, ValueError if the sampler is not affine.
    """
    errors = []
    for count in (64, 128):
        grid = sampling_grid(linear_schedule() if schedule is None else schedule, count, "log-snr")
        mean, variance = outcome(step, oracle(grid), grid, *marginal(grid))
        assert abs(mean - MEAN) < 1e-10, f"the mean of the samples is {mean:.6g}, that of the data {MEAN}"
        # All grids have the same first level. The last step is the best guess from there, which varies less.
        alpha, sigma = grid.alpha[0], grid.sigma[0]
        errors.append(abs(float(variance) - (alpha * STD**2) ** 2 / (alpha**2 * STD**2 + sigma**2)))
    measured = float(np.log2(errors[0] / max(errors[1], 1e-300)))
    assert errors[1] < 0.11 * STD**2, f"the variance of the samples is off by {errors[1]:.3g} of {STD**2:.3g}"
    assert measured > order - tolerance or errors[1] < 1e-9, f"the order of convergence is {measured:.2f}, not {order}"
    return measured


def check_minimiser(
    loss: Callable[[Predict, Image, PRNGKeyArray], Any], schedule: Schedule | None = None, *, examples: int = 4096
) -> None:
    """The best predictor minimises `loss(predict, x0, key)`, a scalar or a dictionary with `loss`, on Gaussian data.

    `schedule` has the levels of training and the prediction (default: the paper's). Perturbs the predictor by 1, x, t
    and x t. Raises AssertionError if a derivative differs from 0 by 5 standard errors, or if the loss does not rise.
    """
    best = oracle(linear_schedule() if schedule is None else schedule)

    def perturbed(coefficients, x0, key):
        def predict(x, t):
            a, b, c, d = coefficients
            return best(x, t) + a + b * x + (c + d * x) * t / 1000

        value = loss(predict, x0, key)
        return value["loss"] if isinstance(value, dict) else value

    def one(key):
        data_key, loss_key = jax.random.split(key)
        x0 = MEAN + STD * jax.random.normal(data_key, (4, 4, 1))
        shifts = 0.3 * jnp.concatenate([jnp.zeros((1, 4)), jnp.eye(4), -jnp.eye(4)])
        losses = jax.vmap(lambda shift: perturbed(shift, x0, loss_key))(shifts)
        return jax.grad(perturbed)(jnp.zeros(4), x0, loss_key), losses[1:5] + losses[5:] - 2 * losses[0]

    slopes, rises = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), examples)))
    slope, error, rise = slopes.mean(0), slopes.std(0) / np.sqrt(examples), rises.mean(0)
    assert np.all(rise > 0), f"the loss does not rise away from the best predictor: {rise} along 1, x, t, x t"
    sentence = f"the best predictor does not minimise the loss: slopes {slope} along 1, x, t, x t, +- {error}"
    assert np.all(np.abs(slope) < 5 * error), sentence


def kept_steps(total: int = 1000, sizes: tuple[int, ...] = (2, 7, 20)) -> st.SearchStrategy[list[int]]:
    """Indices for `respace`, in few lengths, because each length compiles its own program."""
    indices = st.integers(0, total - 1)
    return st.sampled_from(sizes).flatmap(
        lambda size: st.lists(indices, min_size=size, max_size=size, unique=True).map(sorted)
    )


def schedules() -> st.SearchStrategy[Schedule]:
    """The paper's schedule, its published respacings, and any other respacing."""
    published = st.sampled_from(["1000", "10", "250", "ddim50", "ddim250"])
    return (published | kept_steps().map(tuple)).map(_schedule_of)


@functools.cache
def _schedule_of(kept: Any) -> Schedule:
    # Type checkers draw from `random`, which hypothesis forbids inside strategies.
    state = random.getstate()
    whole = linear_schedule()
    schedule = whole if kept == "1000" else respace(whole, kept)
    random.setstate(state)
    return schedule


def steps(first: int = 0) -> st.SearchStrategy[tuple[Schedule, Index]]:
    """A schedule and one of its indices, from `first` on."""
    return schedules().flatmap(
        lambda schedule: st.tuples(
            st.just(schedule), st.sampled_from([first, len(schedule) - 1]) | st.integers(first, len(schedule) - 1)
        )
    )


def images(shape: tuple[int, ...] = (2, 3, 2), bound: int | float = 4) -> st.SearchStrategy[np.ndarray]:
    """Images in double precision, with entries from -bound to bound."""
    return hnp.arrays(np.float64, shape, elements=st.floats(-bound, bound, width=32))


@st.composite
def dit_configs(draw, blocks: Any = ("adaln-zero", "adaln", "cross-attention", "in-context")) -> DiTConfig:
    """Tiny networks of every kind of size, with one of these blocks."""
    patch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return DiTConfig(
        input_size=patch * draw(st.integers(1, 3)),
        patch_size=patch,
        in_channels=draw(st.integers(1, 4)),
        hidden_size=heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5, 4.0])),
        num_classes=draw(st.integers(1, 5)),
        label_dropout=draw(st.sampled_from([0.0, 0.1])),
        learn_sigma=draw(st.booleans()),
        block=draw(st.sampled_from(blocks)),
    )
