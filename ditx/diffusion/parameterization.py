"""What networks predict of a noised image, and how one prediction becomes another.

Every noised image is `x = alpha x0 + sigma noise`, and every prediction is another weighted sum of the same two, so
that `x` and any one prediction tell both: two equations in two unknowns.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

Predict: TypeAlias = Callable[[Float[Array, "h w c"], Float[Array, ""]], Float[Array, "h w o"]]
Image: TypeAlias = Float[Array, "h w c"]
Prediction: TypeAlias = Literal["eps", "x0", "v", "score", "velocity"]
"""The noise (Ho et al. 2020); the data; alpha noise - sigma x0 (Salimans and Ho 2022, section 4); the gradient of the
log density, -noise / sigma (Song et al. 2021, section 3.3); dx/dt along the path (Lipman et al. 2023)."""


class NoiseLevel(NamedTuple):
    """One level of noise; the rates are the derivatives of `alpha` and `sigma` by the time that velocities mean."""

    time: Float[Array, ""]
    """what the network is fed"""
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    alpha_rate: Float[Array, ""]
    sigma_rate: Float[Array, ""]


def add_noise(level: NoiseLevel, x0: Image, noise: Image) -> Image:
    """The image at a level of noise."""
    return level.alpha * x0 + level.sigma * noise


def to_target(kind: Prediction, x0: Image, noise: Image, level: NoiseLevel) -> Image:
    """The prediction that means this data and this noise: what a network learns."""
    of_x0, of_noise = _weights(kind, level)
    return of_x0 * x0 + of_noise * noise


def to_x0_eps(prediction: Image, kind: Prediction, x: Image, level: NoiseLevel) -> tuple[Image, Image]:
    """The data and the noise that a prediction means; the inverse of `compose` and `noised` together.

    Not finite where the prediction tells nothing of one of them: of the data, the noise at `alpha` 0; of the noise,
    the data at `sigma` 0.
    """
    of_x0, of_noise = _weights(kind, level)
    determinant = _determinant(kind, level)
    x0 = (of_noise * x - level.sigma * prediction) / determinant
    return x0, (level.alpha * prediction - of_x0 * x) / determinant


def convert(prediction: Image, x: Image, level: NoiseLevel, *, source: Prediction, target: Prediction) -> Image:
    """A prediction of one kind as one of another, for the image `x` at `level`."""
    return to_target(target, *to_x0_eps(prediction, source, x, level), level)


def loss_ratio(source: Prediction, target: Prediction, level: NoiseLevel, *, floor: float = 0.0) -> Float[Array, ""]:
    """How many times the squared error of `source` that of `target` is, since the error in `x` is none.

    `floor` bounds the divisor from below, for ratios that are infinite at one end.
    """
    return jnp.square(_determinant(target, level) / jnp.maximum(jnp.abs(_determinant(source, level)), floor))


def _weights(kind: Prediction, level: NoiseLevel) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weights of the data and of the noise in a prediction."""
    zero, one = jnp.zeros_like(level.alpha), jnp.ones_like(level.alpha)
    return {
        "eps": (zero, one),
        "x0": (one, zero),
        "v": (-level.sigma, level.alpha),
        "score": (zero, -1 / level.sigma),
        "velocity": (level.alpha_rate, level.sigma_rate),
    }[kind]


def _determinant(kind: Prediction, level: NoiseLevel) -> Float[Array, ""]:
    of_x0, of_noise = _weights(kind, level)
    return level.alpha * of_noise - level.sigma * of_x0
