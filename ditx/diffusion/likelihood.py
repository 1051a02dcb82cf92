"""Likelihood of an 8-bit image in [-1, 1] in bits per dimension: two upper bounds of its negative logarithm.

Both see the image through its noised version at the schedule's first level. For the rest of the way, the variational
bound sums over the steps (Ho et al. 2020), and the probability-flow ODE gives the density of its samples (Song et al.
2021, appendix D.2). Both are Monte Carlo estimates; average them over images.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.checks import check_example
from ditx.diffusion.gaussian import predict_x0_eps, prior_bpd, q_sample, variational_bound
from ditx.diffusion.parameterization import Image, Predict, one_example
from ditx.diffusion.schedule import Index, Schedule, at


@one_example
def variational_bpd(
    schedule: Schedule, predict: Predict, x0: Image, *, key: PRNGKeyArray
) -> dict[str, Float[Array, "..."]]:
    """The variational bound with new noise at each step: `total` = `prior` + the sum of `terms` (T)."""

    def term(i):
        noise = jax.random.normal(jax.random.fold_in(key, i), x0.shape, x0.dtype)
        return _term(schedule, predict, x0, i, noise)

    terms, prior = jax.lax.map(term, jnp.arange(len(schedule))), prior_bpd(schedule, x0)
    return {"total": terms.sum() + prior, "prior": prior, "terms": terms}


@one_example
def ode_bpd(schedule: Schedule, predict: Predict, x0: Image, *, key: PRNGKeyArray, probes: int = 1) -> Float[Array, ""]:
    """The bound by the probability-flow ODE: density of a noised image, and likelihood of `x0` given that image.

    `probes` random sign vectors estimate the divergence (Hutchinson 1990).
    """
    noise_key, probe_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    signs = jax.random.rademacher(probe_key, (probes, *x0.shape), x0.dtype)
    noising = norm.logpdf(noise).sum() - x0.size * jnp.log(at(schedule.sigma, 0))
    nats = noising - ode_log_density(schedule, predict, q_sample(schedule, x0, 0, noise), signs)
    return nats / (x0.size * math.log(2)) + _term(schedule, predict, x0, 0, noise)


def ode_log_density(
    schedule: Schedule, predict: Predict, x: Image, probes: Float[Array, "k h w c"]
) -> Float[Array, ""]:
    """Log density, in nats, of `x` at the schedule's first level under the probability-flow ODE.

    Integrates from `x` to noise by Heun's method. The divergence is the mean of `probe . J probe` over `probes` of mean
    0 and covariance 1 (Grathwohl et al. 2019), in reverse mode, which every attention kernel has.
    """
    check_example(4, probes=probes)
    return _ode_log_density(schedule, predict, x, [probes])


@one_example
def _ode_log_density(schedule, predict, x, stacked):
    (probes,) = stacked  # not an image, in a list

    def change(x, i, j):
        """Change of x from level i to level i + 1, with the prediction of level j, and its divergence."""

        def displacement(x):
            x0, noise = predict_x0_eps(schedule, predict, x, j)
            alpha_change, sigma_change = (at(table, i + 1) - at(table, i) for table in (schedule.alpha, schedule.sigma))
            return alpha_change * x0 + sigma_change * noise

        value, pullback = jax.vjp(displacement, x)
        return value, jax.vmap(lambda probe: jnp.vdot(probe, pullback(probe)[0]))(probes).mean()

    def body(carry, i):
        x, total = carry
        first, divergence1 = change(x, i, i)
        second, divergence2 = change(x + first, i, i + 1)
        return (x + (first + second) / 2, total + (divergence1 + divergence2) / 2), None

    start = (x, jnp.zeros_like(x[0, 0, 0]))  # with the sharding of x on Explicit axes
    (noise, total), _ = jax.lax.scan(body, start, jnp.arange(len(schedule) - 1))
    return norm.logpdf(noise).sum() + total


def _term(schedule: Schedule, predict: Predict, x0: Image, i: Index, noise: Image) -> Float[Array, ""]:
    x = q_sample(schedule, x0, i, noise)
    return variational_bound(schedule, predict(x, at(schedule.time, i)), x0, x, i)
