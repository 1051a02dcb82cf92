"""Samplers: pure steps from one noise level to the next, and the one loop that runs them.

A step is `step(predict, schedule, x, i, noise) -> x` and leads from index `i` of its schedule (or grid) to the one
below, or, at 0, to the data. `noise` is standard normal and of the shape of `x`, whether the step uses it or not.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion.flow import TIME_SCALE, FlowGrid
from ditx.diffusion.gaussian import Image, Index, Predict, p_mean_variance, split_variance, x0_from_noise
from ditx.diffusion.schedule import Schedule, at

Step: TypeAlias = Callable[..., Image]


def ddpm_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One ancestral step (Ho et al. 2020, Algorithm 2) with the network's variance; the last adds no noise."""
    step = p_mean_variance(schedule, predict(x, at(schedule.time, i)), x, i)
    return jnp.where(jnp.asarray(i) > 0, step.mean + jnp.exp(step.log_variance / 2) * noise, step.mean)


def ddim_step(
    predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image, *, eta: int | float = 0.0
) -> Image:
    """One step of DDIM (Song et al. 2021, Eq. 12): deterministic at `eta` 0, as noisy as DDPM at 1."""
    predicted, _ = split_variance(predict(x, at(schedule.time, i)), x)
    x0 = x0_from_noise(schedule, x, i, predicted)
    i = jnp.asarray(i)
    signal = jnp.where(i > 0, at(schedule.sqrt_alpha_bar, i - 1), 1)
    spread = jnp.where(i > 0, at(schedule.sqrt_one_minus_alpha_bar, i - 1), 0)
    fresh = eta * jnp.sqrt(at(schedule.posterior_variance, i))
    return signal * x0 + jnp.sqrt(jnp.maximum(spread**2 - fresh**2, 0)) * predicted + fresh * noise


def euler_step(predict: Predict, grid: FlowGrid, x: Image, i: Index, noise: Image) -> Image:
    """One step of Euler's method along the velocity of a flow; deterministic."""
    start, end = at(grid.start, i), at(grid.end, i)
    return x + (end - start) * predict(x, TIME_SCALE * start)


def heun_step(predict: Predict, grid: FlowGrid, x: Image, i: Index, noise: Image) -> Image:
    """One step of Heun's second-order method along the velocity of a flow: two evaluations; deterministic."""
    start, end = at(grid.start, i), at(grid.end, i)
    first = predict(x, TIME_SCALE * start)
    second = predict(x + (end - start) * first, TIME_SCALE * end)
    return x + (end - start) * (first + second) / 2


def sample(
    step: Step,
    predict: Predict,
    schedule: Schedule | FlowGrid,
    x: Image,
    *,
    key: PRNGKeyArray | None = None,
    noises: Float[Array, "T h w c"] | None = None,
) -> tuple[Image, Float[Array, "T h w c"]]:
    """Run `step` over a whole schedule, from pure noise `x`, in one compiled loop.

    Returns the sample and every state on the way to it, the sample last; a compiler drops the states where the caller
    does. Fresh noise comes from `key`, by the index of the step, or is replayed from `noises`, in order of use. Raises
    ValueError unless exactly one of the two is given.
    """
    if (key is None) == (noises is None):
        raise ValueError("give either key, for fresh noise, or noises, to replay")
    order = jnp.arange(len(schedule))[::-1]

    def body(x, entry):
        i, noise = entry
        if key is not None:
            noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        x = step(predict, schedule, x, i, noise)
        return x, x

    return jax.lax.scan(body, x, (order, noises))
