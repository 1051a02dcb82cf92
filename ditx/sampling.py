"""Samples from a trained network: batches in which each one depends on the seed and its own number alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Key

from ditx.diffusion import guidance, samplers
from ditx.diffusion.objective import ObjectiveConfig
from ditx.diffusion.schedule import Schedule
from ditx.nn.dit import DiTConfig
from ditx.nn.layers import PLAIN, Compute
from ditx.nn.vae import AutoencoderKL
from ditx.parallel.mesh import (
    batch_sharding,
    data_parallel,
    data_parallel_size,
    make_gather,
    replicated,
    shard_host_array,
)

Sampler = Literal["auto", "ddpm", "ddim", "dpm-solver", "heun", "euler", "euler-maruyama"]
STEPS = {
    "ddpm": samplers.ddpm_step,
    "ddim": samplers.ddim_step,
    "dpm-solver": samplers.dpm_solver_step,
    "heun": samplers.heun_step,
    "euler": samplers.euler_step,
    "euler-maruyama": samplers.euler_maruyama_step,
}


class SamplerParams(NamedTuple):
    """The numbers of a draw, all of which may be traced: one program serves all courses of as many steps.

    It is another one with guidance or without, in an interval or at all times.
    """

    grid: Schedule
    """the levels of noise"""
    scale: float | Float[Array, ""] | None
    """of guidance; None is none, without a second evaluation"""
    interval: tuple[float, float] | tuple[Float[Array, ""], Float[Array, ""]] | None
    """the times to guide at; None is all of them"""


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn. Any sampler takes any objective."""

    sampler: Sampler = "auto"
    """ddpm; ddim; dpm-solver, which is DPM-Solver++(2M); heun or euler on the probability-flow ODE; euler-maruyama on
    the SDE; auto is heun for a flow, else ddpm"""
    steps: int = 250
    """steps from noise to image"""
    spacing: Literal["time", "log-snr", "karras"] = "time"
    """what steps are equal in: time, log-SNR, or (sigma / alpha)^(1/7)"""
    eta: float = 0.0
    """ddim alone: 0 is deterministic, 1 as noisy as ddpm"""
    guidance_scale: float = 1.0
    """guidance, classifier-free unless by another network; 1 is none"""
    guidance_channels: int = 0
    """guide the first so many channels (3, in the paper's numbers and the released code); 0 guides all"""
    guidance_interval: tuple[float, float] = (0.0, 1000.0)
    """guide at these times alone, from 0 (data) to 1000 (noise); elsewhere, a step costs half as much"""

    def resolved(self, objective: ObjectiveConfig) -> "SamplingConfig":
        """With what `auto` stands for."""
        usual = "heun" if objective.is_flow else "ddpm"
        return replace(self, sampler=usual if self.sampler == "auto" else self.sampler)

    def params(self, objective: ObjectiveConfig) -> SamplerParams:
        """The numbers of such draws."""
        scale = None if self.guidance_scale == 1 else float(self.guidance_scale)
        interval = None if scale is None or self.guidance_interval == (0, 1000) else self.guidance_interval
        return SamplerParams(objective.sampler_grid(self.steps, self.spacing), scale, interval)

    def check(self, model: DiTConfig, objective: ObjectiveConfig, *, by_another: bool = False) -> None:
        """Raise ValueError where this cannot work with such a network, or without another to guide it."""
        whole = not objective.is_flow and self.spacing == "time"
        limit = 1000 if whole else 10_000
        if not 1 <= self.steps <= limit:
            raise ValueError(f"steps is {self.steps}; schedule {objective.schedule} samples in 1 to {limit} steps")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it goes from 0 (deterministic) to 1 (as noisy as ddpm)")
        if not 0 <= self.guidance_channels <= model.in_channels:
            raise ValueError(
                f"guidance_channels is {self.guidance_channels}; the network has {model.in_channels} (0 guides all)"
            )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; give a number, 1 for no guidance")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1000:
            raise ValueError(f"guidance_interval is {low} to {high}; give two times, rising, within 0 and 1000")
        if self.guidance_scale != 1 and not by_another and (model.null_label is None or model.num_classes == 0):
            lacking = "labels" if model.num_classes == 0 else "null label (it was trained with label_dropout 0)"
            raise ValueError(f"guidance_scale is {self.guidance_scale}, but the network has no {lacking}; use 1")


Draw: TypeAlias = Callable[..., tuple[Float[Array, "b h w c"], Float[Array, "b T h w c"]]]
"""`draw(model, labels, keys, *, guide=None, course=None) -> samples, states`, with a label and a key for each sample;
`guide` is the weaker network of autoguidance, and `course`, in place of the configured one, may be traced."""


def make_draw(
    config: SamplingConfig,
    model: DiTConfig,
    objective: ObjectiveConfig,
    *,
    by_another: bool = False,
    unroll: int = 1,
    compute: Compute = PLAIN,
) -> Draw:
    """The function that draws a batch, and is given another network to guide with if `by_another`.

    The states are all those on the way, to be dropped inside `jax.jit` where only samples are wanted. `unroll` blocks
    are compiled in a row, and computed by `compute`.
    Raises ValueError where the configurations do not fit together.
    """
    config.check(model, objective, by_another=by_another)
    config = config.resolved(objective)
    step = partial(samplers.ddim_step, eta=config.eta) if config.sampler == "ddim" else STEPS[config.sampler]
    usual = config.params(objective)
    shape = (model.input_size, model.input_size, model.in_channels)

    def draw(model, labels, keys, *, guide=None, params=None):
        grid, scale, interval = usual if params is None else params
        by: Any = {"scale": 1 if scale is None else scale, "channels": config.guidance_channels or None}
        by["interval"] = interval

        def apply(x, t, y, network=model):
            # The state of a sampler is float32, whatever the network computes in.
            output = network(x.astype(network.patch.weight.dtype), t, y, compute=compute, unroll=unroll)
            return output.astype(x.dtype)

        def one(y, key):
            start_key, noise_key = jax.random.split(key)
            if guide is None:
                predict = guidance.classifier_free(apply, y, null_label=model.config.null_label, **by)
            else:
                other = y if guide.config.num_classes else None
                strong, weak = (lambda x, t: apply(x, t, y)), (lambda x, t: apply(x, t, other, guide))
                predict = guidance.guide(strong, weak, **by)
            return samplers.sample(step, predict, grid, jax.random.normal(start_key, shape), key=noise_key)

        return jax.vmap(one)(labels, keys)

    return draw


def on_mesh(draw: Draw, mesh: Mesh) -> Draw:
    """The same on a mesh, to be called within `jax.jit`: each device draws its part, with weights as `place` has them.

    The batch must be a multiple of `batch_parts`.
    """

    def spread(model, labels, keys, *, guide=None, params=None):
        gather, gather_guide = make_gather(model, mesh), make_gather(guide, mesh)

        def local(networks, rows):
            model, guide = networks
            return draw(gather(model), *rows, guide=gather_guide(guide), params=params)

        return data_parallel(local, (model, guide), mesh)((model, guide), (labels, keys))

    return spread


def sample_keys(seed: Integer[Array, ""] | int, first: Int[Array, ""] | int, count: int) -> Key[Array, " b"]:
    """The keys of samples number `first` to `first + count - 1`."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(count))


def batch_size(num: int, most: int, parts: int) -> int:
    """How many of `num` samples to draw at a time, at most about `most`, where as many as `parts` devices share them.

    Batches are as few as can be and equally large. In each, every device has 1, 2, 3, 4, 6, 8, 12, 16, 24, ... samples,
    or its share of `most`: so other numbers seldom need another program, and less than half as many again are drawn as
    an equal share has.
    """
    limit = -(-most // parts)
    batches = -(-num // (limit * parts))
    rows = -(-num // (batches * parts))
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return parts * min(limit, between if between >= rows and power > 2 else power)


Decode = Callable[[Float[Array | np.ndarray, "n h w z"]], Float[Array, "n h8 w8 c"]]


def make_decode(vae: AutoencoderKL, mesh: Mesh, batch_size: int = 4) -> Decode:
    """The function that decodes latents, `batch_size` of them on each device at a time, and does not wait for it.

    A decoder's memory grows with its batch: some 0.4 GB for an image of 256 pixels, four times that for 512.
    """
    count, rows, whole = batch_size * data_parallel_size(mesh), batch_sharding(mesh), replicated(mesh)
    weights = jax.tree.map(lambda leaf: shard_host_array(leaf, whole), vae)

    def part(vae, latents):
        return jax.vmap(vae.decode)(jax.lax.with_sharding_constraint(latents, rows))

    def parts(vae, latents):
        # The last part is filled up.
        filled = jnp.concatenate([latents, jnp.zeros((-len(latents) % count, *latents.shape[1:]), latents.dtype)])
        images = jax.lax.map(partial(part, vae), rearrange(filled, "(p n) h w z -> p n h w z", n=count))
        return rearrange(images, "p n h w c -> (p n) h w c")[: len(latents)]

    return partial(jax.jit(parts, out_shardings=whole), weights)
