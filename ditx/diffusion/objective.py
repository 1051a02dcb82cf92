"""What a network is trained for, by names: its objective, its path between data and noise, and the weights of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.diffusion import flow, gaussian, loss_weights
from ditx.diffusion.parameterization import Image, Predict
from ditx.diffusion.schedule import Schedule, Spacing, at, cosine_schedule, linear_schedule, respace, sampling_grid
from ditx.nn.dit import DiTConfig

Terms: TypeAlias = dict[str, Float[Array, "..."]]
Objective: TypeAlias = Callable[[Predict, Image, PRNGKeyArray], Terms]
"""The loss of one example, `terms["loss"]`, and its parts; the key is for time and noise."""
ObjectiveName: TypeAlias = Literal["eps", "x0", "v", "flow", "sit"]
BINS = 10


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a network is trained for. Whoever draws from it must know all but how times are drawn and weighed."""

    objective: ObjectiveName = "eps"
    """what is predicted: on the paper's path, the noise (eps, the paper's), the data (x0), or v; on the straight path
    of flow matching, the velocity (flow, with --model.no-learn-sigma), or that in SiT's conventions (sit)"""
    schedule: Literal["linear", "cosine"] = "linear"
    """eps, x0 and v alone: the paper's schedule, or Nichol and Dhariwal's cosine"""
    weighting: Literal["none", "min-snr", "sigmoid"] = "none"
    """eps, x0 and v alone: weights of the noise's error by log-SNR, in place of the plain error of what is predicted"""
    prediction: Literal["velocity", "x0"] = "velocity"
    """flow alone: what the network puts out; the loss is of the velocity that it means"""
    flow_density: Literal["logit-normal", "uniform"] = "logit-normal"
    """flow alone: how training times are drawn"""
    flow_time: tuple[float, float] = (0.0, 1.0)
    """flow alone: mean and standard deviation of the logit of the training times; a higher mean gives more noise"""
    flow_shift: float = 1.0
    """flow alone: times of training and steps of samplers move towards the noise, sigma / alpha so many times up"""

    @property
    def is_flow(self) -> bool:
        """Whether the path is that of flow matching."""
        return self.objective in ("flow", "sit")

    def check(self, model: DiTConfig) -> None:
        """Raise ValueError where the fields do not fit each other, or the network."""
        name = self.objective
        if name not in get_args(ObjectiveName):
            raise ValueError(f"objective is {name!r}; choose {', '.join(get_args(ObjectiveName))}")
        if name == "flow" and model.learn_sigma:
            raise ValueError("objective flow predicts no variance; add --model.no-learn-sigma")
        if self.is_flow and self.schedule != "linear":
            raise ValueError(f"schedule is {self.schedule}, but objective {name} has a path of its own; leave it out")
        if self.is_flow and self.weighting != "none":
            raise ValueError(
                f"weighting is {self.weighting}, but objective {name} weighs times by how often they are drawn; see"
                " --flow-time"
            )
        if self.prediction != "velocity" and name != "flow":
            raise ValueError(f"prediction is {self.prediction}, which is for objective flow; use --objective x0")
        if not (self.flow_shift > 0 and self.flow_time[1] >= 0):
            raise ValueError(
                f"flow_shift is {self.flow_shift} and the deviation of flow_time {self.flow_time[1]}; the first must"
                " be above 0, the second not below"
            )

    def levels(self, steps: int = 1000, spacing: Spacing = "time") -> Schedule:
        """The levels of a sampler of so many steps; 1000 in `time` are those of training."""
        if self.is_flow and spacing == "time":
            return flow.uniform_grid(steps, shift=self.flow_shift, prediction=self.prediction)
        if self.is_flow:
            return sampling_grid(flow.uniform_grid(1000, prediction=self.prediction), steps, spacing)
        prediction: Any = self.objective
        whole = (linear_schedule if self.schedule == "linear" else cosine_schedule)(prediction=prediction)
        return respace(whole, steps) if spacing == "time" else sampling_grid(whole, steps, spacing)

    def predictor(self, network: Callable[..., Float[Array, "h w o"]]) -> Callable[..., Float[Array, "h w o"]]:
        """A network of this objective, called alike, as those levels have it."""
        return flow.from_sit(network) if self.objective == "sit" else network


def make_objective(config: ObjectiveConfig) -> Objective:
    """The loss at a time drawn anew.

    Beside its parts, the terms have `by_time`: for ten equal ranges of time, data first, 1 and the loss where the time
    drawn lies, and 0 elsewhere, whose sums tell the loss of each range.
    """
    schedule = config.levels()

    def objective(predict, x0, key):
        time_key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x0.shape)
        if config.is_flow:
            uniform = config.flow_density == "uniform"
            s = jax.random.uniform(time_key) if uniform else flow.logit_normal(*config.flow_time, key=time_key)
            s = flow.shifted(s, config.flow_shift)
            terms = flow.training_loss(config.predictor(predict), x0, s, noise, prediction=config.prediction)
            place = jnp.minimum(BINS * s, BINS - 1).astype(int)
        else:
            i, weight = jax.random.randint(time_key, (), 0, len(schedule)), None
            if config.weighting == "min-snr":
                weight = loss_weights.min_snr(at(schedule.log_snr, i))
            elif config.weighting == "sigmoid":
                weight = loss_weights.sigmoid(at(schedule.log_snr, i)) * loss_weights.log_snr_fall(schedule, i)
            terms = gaussian.training_loss(schedule, predict, x0, i, noise, weight=weight)
            place = BINS * i // len(schedule)
        here = jax.nn.one_hot(place, BINS)
        return terms | {"by_time": jnp.stack([here, here * terms["loss"]])}

    return objective
