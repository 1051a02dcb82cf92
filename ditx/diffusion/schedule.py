"""Noise schedules: tables over the steps of a diffusion, and shorter schedules made from longer ones."""

from collections.abc import Sequence
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Table: TypeAlias = Float[Array | np.ndarray, " T"]


class Schedule(eqx.Module):
    """The tables of a Gaussian diffusion of `T` steps (Ho et al. 2020), index 0 next to the data.

    Made in NumPy's float64; they are rounded to JAX's default type once, where they meet JAX. `time` is what the
    network is fed, so that a respaced schedule is nothing but a shorter schedule.
    """

    time: Table
    """t for the network: the index of the step in the schedule of training"""
    beta: Table
    """variance that step t adds"""
    alpha_bar: Table
    """share of the data's variance left after step t"""
    sqrt_alpha_bar: Table
    sqrt_one_minus_alpha_bar: Table
    sqrt_recip_alpha_bar: Table
    sqrt_recip_alpha_bar_minus_one: Table
    log_beta: Table
    posterior_variance: Table
    """variance of q(x_{t-1} | x_t, x_0), 0 at the first step (Ho et al. 2020, Eq. 7)"""
    posterior_log_variance: Table
    """its logarithm; at the first step, that of the second"""
    posterior_mean_x0: Table
    """weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)"""
    posterior_mean_xt: Table
    """weight of x_t in that mean"""

    def __len__(self) -> int:
        return self.beta.shape[0]


def at(table: Table, i: Int[Array, ""] | int) -> Float[Array, ""]:
    """Entry `i` of a table of a schedule, in JAX's default type; `i` may be traced."""
    return jnp.asarray(table)[i]


def linear_schedule(steps: int = 1000) -> Schedule:
    """Variances that rise linearly from 1e-4 to 0.02 in 1000 steps, and inversely to `steps` otherwise.

    This is the schedule of Ho et al. 2020 and of the DiT paper. Raises ValueError below 21 steps, where it would
    leave nothing of the signal in one step (respace a longer schedule instead).
    """
    if steps < 21:
        raise ValueError(f"a linear schedule of {steps} steps has variances above 1; respace one of 1000 steps instead")
    return _from_betas(np.linspace(0.1, 20.0, steps) / steps, np.arange(steps))


def respace(schedule: Schedule, steps: str | int | Sequence[int]) -> Schedule:
    """Keep some steps of a schedule, with betas such that `alpha_bar` at them is unchanged (Nichol and Dhariwal 2021).

    `steps` is how many to keep, first and last included (`"250"` or 250), or their number after a constant stride
    (`"ddim50"`, Song et al. 2021), or the indices themselves. The counts give different grids. Raises ValueError where
    the schedule has no such steps.
    """
    indices = _grid(len(schedule), steps)
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)[indices]
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return _from_betas(betas, np.asarray(schedule.time)[indices])


def _grid(total: int, steps: str | int | Sequence[int]) -> np.ndarray:
    if isinstance(steps, str | int | np.integer):
        digits = str(steps).removeprefix("ddim")
        count = int(digits) if digits.isascii() and digits.isdigit() else 0
        if not 1 <= count <= total:
            raise ValueError(
                f"cannot keep {steps!r} of {total} steps; give a count from 1 to {total}, or 'ddim' and one"
            )
        if digits != str(steps):
            # The stride is the only one that yields `count` steps; some counts have none.
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


def _from_betas(beta: np.ndarray, time: np.ndarray) -> Schedule:
    alpha_bar = np.cumprod(1 - beta)
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    # A schedule of one step has no second step to borrow from; it never draws noise either.
    log_source = np.concatenate([posterior_variance[1:2], posterior_variance[1:]]) if len(beta) > 1 else beta
    return Schedule(
        time=time.astype(np.float64),
        beta=beta,
        alpha_bar=alpha_bar,
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1 - alpha_bar),
        sqrt_recip_alpha_bar=np.sqrt(1 / alpha_bar),
        sqrt_recip_alpha_bar_minus_one=np.sqrt(1 / alpha_bar - 1),
        log_beta=np.log(beta),
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(log_source),
        posterior_mean_x0=beta * np.sqrt(previous) / (1 - alpha_bar),
        posterior_mean_xt=(1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar),
    )
