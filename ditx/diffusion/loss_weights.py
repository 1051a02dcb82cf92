"""Weights of the loss as functions of log-SNR, for the schedules with steps.

All weight the squared error of the noise; `ditx.diffusion.parameterization.loss_ratio` converts it to that of any other
prediction. Flows are weighted only by the distribution of their training times.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ditx.diffusion.parameterization import Scalar
from ditx.diffusion.schedule import Index, Schedule, at


def min_snr(log_snr: Float[Array, ""], gamma: Scalar = 5.0) -> Float[Array, ""]:
    """min(1, gamma / SNR) (Hang et al. 2023, section 3.4)."""
    return jnp.minimum(1, gamma * jnp.exp(-log_snr))


def sigmoid(log_snr: Float[Array, ""], bias: Scalar = 0.0) -> Float[Array, ""]:
    """The sigmoid of `bias - log_snr`, for integrals over log-SNR (Kingma and Gao 2023; Hoogeboom et al. 2024).

    If times are drawn uniformly, multiply it by `log_snr_decay`.
    """
    return jax.nn.sigmoid(bias - log_snr)


def log_snr_decay(schedule: Schedule, i: Index) -> Float[Array, ""]:
    """-d log-SNR / dt at step `i`, in units of time in which the whole schedule lasts 1."""
    return -len(schedule) * at(jnp.asarray(jnp.gradient(jnp.asarray(schedule.log_snr))), i)
