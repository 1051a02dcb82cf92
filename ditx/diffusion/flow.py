"""Flow matching on the straight path between data and noise (Lipman et al. 2023; Liu et al. 2023).

`s` runs from 0 at the data to 1 at the noise: x_s = (1 - s) x_0 + s noise, with velocity dx/ds = noise - x_0. The
network is fed 1000 s, in the units of the schedules of `ditx.diffusion.schedule`, and predicts the velocity.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion.gaussian import split_variance
from ditx.diffusion.parameterization import Image, NoiseLevel, Predict, Prediction, add_noise, loss_ratio, to_target
from ditx.diffusion.schedule import Schedule, from_levels

TIME_SCALE = 1000
Times = TypeVar("Times", Float[Array, ""], Float[np.ndarray, " T"])


def level(s: Float[Array, ""]) -> NoiseLevel:
    """The level of noise at `s`."""
    one = jnp.ones_like(s)
    return NoiseLevel(TIME_SCALE * s, 1 - s, s, -one, one)


def uniform_grid(steps: int, *, shift: float = 1.0, prediction: Prediction = "velocity") -> Schedule:
    """`steps` equal steps in time from noise to data; a `shift` then moves the levels, as `shifted` does.

    The noise says nothing of the data at pure noise: for such predictions (eps, score) the first level is at s = 0.999,
    as in SiT (Ma et al. 2024). Raises ValueError below one step, and for a shift that is not above 0.
    """
    if steps < 1:
        raise ValueError(f"cannot sample in {steps} steps; give at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; give a number above 0, 1 for none")
    s = shifted(np.linspace(0, 0.999 if prediction in ("eps", "score") else 1, steps + 1)[1:], shift)
    return from_levels(TIME_SCALE * s, 1 - s, s, path="linear", prediction=prediction)


def logit_normal(mean: float = 0.0, std: float = 1.0, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Draw `s` as the sigmoid of a normal variable, which favours its middle (Esser et al. 2024, section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key))


def shifted(s: Times, shift: float) -> Times:
    """Move `s` towards the noise, for larger images: sigma / alpha grows `shift` times (Esser et al. 2024, Eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def training_loss(
    predict: Predict,
    x0: Image,
    s: Float[Array, ""],
    noise: Image,
    *,
    prediction: Prediction = "velocity",
    floor: float = 0.05,
) -> dict[str, Float[Array, ""]]:
    """Mean squared error of the velocity at `s` (Lipman et al. 2023, Eq. 14 for the straight path).

    A network that predicts something else, as the data, is held to the velocity which that means; of the data, this
    divides its error by `s`, or by `floor` where `s` is less (Li and He 2025).
    """
    here = level(s)
    x = add_noise(here, x0, noise)
    predicted, _ = split_variance(predict(x, here.time), x)
    error = jnp.square(predicted - to_target(prediction, x0, noise, here)).mean()
    return {"loss": loss_ratio(prediction, "velocity", here, floor=floor) * error}
