"""The paper's diffusion on a discrete schedule: noise prediction and a learned variance.

Ho et al. 2020 (noise prediction), Nichol and Dhariwal 2021 (variance between two bounds). The schedule's `prediction`
names the output of the network: the noise in the paper. Steps `i` are indices into the schedule.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ditx.diffusion.parameterization import (
    Image,
    Predict,
    Scalar,
    add_noise,
    loss_ratio,
    one_example,
    to_target,
    to_x0_eps,
)
from ditx.diffusion.schedule import Index, Schedule, at, noise_level


class Gaussian(NamedTuple):
    """A diagonal Gaussian over x_{t-1}, and the x_0 behind its mean."""

    mean: Float[Array, "h w c"]
    log_variance: Float[Array, "h w c"]
    x0: Float[Array, "h w c"]


@one_example
def q_sample(schedule: Schedule, x0: Image, i: Index, noise: Image) -> Image:
    """Draw x_t given x_0 with the standard normal `noise` (Ho et al. 2020, Eq. 4)."""
    return add_noise(noise_level(schedule, i), x0, noise)


@one_example
def predict_x0_eps(schedule: Schedule, predict: Predict, x: Image, i: Index) -> tuple[Image, Image]:
    """A network's prediction for `x` at step `i`, as data and noise."""
    prediction, _ = split_variance(predict(x, at(schedule.time, i)), x)
    return to_x0_eps(prediction, schedule.prediction, x, noise_level(schedule, i))


@one_example
def posterior(schedule: Schedule, x0: Image, x: Image, i: Index) -> Gaussian:
    """q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eqs. 6 and 7)."""
    mean = at(schedule.posterior_mean_x0, i) * x0 + at(schedule.posterior_mean_xt, i) * x
    return Gaussian(mean, jnp.full_like(x, at(schedule.posterior_log_variance, i)), x0)


@one_example
def p_mean_variance(schedule: Schedule, output: Float[Array, "h w o"], x: Image, i: Index) -> Gaussian:
    """p(x_{t-1} | x_t) from the network's output: the prediction, and the variance if there are twice the channels.

    The variance channels interpolate the log variance between the posterior's (at -1) and log beta (at 1), without
    clamping (Nichol and Dhariwal 2021, Eq. 15). Without these channels, and for flows, which do not train the variance,
    the log variance is the posterior's.
    """
    prediction, fraction = split_variance(output, x)
    x0, _ = to_x0_eps(prediction, schedule.prediction, x, noise_level(schedule, i))
    gaussian = posterior(schedule, x0, x, i)
    if fraction is None or schedule.path == "linear":
        return gaussian
    upper = (fraction + 1) / 2
    log_variance = upper * at(schedule.log_beta, i) + (1 - upper) * at(schedule.posterior_log_variance, i)
    return gaussian._replace(log_variance=log_variance)


def split_variance(output: Float[Array, "h w o"], x: Image) -> tuple[Image, Image | None]:
    """Prediction and variance channels (None if absent) of an output. Raises ValueError for other channel counts."""
    channels = x.shape[-1]
    if output.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"the output has shape {output.shape} and the input {x.shape}; only channels may differ")
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] == 2 * channels:
        return output[..., :channels], output[..., channels:]
    raise ValueError(f"the output has {output.shape[-1]} channels and the input {channels}; give as many or twice")


@one_example
def variational_bound(
    schedule: Schedule, output: Float[Array, "h w o"], x0: Image, x: Image, i: Index
) -> Float[Array, ""]:
    """Step `i`'s term of the variational bound, in bits per dimension (Ho et al. 2020, Eq. 5).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). At the first step it is the negative log likelihood of `x0` as an
    8-bit image in [-1, 1], in bins of width 2/255.
    """
    true, model = posterior(schedule, x0, x, i), p_mean_variance(schedule, output, x, i)
    kl = normal_kl(true.mean, true.log_variance, model.mean, model.log_variance)
    likelihood = discretized_log_likelihood(x0, model.mean, model.log_variance / 2)
    return jnp.where(jnp.asarray(i) == 0, -likelihood.mean(), kl.mean()) / math.log(2)


@one_example
def prior_bpd(schedule: Schedule, x0: Image) -> Float[Array, ""]:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension: the constant term of the bound."""
    mean = at(schedule.alpha, -1) * x0
    log_variance = jnp.full_like(x0, 2 * jnp.log(at(schedule.sigma, -1)))
    return normal_kl(mean, log_variance, jnp.zeros_like(x0), jnp.zeros_like(x0)).mean() / math.log(2)


@one_example
def training_loss(
    schedule: Schedule, predict: Predict, x0: Image, i: Index, noise: Image, *, weight: Scalar | None = None
) -> dict[str, Float[Array, ""]]:
    """The paper's loss at step `i`: `loss` = `mse` of the prediction + `vb`, the bound's term in bits per dimension.

    The bound trains only the variance: the prediction inside it is held constant (Nichol and Dhariwal 2021, section
    3.1). It is not scaled by the number of steps. Flows and networks without variance channels have no `vb`. With a
    `weight`, `loss` contains `weight` times the squared error of the noise instead of `mse`, whatever the network
    predicts.
    """
    level = noise_level(schedule, i)
    x = add_noise(level, x0, noise)
    output = predict(x, level.time)
    prediction, fraction = split_variance(output, x)
    mse = jnp.square(prediction - to_target(schedule.prediction, x0, noise, level)).mean()
    error = mse if weight is None else jnp.asarray(weight) * loss_ratio(schedule.prediction, "eps", level) * mse
    if fraction is None or schedule.path == "linear":
        return {"loss": error, "mse": mse}
    frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), fraction], -1)
    vb = variational_bound(schedule, frozen, x0, x, i)
    return {"loss": error + vb, "mse": mse, "vb": vb}


def normal_kl(mean1: Image, log_variance1: Image, mean2: Image, log_variance2: Image) -> Image:
    """KL(N(mean1, exp log_variance1) || N(mean2, exp log_variance2)) entry by entry, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (jnp.exp(difference) - 1 - difference + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def discretized_log_likelihood(x: Image, mean: Image, log_std: Image) -> Image:
    """Log probability, in nats, of the bin of width 2/255 around each entry of `x`; the bins at -1 and 1 are open.

    Ho et al. 2020, Eq. 13. The normal distribution function has the tanh form (Page 1977) that the released models were
    trained with; probabilities are at least 1e-12.
    """
    inverse_std = jnp.exp(-log_std)
    above = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    below = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: Image) -> Image:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
