"""Flow matching on the straight path between data and noise (Lipman et al. 2023; Liu et al. 2023).

`s` runs from 0 at the data to 1 at the noise: x_s = (1 - s) x_0 + s noise, with velocity dx/ds = noise - x_0. The
network is fed 1000 s, in the units of the schedules of `ditx.diffusion.schedule`, and predicts the velocity.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion.gaussian import Image, Predict
from ditx.diffusion.schedule import Table

TIME_SCALE = 1000


class FlowGrid(eqx.Module):
    """The steps of a sampler through `s`, index 0 next to the data: step i leads from `start[i]` to `end[i]`."""

    start: Table
    end: Table

    def __len__(self) -> int:
        return self.start.shape[0]


def uniform_grid(steps: int) -> FlowGrid:
    """`steps` equal steps from noise to data. Raises ValueError below one step."""
    if steps < 1:
        raise ValueError(f"cannot sample in {steps} steps; give at least 1")
    edges = np.linspace(0, 1, steps + 1)
    return FlowGrid(start=edges[1:], end=edges[:-1])


def interpolate(x0: Image, s: Float[Array, ""], noise: Image) -> Image:
    """The point at `s` on the straight path from `x0` to `noise`."""
    return (1 - s) * x0 + s * noise


def logit_normal(mean: float = 0.0, std: float = 1.0, *, key: PRNGKeyArray) -> Float[Array, ""]:
    """Draw `s` as the sigmoid of a normal variable, which favours its middle (Esser et al. 2024, section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key))


def training_loss(predict: Predict, x0: Image, s: Float[Array, ""], noise: Image) -> dict[str, Float[Array, ""]]:
    """Mean squared error of the velocity at `s` (Lipman et al. 2023, Eq. 14 for the straight path)."""
    velocity = predict(interpolate(x0, s, noise), TIME_SCALE * s)
    return {"loss": jnp.square(velocity - (noise - x0)).mean()}
