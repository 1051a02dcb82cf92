"""Samplers: pure steps from one noise level to the next, and the one loop that runs them.

A step is `step(predict, schedule, x, i, noise) -> x` and leads from level `i` of its schedule to the one below, or, at
0, to the data. `noise` is standard normal and of the shape of `x`, whether the step uses it or not. A step that goes by
the step before, too, has a sixth argument `previous`, what that one predicted of the data, and returns its own beside
x. Any step takes any schedule, of whatever path and prediction.

The probability-flow ODE (Song et al. 2021) is dx = x0 dalpha + noise dsigma, with the data and the noise that the
network sees in x. So written, it has no time in it, and nothing in it is infinite.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion.gaussian import p_mean_variance, predicted
from ditx.diffusion.parameterization import Image, Predict
from ditx.diffusion.schedule import Index, Schedule, at

Step: TypeAlias = Callable[..., Image | tuple[Image, Image]]


def ddpm_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One ancestral step (Ho et al. 2020, Algorithm 2) with the network's variance; the last adds no noise."""
    step = p_mean_variance(schedule, predict(x, at(schedule.time, i)), x, i)
    return jnp.where(jnp.asarray(i) > 0, step.mean + jnp.exp(step.log_variance / 2) * noise, step.mean)


def ddim_step(
    predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image, *, eta: int | float = 0.0
) -> Image:
    """One step of DDIM (Song et al. 2021, Eq. 12): deterministic at `eta` 0, as noisy as DDPM at 1."""
    x0, direction = predicted(schedule, predict, x, i)
    alpha, sigma = _below(schedule, i)
    fresh = eta * jnp.sqrt(at(schedule.posterior_variance, i))
    return alpha * x0 + jnp.sqrt(jnp.maximum(sigma**2 - fresh**2, 0)) * direction + fresh * noise


def euler_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One step of Euler's method on the probability-flow ODE, which is DDIM's at `eta` 0; deterministic."""
    return ddim_step(predict, schedule, x, i, noise)


def heun_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One step of Heun's second-order method on the probability-flow ODE: two evaluations; deterministic.

    The last step, whose end is no level of noise, is Euler's (Karras et al. 2022, Algorithm 1).
    """
    i = jnp.asarray(i)
    alpha, sigma = _below(schedule, i)

    def change(x, j):
        x0, direction = predicted(schedule, predict, x, j)
        return (alpha - at(schedule.alpha, i)) * x0 + (sigma - at(schedule.sigma, i)) * direction

    first = change(x, i)
    # The index is the same for a whole batch, so that this stays a branch when vmapped.
    second = jax.lax.cond(i > 0, lambda: change(x + first, i - 1), lambda: first)
    return x + (first + second) / 2


def dpm_solver_step(
    predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image, previous: Image
) -> tuple[Image, Image]:
    """One step of DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order, one evaluation; deterministic.

    The first step and the last do without the `previous` prediction, and so does one after a step from pure noise:
    they are of first order.
    """
    x0, _ = predicted(schedule, predict, x, i)
    i, last = jnp.asarray(i), len(schedule) - 1
    alpha, sigma = _below(schedule, i)
    here = at(schedule.log_snr, i)
    length = at(schedule.log_snr, jnp.maximum(i - 1, 0)) - here
    before = here - at(schedule.log_snr, jnp.minimum(i + 1, last))
    data = x0 + jnp.where(i < last, length / (2 * before), 0) * (x0 - previous)
    decay = sigma / at(schedule.sigma, i)
    return decay * x + (alpha - decay * at(schedule.alpha, i)) * data, x0


def euler_maruyama_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One Euler-Maruyama step on the reverse SDE (Song et al. 2021, Eq. 6); the last adds no noise.

    The fresh noise is as much as the forward process adds in the step. On the path linear that is infinite next to pure
    noise, and any amount keeps the marginals: it is alpha times as much, as in SiT (Ma et al. 2024, with w = sigma).
    """
    x0, direction = predicted(schedule, predict, x, i)
    alpha, sigma = _below(schedule, i)
    fresh = at(schedule.beta, i) * (alpha if schedule.path == "linear" else 1)
    fresh = jnp.where(jnp.asarray(i) > 0, fresh, 0)
    return alpha * x0 + (sigma - fresh / (2 * at(schedule.sigma, i))) * direction + jnp.sqrt(fresh) * noise


def sample(
    step: Step,
    predict: Predict,
    schedule: Schedule,
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
    remembers = "previous" in inspect.signature(step).parameters

    def body(carry, entry):
        (x, *previous), (i, noise) = carry, entry
        if key is not None:
            noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        result: Any = step(predict, schedule, x, i, noise, *previous)
        carry = result if remembers else (result,)
        return carry, carry[0]

    (last, *_), states = jax.lax.scan(body, (x, jnp.zeros_like(x)) if remembers else (x,), (order, noises))
    return last, states


def _below(schedule: Schedule, i: Index) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Alpha and sigma where step `i` leads: of the level below, or of the data."""
    i = jnp.asarray(i)
    return jnp.where(i > 0, at(schedule.alpha, i - 1), 1), jnp.where(i > 0, at(schedule.sigma, i - 1), 0)
