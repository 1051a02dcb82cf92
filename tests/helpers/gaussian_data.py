"""Gaussian data of mean MU and deviation S, of which all is known.

The marginal at signal a and noise b is N(a MU, a^2 S^2 + b^2), and the best prediction of noise or of data given x is
linear in x.
"""

import jax
import jax.numpy as jnp

from ditx.diffusion.parameterization import to_target
from ditx.diffusion.samplers import sample
from ditx.diffusion.schedule import at, noise_level

MU, S = 0.7, 0.4


def expected_noise(x, a, b):
    return b * (x - a * MU) / (a**2 * S**2 + b**2)


def expected_data(x, a, b):
    return MU + a * S**2 * (x - a * MU) / (a**2 * S**2 + b**2)


def marginal(schedule, i=-1):
    """Mean and variance of the data at a level of a schedule."""
    a, b = schedule.alpha[i], schedule.sigma[i]
    return a * MU, a**2 * S**2 + b**2


def oracle(schedule, *, variance=False):
    """The best network for that data, which finds its place in the schedule by the time it is fed."""

    def predict(x, t):
        i = jnp.argmin(jnp.abs(jnp.asarray(schedule.time) - t))
        here = noise_level(schedule, i)
        a, b = here.alpha, here.sigma
        prediction = to_target(schedule.prediction, expected_data(x, a, b), expected_noise(x, a, b), here)
        if not variance:
            return prediction
        # The true reverse step is Gaussian: the posterior's variance, and that of the data behind its mean.
        data = S**2 * b**2 / (a**2 * S**2 + b**2)
        log_variance = jnp.log(at(schedule.posterior_variance, i) + at(schedule.posterior_mean_x0, i) ** 2 * data)
        low, high = at(schedule.posterior_log_variance, i), at(schedule.log_beta, i)
        return jnp.concatenate([prediction, jnp.full_like(x, 2 * (log_variance - low) / (high - low) - 1)], -1)

    return predict


def outcome(step, predict, schedule, mean, variance):
    """Exact mean and variance of a sampler that is affine in its start and its noises, from N(mean, variance).

    The pixels of one image are as many runs: from 0, from 1, and from 0 with each of the noises in turn.
    """
    count = len(schedule)
    starts = jnp.zeros((count + 2, 1, 1)).at[1].set(1)
    noises = jnp.concatenate([jnp.zeros((count, 2)), jnp.eye(count)], 1)[:, :, None, None]
    last, _ = jax.jit(lambda: sample(step, predict, schedule, starts, noises=noises))()
    offset, slopes = last[0, 0, 0], last[1:, 0, 0] - last[0, 0, 0]
    return offset + slopes[0] * mean, slopes[0] ** 2 * variance + jnp.square(slopes[1:]).sum()
