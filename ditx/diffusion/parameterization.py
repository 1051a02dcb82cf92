"""Predictions of a network (noise, data, v, score, velocity) as linear maps of each other.

A noised image is `x = alpha x0 + sigma noise`, and every prediction is another weighted sum of `x0` and `noise`. From
`x` and any one prediction, two linear equations give both.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from ditx.checks import check_choice, check_example

Predict: TypeAlias = Callable[[Float[Array, "h w c"], Float[Array, ""]], Float[Array, "h w o"]]
Image: TypeAlias = Float[Array, "h w c"]
Scalar: TypeAlias = int | float | np.floating | np.integer | Real[Array | np.ndarray, ""]
Prediction: TypeAlias = Literal["eps", "x0", "v", "score", "velocity"]
"""The noise (Ho et al. 2020); the data; alpha noise - sigma x0 (Salimans and Ho 2022, section 4); the gradient of the
log density, -noise / sigma (Song et al. 2021, section 3.3); dx/dt along the path (Lipman et al. 2023)."""


P = ParamSpec("P")
R = TypeVar("R")


def one_example(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a function of one image in float32 at least, and return images in the dtype of the first one.

    Tables and levels get the same dtype, and networks see images of their own. Scalar results, such as losses, stay
    wide. Raises ValueError for a batch.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        images = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Array | np.ndarray) and arg.ndim > 2]
        check_example(3, **{f"image {number}": image for number, image in enumerate(images, 1)})
        if not images:
            return function(*args, **kwargs)
        dtype = jnp.result_type(images[0])
        wide = jnp.promote_types(dtype, jnp.float32)

        def cast(leaf: Any) -> Any:
            if callable(leaf):
                predict: Any = leaf
                widen = functools.partial(jax.tree.map, lambda output: output.astype(wide))
                return lambda x, *times: widen(predict(x.astype(dtype), *times))
            floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(wide) if floating else leaf

        args, kwargs = jax.tree.map(cast, (args, kwargs), is_leaf=callable)
        result: Any = function(*args, **kwargs)
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 2 else leaf, result)

    return wrapped


class NoiseLevel(NamedTuple):
    """Signal and noise at one time; the rates are derivatives by the time that defines the velocity."""

    time: Float[Array, ""]
    """time that the network reads"""
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    alpha_rate: Float[Array, ""]
    sigma_rate: Float[Array, ""]


@one_example
def add_noise(level: NoiseLevel, x0: Image, noise: Image) -> Image:
    """The noised image, alpha x0 + sigma noise."""
    return level.alpha * x0 + level.sigma * noise


@one_example
def to_target(kind: Prediction, x0: Image, noise: Image, level: NoiseLevel) -> Image:
    """The prediction of this kind for known data and noise: the training target."""
    x0_weight, noise_weight = _weights(kind, level)
    return x0_weight * x0 + noise_weight * noise


@one_example
def to_x0_eps(prediction: Image, kind: Prediction, x: Image, level: NoiseLevel) -> tuple[Image, Image]:
    """Data and noise from a prediction and `x`; the inverse of `to_target` and `add_noise` together.

    Not finite where the two equations are one: from the noise at `alpha` 0, and from the data at `sigma` 0.
    """
    x0_weight, noise_weight = _weights(kind, level)
    determinant = _determinant(kind, level)
    x0 = (noise_weight * x - level.sigma * prediction) / determinant
    return x0, (level.alpha * prediction - x0_weight * x) / determinant


def convert(prediction: Image, x: Image, level: NoiseLevel, *, source: Prediction, target: Prediction) -> Image:
    """The prediction of kind `target` that a prediction of kind `source` for the image `x` implies."""
    return to_target(target, *to_x0_eps(prediction, source, x, level), level)


def loss_ratio(source: Prediction, target: Prediction, level: NoiseLevel, *, floor: Scalar = 0.0) -> Float[Array, ""]:
    """Squared error measured in `target` divided by squared error measured in `source`, for the same prediction.

    `floor` bounds the divisor from below, for ratios that are infinite at one end.
    """
    return jnp.square(_determinant(target, level) / jnp.maximum(jnp.abs(_determinant(source, level)), floor))


def _weights(kind: Prediction, level: NoiseLevel) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weights of the data and of the noise in a prediction."""
    check_choice("prediction", kind, get_args(Prediction))
    check_example(0, time=level.time, alpha=level.alpha)
    zero, one = jnp.zeros_like(level.alpha), jnp.ones_like(level.alpha)
    return {
        "eps": (zero, one),
        "x0": (one, zero),
        "v": (-level.sigma, level.alpha),
        "score": (zero, -1 / level.sigma),
        "velocity": (level.alpha_rate, level.sigma_rate),
    }[kind]


def _determinant(kind: Prediction, level: NoiseLevel) -> Float[Array, ""]:
    x0_weight, noise_weight = _weights(kind, level)
    return level.alpha * noise_weight - level.sigma * x0_weight
