"""Samplers: pure steps from one noise level to the next, and the one loop that runs them.

A step `step(predict, schedule, x, i, noise) -> x` goes from level `i` of its schedule to level `i - 1` or, at 0, to the
data. `noise` is standard normal of the shape of `x`; deterministic steps ignore it. A multistep method has a sixth
argument `previous`, the data predicted in the step before, and returns its own prediction beside `x`. Any step works
with any schedule and prediction.

The probability-flow ODE (Song et al. 2021) is dx = x0 dalpha + noise dsigma, with the predicted data and noise. In this
form it needs no time, and its terms are finite.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.checks import branch, check_example
from ditx.diffusion.gaussian import p_mean_variance, predict_x0_eps
from ditx.diffusion.parameterization import Image, Predict, Scalar, one_example
from ditx.diffusion.schedule import Index, Schedule, at

Step: TypeAlias = Callable[..., Image | tuple[Image, Image]]


@one_example
def ddpm_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One ancestral step (Ho et al. 2020, Algorithm 2) with the network's variance; the last one adds no noise."""
    step = p_mean_variance(schedule, predict(x, at(schedule.time, i)), x, i)
    return jnp.where(jnp.asarray(i) > 0, step.mean + jnp.exp(step.log_variance / 2) * noise, step.mean)


@one_example
def ddim_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image, *, eta: Scalar = 0.0) -> Image:
    """One step of DDIM (Song et al. 2021, Eq. 12): deterministic at `eta` 0, as noisy as DDPM at 1."""
    x0, eps = predict_x0_eps(schedule, predict, x, i)
    alpha, sigma = _next_level(schedule, i)
    std = eta * jnp.sqrt(at(schedule.posterior_variance, i))
    return alpha * x0 + jnp.sqrt(jnp.maximum(sigma**2 - std**2, 0)) * eps + std * noise


@one_example
def euler_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One step of Euler's method on the probability-flow ODE; equals DDIM at `eta` 0."""
    return ddim_step(predict, schedule, x, i, noise)


@one_example
def heun_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One step of Heun's method on the probability-flow ODE: second order, two evaluations, deterministic.

    The last step ends at the data, where there is no noise level, and is Euler's (Karras et al. 2022, Algorithm 1).
    """
    i = jnp.asarray(i)
    alpha, sigma = _next_level(schedule, i)

    def change(x, j):
        x0, eps = predict_x0_eps(schedule, predict, x, j)
        return (alpha - at(schedule.alpha, i)) * x0 + (sigma - at(schedule.sigma, i)) * eps

    first = change(x, i)
    # The whole batch has the same index, so this stays a branch under vmap.
    second = branch(i > 0, lambda: change(x + first, i - 1), lambda: first)
    return x + (first + second) / 2


@one_example
def dpm_solver_step(
    predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image, previous: Image
) -> tuple[Image, Image]:
    """One step of DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order, one evaluation, deterministic.

    The first step, the last, and a step that follows one from pure noise ignore `previous` and are of first order.
    """
    x0, _ = predict_x0_eps(schedule, predict, x, i)
    i, last = jnp.asarray(i), len(schedule) - 1
    alpha, sigma = _next_level(schedule, i)
    log_snr = at(schedule.log_snr, i)
    length = at(schedule.log_snr, jnp.maximum(i - 1, 0)) - log_snr
    previous_length = log_snr - at(schedule.log_snr, jnp.minimum(i + 1, last))
    data = x0 + jnp.where(i < last, length / (2 * previous_length), 0) * (x0 - previous)
    decay = sigma / at(schedule.sigma, i)
    return decay * x + (alpha - decay * at(schedule.alpha, i)) * data, x0


@one_example
def euler_maruyama_step(predict: Predict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One Euler-Maruyama step on the reverse SDE (Song et al. 2021, Eq. 6); the last one adds no noise.

    The added noise has the variance that the forward process adds in the step. On the linear path, this variance is
    infinite at pure noise. Any variance keeps the marginals, so on this path it is multiplied by alpha, as in SiT (Ma
    et al. 2024, with w = sigma).
    """
    x0, eps = predict_x0_eps(schedule, predict, x, i)
    alpha, sigma = _next_level(schedule, i)
    variance = at(schedule.beta, i) * (alpha if schedule.path == "linear" else 1)
    variance = jnp.where(jnp.asarray(i) > 0, variance, 0)
    return alpha * x0 + (sigma - variance / (2 * at(schedule.sigma, i))) * eps + jnp.sqrt(variance) * noise


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

    Returns the sample and all states, the sample last; under `jax.jit`, unused states are never stored. Step `i` uses
    noise from `fold_in(key, i)`, or the next of `noises`. Raises ValueError unless exactly one of the two is given.
    """
    if (key is None) == (noises is None):
        raise ValueError("give either key, for new noise, or noises, to replay")
    check_example(3, x=x)
    order = jnp.arange(len(schedule))[::-1]
    multistep = "previous" in inspect.signature(step).parameters

    def body(carry, entry):
        (x, *previous), (i, noise) = carry, entry
        if key is not None:
            noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        result: Any = step(predict, schedule, x, i, noise, *previous)
        carry = result if multistep else (result,)
        return carry, carry[0]

    (last, *_), states = jax.lax.scan(body, (x, jnp.zeros_like(x)) if multistep else (x,), (order, noises))
    return last, states


def _next_level(schedule: Schedule, i: Index) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Alpha and sigma at the end of step `i`: at level `i - 1`, or at the data."""
    i = jnp.asarray(i)
    return jnp.where(i > 0, at(schedule.alpha, i - 1), 1), jnp.where(i > 0, at(schedule.sigma, i - 1), 0)
