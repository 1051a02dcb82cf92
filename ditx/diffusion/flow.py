"""Flow matching on the straight path between data and noise (Lipman et al. 2023; Liu et al. 2023).

`s` runs from 0 at the data to 1 at the noise: x_s = (1 - s) x_0 + s noise, with velocity dx/ds = noise - x_0. The
network reads 1000 s, the unit of `ditx.diffusion.schedule`, and predicts the velocity or any other prediction.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.checks import check_example
from ditx.diffusion.gaussian import split_variance
from ditx.diffusion.parameterization import (
    Image,
    NoiseLevel,
    Predict,
    Prediction,
    Scalar,
    add_noise,
    loss_ratio,
    one_example,
    to_target,
)
from ditx.diffusion.schedule import Schedule, from_levels

TIME_SCALE = 1000
Times = TypeVar("Times", Float[Array, ""], Float[np.ndarray, " T"])


def noise_level(s: Float[Array, ""]) -> NoiseLevel:
    """The noise level at `s`."""
    check_example(0, s=s)
    one = jnp.ones_like(s)
    return NoiseLevel(TIME_SCALE * s, 1 - s, s, -one, one)


def uniform_grid(steps: int | np.integer, *, shift: Scalar = 1.0, prediction: Prediction = "velocity") -> Schedule:
    """`steps` steps equal in time from noise to data, moved towards the noise by `shift` (see `shifted`).

    For eps and score the first level is at s = 0.999, as in SiT (Ma et al. 2024): at pure noise they do not determine
    the data. Raises ValueError below one step, and for a shift that is not above 0.
    """
    if steps < 1:
        raise ValueError(f"cannot sample in {steps} steps; give at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; give a number above 0, 1 for none")
    first = 0.999 if prediction in ("eps", "score") else 1
    s = shifted(np.linspace(0, first, steps + 1)[1:], shift)
    return from_levels(TIME_SCALE * s, 1 - s, s, path="linear", prediction=prediction)


def logit_normal(mean: Scalar = 0.0, std: Scalar = 1.0, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Draw `s` as the sigmoid of a normal variable, most often near the middle (Esser et al. 2024, section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key))


def shifted(s: Times, shift: Any) -> Times:
    """Multiply sigma / alpha by `shift`: more noise, for larger images (Esser et al. 2024, Eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


@one_example
def training_loss(
    predict: Predict,
    x0: Image,
    s: Float[Array, ""],
    noise: Image,
    *,
    prediction: Prediction = "velocity",
    floor: Scalar = 0.05,
) -> dict[str, Float[Array, ""]]:
    """Mean squared error of the velocity at `s` (Lipman et al. 2023, Eq. 14 for the straight path).

    Of another prediction, the loss is the error of the velocity that it implies. This divides the error of the data by
    `s`, and the error of the noise by 1 - s; `floor` bounds the divisor from below (Li and He 2025).
    """
    level = noise_level(s)
    x = add_noise(level, x0, noise)
    output, _ = split_variance(predict(x, level.time), x)
    error = jnp.square(output - to_target(prediction, x0, noise, level)).mean()
    return {"loss": loss_ratio(prediction, "velocity", level, floor=floor) * error}
