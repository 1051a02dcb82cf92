"""Likelihood of an 8-bit image in [-1, 1], in bits per dimension: two upper bounds of its negative logarithm.

Both read the image through its noised version at the first level of the schedule. From there on, the variational bound
sums over the steps (Ho et al. 2020), and the probability-flow ODE has the density of its samples (Song et al. 2021,
appendix D.2). Both are estimates by drawn noise, to be averaged over images.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion.gaussian import predicted, prior_bpd, q_sample, variational_bound
from ditx.diffusion.parameterization import Image, Predict
from ditx.diffusion.schedule import Index, Schedule, at, level


def variational_bpd(
    schedule: Schedule, predict: Predict, x0: Image, *, key: PRNGKeyArray
) -> dict[str, Float[Array, "..."]]:
    """The variational bound with a fresh draw of x_t at each step: `total` = `prior` + the sum of `terms` (T)."""

    def term(i):
        noise = jax.random.normal(jax.random.fold_in(key, i), x0.shape, x0.dtype)
        return _term(schedule, predict, x0, i, noise)

    terms, prior = jax.lax.map(term, jnp.arange(len(schedule))), prior_bpd(schedule, x0)
    return {"total": terms.sum() + prior, "prior": prior, "terms": terms}


def ode_bpd(schedule: Schedule, predict: Predict, x0: Image, *, key: PRNGKeyArray, probes: int = 1) -> Float[Array, ""]:
    """The bound by the probability-flow ODE: the density of a noised image, and the likelihood of `x0` behind it.

    `probes` random signs estimate the divergence (Hutchinson 1990).
    """
    noise_key, probe_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    signs = jax.random.rademacher(probe_key, (probes, *x0.shape), x0.dtype)
    drawn = norm.logpdf(noise).sum() - x0.size * jnp.log(at(schedule.sigma, 0))
    nats = drawn - ode_log_density(schedule, predict, q_sample(schedule, x0, 0, noise), signs)
    return nats / (x0.size * math.log(2)) + _term(schedule, predict, x0, 0, noise)


def ode_log_density(
    schedule: Schedule, predict: Predict, x: Image, probes: Float[Array, "k h w c"]
) -> Float[Array, ""]:
    """Log density, in nats, of `x` among the states of the probability-flow ODE at the schedule's first level.

    Heun's method leads from there to noise; the divergence on the way is the mean of `probe . J probe` over `probes`,
    of mean 0 and covariance 1 (Grathwohl et al. 2019), by reverse mode, which every attention has.
    """

    def change(x, i, j):
        """What the step from level i to the next changes, judged at level j, and its divergence."""

        def along(x):
            here, there = level(schedule, i), level(schedule, i + 1)
            x0, noise = predicted(schedule, predict, x, j)
            return (there.alpha - here.alpha) * x0 + (there.sigma - here.sigma) * noise

        value, pull = jax.vjp(along, x)
        return value, jax.vmap(lambda probe: jnp.vdot(probe, pull(probe)[0]))(probes).mean()

    def body(carry, i):
        x, total = carry
        first, divergence1 = change(x, i, i)
        second, divergence2 = change(x + first, i, i + 1)
        return (x + (first + second) / 2, total + (divergence1 + divergence2) / 2), None

    start = (x, jnp.zeros((), x.dtype))
    (noise, total), _ = jax.lax.scan(body, start, jnp.arange(len(schedule) - 1))
    return norm.logpdf(noise).sum() + total


def _term(schedule: Schedule, predict: Predict, x0: Image, i: Index, noise: Image) -> Float[Array, ""]:
    x = q_sample(schedule, x0, i, noise)
    return variational_bound(schedule, predict(x, at(schedule.time, i)), x0, x, i)
