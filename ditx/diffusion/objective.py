"""Training objectives by name: the path from data to noise, the prediction, and the weights of the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from ditx.checks import check_choice, check_names
from ditx.diffusion import flow, gaussian, loss_weights, meanflow
from ditx.diffusion.parameterization import Prediction
from ditx.diffusion.schedule import Schedule, Spacing, at, cosine_schedule, linear_schedule, respace, sampling_grid

Terms: TypeAlias = dict[str, Float[Array, "..."]]
Objective: TypeAlias = Callable[..., Terms]
"""`objective(predict, x0, key) -> terms`: the loss of one example, `terms["loss"]`, and its parts.

An objective with a fourth argument `unconditional` also gets the network with the null label (None if it has none), and
in a fifth, `dropped`, whether this example lost its label.
"""
BINS = 10


@dataclass(frozen=True)
class ObjectiveConfig:
    """A training objective. Samplers need the schedule, the prediction and `flow_shift`; losses need all of it."""

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    """path from data to noise: the paper's (linear), Nichol and Dhariwal's (cosine), or the straight line of flow
    matching (flow, with --model.no-learn-sigma)"""
    prediction: Literal["eps", "x0", "v", "velocity", "mean-velocity"] = "eps"
    """output of the network: the noise (eps, the paper's), the data (x0), v, or the velocity, which is v on the first
    two schedules; the loss of flow is the error of the velocity that the output implies. mean-velocity (MeanFlow, flow
    only) samples in 1 to 4 steps"""
    loss_weight: Literal["none", "min-snr", "sigmoid"] = "none"
    """linear and cosine only: weight the squared error of the noise by log-SNR; none is the plain squared error of the
    prediction"""
    flow_times: Literal["uniform"] | tuple[float, float] = (0.0, 1.0)
    """flow only: distribution of the training times, uniform or logit-normal with this mean and standard deviation; a
    higher mean gives more noise"""
    flow_shift: float = 1.0
    """flow only: factor on sigma / alpha that moves training times and sampling steps towards the noise"""
    mean_equal: float = 0.75
    """prediction mean-velocity: share of the examples with r = t, which train the velocity"""
    mean_guidance: tuple[float, float] = (1.0, 0.0)
    """prediction mean-velocity: guidance scale and kappa that are trained in; 1 and 0 are none"""

    @property
    def is_flow(self) -> bool:
        """Whether the path is the straight line of flow matching."""
        return self.schedule == "flow"

    @property
    def is_mean(self) -> bool:
        """Whether the network predicts mean velocities."""
        return self.prediction == "mean-velocity"

    @property
    def instantaneous(self) -> Prediction:
        """The prediction of the network for a single time: a mean velocity over no time is the velocity."""
        return "velocity" if self.prediction == "mean-velocity" else self.prediction

    def check(self, learn_sigma: bool) -> None:
        """Raise ValueError if the fields do not fit each other, or a network that predicts the variance or not."""
        check_names(self)
        if isinstance(self.flow_times, str):
            check_choice("flow_times", self.flow_times, ("uniform", "a mean and a standard deviation"))
        if self.is_flow and learn_sigma:
            raise ValueError("schedule flow trains no variance; add --model.no-learn-sigma")
        if self.is_flow and self.loss_weight != "none":
            raise ValueError(
                f"loss_weight is {self.loss_weight}, but schedule flow weights times by how often they are drawn; see"
                " --flow-times"
            )
        if self.is_mean and not self.is_flow:
            raise ValueError(f"prediction mean-velocity has no schedule {self.schedule}; use --schedule flow")
        if not 0 <= self.mean_equal <= 1:
            raise ValueError(f"mean_equal is {self.mean_equal}; give a share from 0 to 1")
        if not self.mean_guidance[1] < 1:
            raise ValueError(f"mean_guidance has a kappa of {self.mean_guidance[1]}; give less than 1, 0 for none")
        if not self.flow_shift > 0:
            raise ValueError(f"flow_shift is {self.flow_shift}; give a number above 0, 1 for none")
        if self.flow_times != "uniform" and not self.flow_times[1] >= 0:
            raise ValueError(f"flow_times has a standard deviation of {self.flow_times[1]}; it must not be negative")

    def sampler_grid(self, steps: int = 1000, spacing: Spacing = "time") -> Schedule:
        """The noise levels of a sampler; 1000 steps equal in time are the levels of training."""
        prediction = self.instantaneous
        if self.is_flow and spacing == "time":
            return flow.uniform_grid(steps, shift=self.flow_shift, prediction=prediction)
        if self.is_flow:
            return sampling_grid(flow.uniform_grid(1000, prediction=prediction), steps, spacing)
        whole = (linear_schedule if self.schedule == "linear" else cosine_schedule)(prediction=prediction)
        return respace(whole, steps) if spacing == "time" else sampling_grid(whole, steps, spacing)


def make_objective(config: ObjectiveConfig) -> Objective:
    """The loss at a random time.

    Among the terms is `by_time` (2, BINS): for equal ranges of time, data first, 1 and the loss in the range of the
    drawn time, 0 elsewhere. Sums over examples give the mean loss of each range.
    """
    if config.is_mean:
        return partial(_mean_objective, config)
    schedule = config.sampler_grid()

    def objective(predict, x0, key):
        time_key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x0.shape)
        if config.is_flow:
            s = _draw_flow_time(config, time_key)
            return _with_bins(flow.training_loss(predict, x0, s, noise, prediction=config.instantaneous), BINS * s)
        i, weight = jax.random.randint(time_key, (), 0, len(schedule)), None
        if config.loss_weight == "min-snr":
            weight = loss_weights.min_snr(at(schedule.log_snr, i))
        elif config.loss_weight == "sigmoid":
            weight = loss_weights.sigmoid(at(schedule.log_snr, i)) * loss_weights.log_snr_decay(schedule, i)
        terms = gaussian.training_loss(schedule, predict, x0, i, noise, weight=weight)
        return _with_bins(terms, BINS * i // len(schedule))

    return objective


def _mean_objective(config: ObjectiveConfig, predict, x0, key, unconditional, dropped):
    """MeanFlow's loss; a label that is dropped trains without guidance."""
    time_key, other_key, equal_key, noise_key = jax.random.split(key, 4)
    first, second = (_draw_flow_time(config, each) for each in (time_key, other_key))
    s, r = meanflow.order_times(first, second, jax.random.bernoulli(equal_key, config.mean_equal))
    noise, guidance = jax.random.normal(noise_key, x0.shape), {}
    if config.mean_guidance != (1, 0):
        scale, mixing = (jnp.where(dropped, *pair) for pair in zip((1.0, 0.0), config.mean_guidance, strict=True))
        guidance = {"unconditional": unconditional, "scale": scale, "mixing": mixing}
    return _with_bins(meanflow.training_loss(predict, x0, s, r, noise, **guidance), BINS * s)


def _draw_flow_time(config: ObjectiveConfig, key: PRNGKeyArray) -> Float[Array, ""]:
    times = config.flow_times
    s = jax.random.uniform(key) if times == "uniform" else flow.logit_normal(*times, key=key)
    return flow.shifted(s, config.flow_shift)


def _with_bins(terms: Terms, place: Real[Array, ""]) -> Terms:
    drawn = jax.nn.one_hot(jnp.minimum(place, BINS - 1).astype(int), BINS)
    return terms | {"by_time": jnp.stack([drawn, drawn * terms["loss"]])}
