"""Weights of the loss by the level of noise, as functions of log-SNR.

All are weights of the squared error of the noise; `ditx.diffusion.parameterization.loss_ratio` brings them to any other
prediction. They are for steps of a schedule: flows are weighted by how often a time is drawn, and by nothing else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ditx.diffusion.schedule import Index, Schedule


def min_snr(log_snr: Float[Array, ""], gamma: float = 5.0) -> Float[Array, ""]:
    """1, but where there is little noise, `gamma / SNR` (Hang et al. 2023, section 3.4)."""
    return jnp.minimum(1, gamma * jnp.exp(-log_snr))


def sigmoid(log_snr: Float[Array, ""], bias: float = 0.0) -> Float[Array, ""]:
    """The sigmoid of `bias - log_snr` (Kingma and Gao 2023; Hoogeboom et al. 2024), for integrals over log-SNR.

    Where it is time that is drawn evenly, multiply it by `log_snr_fall`.
    """
    return jax.nn.sigmoid(bias - log_snr)


def log_snr_fall(schedule: Schedule, i: Index) -> Float[Array, ""]:
    """By how much log-SNR falls from data to noise per unit of time, of which the whole schedule is one."""
    return -len(schedule) * jnp.gradient(jnp.asarray(schedule.log_snr))[i]
