"""Noise schedules: tables over the steps of a diffusion, and shorter schedules from longer ones."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ditx.checks import any_mesh, check_choice, check_example
from ditx.diffusion.parameterization import NoiseLevel, Prediction, Scalar

Table: TypeAlias = Float[Array | np.ndarray, " T"]
Index: TypeAlias = int | np.integer | Int[Array | np.ndarray, ""]
Spacing: TypeAlias = Literal["time", "log-snr", "karras"]
Path: TypeAlias = Literal["vp", "linear"]


class Schedule(eqx.Module):
    """Noise levels, index 0 next to the data, with the times and the prediction of the network.

    At level `i` an image is `alpha x0 + sigma noise`; step `i` goes to level `i - 1` or, at 0, to the data. The other
    tables describe the discrete diffusion between the levels (Ho et al. 2020; Kingma et al. 2021, appendix A). Computed
    in NumPy's float64, and rounded to JAX's default type once, on entering JAX.
    """

    time: Table
    """t that the network reads, in units of training steps, also in a respaced schedule"""
    alpha: Table
    """scale of the data"""
    sigma: Table
    """standard deviation of the noise"""
    log_snr: Table
    """log(alpha^2 / sigma^2)"""
    beta: Table
    """variance that the forward process adds in step t"""
    log_beta: Table
    posterior_variance: Table
    """variance of q(x_{t-1} | x_t, x_0), 0 at the first step (Ho et al. 2020, Eq. 7)"""
    posterior_log_variance: Table
    """its logarithm; the first step has the value of the second"""
    posterior_mean_x0: Table
    """weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)"""
    posterior_mean_xt: Table
    """weight of x_t in that mean"""
    path: Path = eqx.field(static=True)
    """alpha^2 + sigma^2 = 1 (variance preserving), or alpha + sigma = 1"""
    prediction: Prediction = eqx.field(static=True)
    """output of the network"""

    def __len__(self) -> int:
        return self.beta.shape[0]

    @property
    def alpha_bar(self) -> Table:
        """Fraction of the data's variance that remains at step t."""
        return self.alpha**2


@any_mesh
def at(table: Table, i: Index) -> Float[Array, ""]:
    """Entry `i` of a schedule's table, in JAX's default type; `i` may be traced."""
    check_example(0, i=i)
    return jnp.asarray(table)[i]


def noise_level(schedule: Schedule, i: Index) -> NoiseLevel:
    """Level `i` of a schedule. On the path vp, velocities are derivatives by the angle, and equal v."""
    time, alpha, sigma = (at(table, i) for table in (schedule.time, schedule.alpha, schedule.sigma))
    rates = (-sigma, alpha) if schedule.path == "vp" else (-jnp.ones_like(alpha), jnp.ones_like(alpha))
    return NoiseLevel(time, alpha, sigma, *rates)


def linear_schedule(steps: int | np.integer = 1000, *, prediction: Prediction = "eps") -> Schedule:
    """Variances that rise linearly from 1e-4 to 0.02 over 1000 steps; scaled by 1000 / `steps` for other numbers.

    The schedule of Ho et al. 2020 and of the DiT paper. Raises ValueError below 21 steps, where a variance exceeds 1
    (respace a longer schedule instead).
    """
    if steps < 21:
        raise ValueError(f"a linear schedule of {steps} steps has variances above 1; respace one of 1000 steps instead")
    return _from_betas(np.linspace(0.1, 20.0, steps) / steps, prediction)


def cosine_schedule(steps: int | np.integer = 1000, *, prediction: Prediction = "eps") -> Schedule:
    """`alpha_bar` falls as a squared cosine; variances are at most 0.999 (Nichol and Dhariwal 2021, Eq. 17).

    Raises ValueError below two steps.
    """
    if steps < 2:
        raise ValueError(f"a cosine schedule of {steps} steps cannot go from data to noise; respace one of 1000 steps")
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return _from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), prediction)


def _from_betas(beta: np.ndarray, prediction: Prediction) -> Schedule:
    time, alpha_bar = np.arange(len(beta), dtype=np.float64), np.cumprod(1 - beta)
    return from_levels(time, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), path="vp", prediction=prediction)


def from_levels(
    time: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, *, path: Path, prediction: Prediction
) -> Schedule:
    """The schedule with these levels, data first; its betas follow from `alpha` and `sigma`."""
    check_choice("path", path, get_args(Path))
    check_choice("prediction", prediction, get_args(Prediction))
    if prediction == "eps" and np.any(alpha == 0):
        raise ValueError("prediction eps says nothing about the data at a level of pure noise; use v, x0 or velocity")
    alpha_before, sigma_before = np.concatenate([[1.0], alpha[:-1]]), np.concatenate([[0.0], sigma[:-1]])
    scale = alpha / alpha_before
    beta = sigma**2 - (scale * sigma_before) ** 2
    posterior_variance = beta * sigma_before**2 / sigma**2
    # A schedule of one step has no second step to take the value of; its sampler draws no noise either.
    log_source = np.concatenate([posterior_variance[1:2], posterior_variance[1:]]) if len(beta) > 1 else beta
    with np.errstate(divide="ignore"):  # Pure noise has no signal.
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    return Schedule(
        time=time,
        alpha=alpha,
        sigma=sigma,
        log_snr=log_snr,
        beta=beta,
        log_beta=np.log(beta),
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(log_source),
        posterior_mean_x0=alpha_before * beta / sigma**2,
        posterior_mean_xt=scale * sigma_before**2 / sigma**2,
        path=path,
        prediction=prediction,
    )


def sampling_grid(schedule: Schedule, steps: int | np.integer, spacing: Spacing = "time") -> Schedule:
    """`steps` levels of a schedule of evenly spaced times; their times need not be whole.

    `time`: steps of equal length, the last one to the data (the "trailing" steps of Lin et al. 2024, not rounded).
    `log-snr`: equal differences of log-SNR between noisiest and cleanest level (Lu et al. 2022, section 3.4).
    `karras`: equal differences of (sigma / alpha)^(1/7) (Karras et al. 2022, Eq. 5). The latter two leave out a level
    of pure noise, where log-SNR is infinite. Between levels, log alpha (on the linear path, alpha) is linear in time.
    Raises ValueError below one step, or if the schedule has one level.
    """
    check_choice("spacing", spacing, get_args(Spacing))
    if steps < 1 or len(schedule) < 2:
        raise ValueError(f"cannot take {steps} of {len(schedule)} levels; give at least 1 step and 2 levels")
    time, signal = _axis(schedule)
    if spacing == "time":
        times = np.linspace(time[0], time[-1], steps + 1)[1:]
    else:
        ratio = np.exp(-np.asarray(schedule.log_snr, np.float64) / 2)
        noisy, clean = (ratio[np.isfinite(ratio)][[-1, 0]] ** (1 / 7)).tolist()
        between = np.geomspace if spacing == "log-snr" else np.linspace
        times = time_at(schedule, between(noisy, clean, steps)[::-1] ** 7)
    signal = np.interp(times, time, signal)
    vp = schedule.path == "vp"
    alpha, sigma = (np.exp(signal), np.sqrt(-np.expm1(2 * signal))) if vp else (signal, 1 - signal)
    return from_levels(times, alpha, sigma, path=schedule.path, prediction=schedule.prediction)


def time_at(schedule: Schedule, ratio: Scalar | np.ndarray) -> np.ndarray:
    """The time at which sigma / alpha, the sigma of Karras et al. 2022, is `ratio`; it need not be whole."""
    time, signal = _axis(schedule)
    target = -np.log1p(ratio**2) / 2 if schedule.path == "vp" else 1 / (1 + ratio)
    return np.asarray(np.interp(-np.asarray(target), -signal, time))


def _axis(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Times and the quantity that is linear between them, data first: log alpha, or alpha on the linear path."""
    time, alpha = np.asarray(schedule.time, np.float64), np.asarray(schedule.alpha, np.float64)
    signal = np.concatenate([[0.0], np.log(alpha)]) if schedule.path == "vp" else np.concatenate([[1.0], alpha])
    return np.concatenate([2 * time[:1] - time[1:2], time]), signal


def respace(schedule: Schedule, steps: str | int | np.integer | Sequence[int]) -> Schedule:
    """Keep some steps of a schedule, with the same `alpha_bar` and new betas (Nichol and Dhariwal 2021).

    `steps` is their number, first and last included (`"250"` or 250), or their number at a constant stride (`"ddim50"`,
    Song et al. 2021), or their indices. The two kinds of number give different grids. Raises ValueError if the schedule
    has no such steps.
    """
    indices = _grid(len(schedule), steps)
    kept = (np.asarray(table, np.float64)[indices] for table in (schedule.time, schedule.alpha, schedule.sigma))
    return from_levels(*kept, path=schedule.path, prediction=schedule.prediction)


def _grid(total: int, steps: str | int | np.integer | Sequence[int]) -> np.ndarray:
    if isinstance(steps, str | int | np.integer):
        digits = str(steps).removeprefix("ddim")
        count = int(digits) if digits.isascii() and digits.isdigit() else 0
        if not 1 <= count <= total:
            raise ValueError(f"cannot keep {steps!r} of {total} steps; give 1 to {total}, or 'ddim' and such a number")
        if digits != str(steps):
            # At most one stride gives `count` steps; some counts have none.
            strides = [stride for stride in range(1, total + 1) if len(range(0, total, stride)) == count]
            if not strides:
                raise ValueError(f"no constant stride keeps {count} of {total} steps; try {digits!r}")
            return np.arange(0, total, strides[0])
        stride = (total - 1) / (count - 1) if count > 1 else 0.0
        return np.array([round(i * stride) for i in range(count)])
    indices = np.unique(np.asarray(steps))
    if indices.size == 0 or indices.dtype.kind not in "iu" or indices[0] < 0 or indices[-1] >= total:
        raise ValueError(f"the steps to keep must be integers from 0 to {total - 1}, got {list(steps)}")
    return indices
