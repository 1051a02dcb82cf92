"""MeanFlow: mean velocities of a flow, which sample in one or a few steps (Geng et al. 2025a; improved: 2025b).

Times `r <= s` are as in `ditx.diffusion.flow`: 0 at the data, 1 at the noise. The mean velocity over the way from x_s
back to x_r is u = (x_s - x_r) / (s - r). It obeys u = v - (s - r) du/ds, where du/ds is the derivative along the flow;
training makes a network obey this. The network is `predict(x, t, duration) -> u`. Both arguments count training steps:
t = 1000 s and duration = 1000 (s - r). At duration 0 it predicts the velocity v.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ditx.diffusion.flow import TIME_SCALE, noise_level
from ditx.diffusion.parameterization import Image, Scalar, add_noise, one_example, to_target
from ditx.diffusion.schedule import Index, Schedule, at

MeanPredict: TypeAlias = Callable[..., Any]
"""`predict(x, t, duration) -> u`; in improved MeanFlow `predict(x, t, duration, scale, low, high) -> (u, v)`."""
Time: TypeAlias = Float[Array, ""]


class Guidance(NamedTuple):
    """Guidance that improved MeanFlow's network reads: the scale, and the interval of `s` in which it applies."""

    scale: Scalar = 1.0
    low: Scalar = 0.0
    high: Scalar = 1.0

    def applies(self, s: Time) -> Bool[Array, ""]:
        """Whether `s` is in the interval, ends included."""
        return jnp.logical_and(self.low <= s, s <= self.high)


def order_times(first: Time, second: Time, equal: Bool[Array, ""]) -> tuple[Time, Time]:
    """The later and the earlier of two times as `s, r`; both are the later one where `equal`."""
    s = jnp.maximum(first, second)
    return s, jnp.where(equal, s, jnp.minimum(first, second))


def total_derivative(predict: MeanPredict, x: Image, s: Time, r: Time, velocity: Image) -> tuple[Any, Any]:
    """The output at (x, s, r) and its derivative by `s` along `velocity`, with `r` held (Geng et al. 2025a, Eq. 8)."""

    def output(x, s, r):
        return predict(x, TIME_SCALE * s, TIME_SCALE * (s - r))

    return jax.jvp(output, (x, s, r), (velocity, jnp.ones_like(s), jnp.zeros_like(r)))


def adaptive_loss(error: Image, *, power: Scalar = 1.0, floor: Scalar = 0.01) -> dict[str, Float[Array, ""]]:
    """Sum of squares divided by its own constant `power`, as `loss`; and the mean of squares, `mse` (section 4.3).

    At power 1 the loss is near 1 whatever the error, so `mse` shows progress.
    """
    total = jnp.square(error).sum()
    return {"loss": total / jax.lax.stop_gradient(total + floor) ** power, "mse": total / error.size}


@one_example
def training_loss(
    predict: MeanPredict,
    x0: Image,
    s: Time,
    r: Time,
    noise: Image,
    *,
    unconditional: MeanPredict | None = None,
    scale: Scalar = 1.0,
    mixing: Scalar = 0.0,
    interval: tuple[Scalar, Scalar] = (0.0, 1.0),
    power: Scalar = 1.0,
) -> dict[str, Float[Array, ""]]:
    """MeanFlow's loss (Geng et al. 2025a, Algorithm 1), with guidance trained in (Eqs. 19 and 21).

    Inside the `interval` of `s`, the velocity v = noise - x0 of the target becomes
    `scale v + (1 - scale - mixing) v_unconditional + mixing v_conditional`, which amounts to guidance by
    scale / (1 - mixing). For an example that lost its label, give scale 1 and mixing 0. Without `unconditional` there
    is no guidance.
    """
    level = noise_level(s)
    x, velocity = add_noise(level, x0, noise), to_target("velocity", x0, noise, level)
    if unconditional is not None:
        still = jnp.zeros_like(s)
        conditional, free = (each(x, level.time, still) for each in (predict, unconditional))
        guided = scale * velocity + (1 - scale - mixing) * free + mixing * conditional
        velocity = jnp.where(Guidance(scale, *interval).applies(s), guided, velocity)
    u, slope = total_derivative(predict, x, s, r, velocity)
    return adaptive_loss(u - jax.lax.stop_gradient(velocity - (s - r) * slope), power=power)


@one_example
def improved_training_loss(
    predict: MeanPredict,
    labelled: MeanPredict,
    unconditional: MeanPredict,
    x0: Image,
    s: Time,
    r: Time,
    noise: Image,
    guidance: Guidance,
    *,
    dropped: bool | Bool[Array, ""] = False,
    power: Scalar = 1.0,
) -> dict[str, Float[Array, ""]]:
    """Improved MeanFlow's loss (Geng et al. 2025b): the error of u + (s - r) du/ds, plus that of the head v.

    All three networks read the guidance and have two heads, u and v. They differ in the label: `predict` has the one
    left by label dropout (`dropped` if it is the null label), `labelled` the true one, `unconditional` the null label.
    The derivative runs along the velocity that `labelled` predicts, not along the guided one.
    """
    level, still = noise_level(s), jnp.zeros_like(s)
    x, velocity = add_noise(level, x0, noise), to_target("velocity", x0, noise, level)
    scale = jnp.where(guidance.applies(s) | (r == s), jnp.asarray(guidance.scale), 1.0)
    conditional = labelled(x, level.time, still, *Guidance(scale))[1]
    free = unconditional(x, level.time, still, *Guidance(jnp.ones_like(scale)))[1]
    guided = jnp.where(dropped, velocity, velocity + (1 - 1 / scale) * (conditional - free))
    (u, v), (slope, _) = total_derivative(lambda *args: predict(*args, *guidance), x, s, r, conditional)
    guided, slope = jax.lax.stop_gradient((guided, slope))
    first, second = adaptive_loss(u + (s - r) * slope - guided, power=power), adaptive_loss(v - guided, power=power)
    return {"loss": first["loss"] + second["loss"], "mse": first["mse"], "mse_v": second["mse"]}


def power_law_scale(uniform: Float[Array, ""], power: float = 1.0, *, most: float = 8.0) -> Float[Array, ""]:
    """A guidance scale from 1 to `most` of density scale^-power, from a uniform number (Geng et al. 2025b)."""
    if power == 1:
        return most**uniform
    return (1 + uniform * (most ** (1 - power) - 1)) ** (1 / (1 - power))


@one_example
def mean_velocity_step(predict: MeanPredict, schedule: Schedule, x: Image, i: Index, noise: Image) -> Image:
    """One step of any length along the mean velocity: x_r = x_s - (s - r) u (Geng et al. 2025a, Eq. 12).

    For `ditx.diffusion.samplers.sample` and the grids of `flow.uniform_grid`; one of 1 step draws in one evaluation.
    """
    i = jnp.asarray(i)
    length = at(schedule.sigma, i) - jnp.where(i > 0, at(schedule.sigma, i - 1), 0)
    return x - length * predict(x, at(schedule.time, i), TIME_SCALE * length)
