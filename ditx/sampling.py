"""Samples from a trained network: seed and number in, image out, on a mesh. The only place that compiles a sampler."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Key, UInt8

from ditx.checks import check_names
from ditx.diffusion import guidance, samplers
from ditx.diffusion.meanflow import mean_velocity_step
from ditx.diffusion.objective import ObjectiveConfig
from ditx.diffusion.schedule import Schedule
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DiTConfig
from ditx.nn.vae import AutoencoderKL
from ditx.parallel.compile import compiler_options
from ditx.parallel.fsdp import data_parallel, gather_blocks, make_gather
from ditx.parallel.mesh import batch_sharding, data_parallel_size, replicated, shard_host_array

STEPS = {
    "ddpm": samplers.ddpm_step,
    "ddim": samplers.ddim_step,
    "dpm-solver": samplers.dpm_solver_step,  # DPM-Solver++(2M)
    "heun": samplers.heun_step,  # probability-flow ODE, two evaluations a step
    "euler": samplers.euler_step,  # probability-flow ODE
    "euler-maruyama": samplers.euler_maruyama_step,  # SDE
    "mean-velocity": mean_velocity_step,  # MeanFlow's, which only a network of mean velocities has
}
if TYPE_CHECKING:
    SamplerName: TypeAlias = str
else:
    SamplerName = Literal[("auto", *STEPS)]


class SamplerParams(NamedTuple):
    """Traceable sampler parameters. New values reuse the compiled sampler; a new step count recompiles.

    Switching guidance or its interval on or off also recompiles.
    """

    grid: Schedule
    """noise levels, one per step"""
    scale: float | Float[Array, ""] | None
    """guidance scale; None skips the second evaluation"""
    interval: tuple[float, float] | tuple[Float[Array, ""], Float[Array, ""]] | None
    """guide only between these times; None guides at every step"""


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn. Any sampler works with any objective."""

    sampler: SamplerName = "auto"
    """auto: mean-velocity for a network of mean velocities, dpm-solver for another flow, else ddpm. ddim, dpm-solver
    (DPM-Solver++(2M)), heun, euler and mean-velocity are deterministic"""
    steps: int = 0
    """steps from noise to image; 0: 1 by mean velocities, 25 for another flow, else the paper's 250"""
    spacing: Literal["time", "log-snr", "karras"] = "time"
    """steps are equal in: time, log-SNR, or (sigma / alpha)^(1/7)"""
    eta: float = 0.0
    """noise of ddim: 0 is deterministic, 1 as noisy as ddpm"""
    guidance_scale: float = 1.0
    """scale of classifier-free guidance, or of guidance by another network; 1 is none"""
    guidance_channels: int = 0
    """guide only this many leading channels (3 in the paper's results and released code); 0 guides all"""
    guidance_interval: tuple[float, float] = (0.0, 1000.0)
    """guide only between these times, 0 (data) to 1000 (noise); a step outside costs half"""

    def resolved(self, objective: ObjectiveConfig) -> "SamplingConfig":
        """The same with the sampler and the number of steps that `auto` and 0 stand for."""
        sampler, steps = ("dpm-solver", 25) if objective.is_flow else ("ddpm", 250)
        sampler, steps = ("mean-velocity", 1) if objective.is_mean else (sampler, steps)
        return replace(self, sampler=sampler if self.sampler == "auto" else self.sampler, steps=self.steps or steps)

    def params(self, objective: ObjectiveConfig) -> SamplerParams:
        """The traceable parameters."""
        scale = None if self.guidance_scale == 1 else float(self.guidance_scale)
        interval = None if scale is None or self.guidance_interval == (0, 1000) else self.guidance_interval
        grid = objective.sampler_grid(self.resolved(objective).steps, self.spacing)
        return SamplerParams(grid, scale, interval)

    def check(self, model: DiTConfig, objective: ObjectiveConfig, *, guided_by_network: bool = False) -> None:
        """Raise ValueError where this cannot work with a network, guided by its null label or by another network."""
        check_names(self)
        limit = 1000 if not objective.is_flow and self.spacing == "time" else 10_000
        if not 0 <= self.steps <= limit:
            raise ValueError(f"steps is {self.steps}; schedule {objective.schedule} samples in 1 to {limit} steps")
        if self.sampler == "mean-velocity" and not objective.is_mean:
            raise ValueError(f"sampler mean-velocity needs a network of mean velocities, not {objective.prediction}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; choose 0 (deterministic) to 1 (as noisy as ddpm)")
        if not 0 <= self.guidance_channels <= model.in_channels:
            raise ValueError(
                f"guidance_channels is {self.guidance_channels}; the network has {model.in_channels} (0 guides all)"
            )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; give a number, 1 for no guidance")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1000:
            raise ValueError(f"guidance_interval is {low} to {high}; give two rising times within 0 and 1000")
        if self.guidance_scale != 1 and not guided_by_network and (model.null_label is None or not model.num_classes):
            missing = "labels" if model.num_classes == 0 else "null label (it was trained with label_dropout 0)"
            raise ValueError(f"guidance_scale is {self.guidance_scale}, but the network has no {missing}; use 1")


Decode: TypeAlias = Callable[[Float[Array, "n h w z"]], Float[Array, "n h8 w8 c"]]


@dataclass(frozen=True)
class Sampler:
    """A compiled sampler. Call it for an array of images, or iterate over `batches`."""

    program: Any
    """jitted `program(network, guide, labels, seed, first, params)`: one batch in float32, not decoded"""
    params: SamplerParams
    batch_size: int
    decode: Decode | None

    def __call__(self, network: Any, labels: Integer[np.ndarray, " n"], **options: Any) -> UInt8[np.ndarray, "n ..."]:
        """All images in one array; `options` as of `batches`."""
        return np.concatenate(list(self.batches(network, labels, **options)))

    def batches(
        self, network: Any, labels: Integer[np.ndarray, " n"], *, seed: int, first: int = 0, guide: Any = None
    ) -> Iterator[UInt8[np.ndarray, "b ..."]]:
        """Images of samples number `first` and later, one per label: (b, h, w, c), or (b, moments, h, w, c).

        The devices work on a batch while the one before is fetched. Raises ValueError for samples that are not finite.
        """
        pending: Any = None
        for start in range(0, len(labels), self.batch_size):
            part = labels[start : start + self.batch_size]
            padded = np.resize(part, self.batch_size).astype(np.int32)  # so that one program serves the last batch, too
            x = self.program(network, guide, padded, np.uint32(seed), np.int32(first + start), self.params)
            if self.decode:
                decoded = self.decode(rearrange(x, "... h w c -> (...) h w c"))
                x = decoded.reshape(*x.shape[:-3], *decoded.shape[-3:])
            if pending is not None:
                yield _to_images(*pending)
            pending = x, len(part), network
        if pending is not None:
            yield _to_images(*pending)


def make_sampler(
    config: SamplingConfig,
    model_config: DiTConfig,
    objective: ObjectiveConfig,
    mesh: Mesh,
    *,
    batch_size: int = 100,
    stride: int = 0,
    decode: Decode | None = None,
    unroll: int = 1,
    kernels: KernelConfig = KernelConfig(),  # noqa: B008 (frozen)
    guided_by_network: bool = False,
    step: samplers.Step | None = None,
) -> Sampler:
    """Compile a sampler for networks placed on `mesh`; each device draws its part of a batch.

    `batch_size` is rounded up to a multiple of the devices. With a `stride`, the result also has the state at every
    `stride`-th step, the sample last. With `guided_by_network`, each call takes a `guide`, the weaker network of
    autoguidance (Karras et al. 2024). `step` replaces the sampler of `config`. Raises ValueError where these conflict.
    """
    config.check(model_config, objective, guided_by_network=guided_by_network)
    config = config.resolved(objective)
    named = partial(samplers.ddim_step, eta=config.eta) if config.sampler == "ddim" else STEPS[config.sampler]
    batch = -(-batch_size // data_parallel_size(mesh)) * data_parallel_size(mesh)

    def sample(network, guide, y, key, params, blocks):
        options: Any = {"scale": 1 if params.scale is None else params.scale, "interval": params.interval}
        options["channels"] = config.guidance_channels or None

        def apply(x, t, y, *duration, network=network, apply_block=blocks[0]):
            # The sampler's state is float32, whatever the network computes in.
            x, dtype = x.astype(network.patch.weight.dtype), x.dtype
            return network(x, t, y, *duration, apply_block=apply_block, unroll=unroll).astype(dtype)

        start_key, noise_key = jax.random.split(key)
        start = jax.random.normal(start_key, model_config.input_shape)
        if guide is None:
            predict = guidance.classifier_free(apply, y, null_label=network.config.null_label, **options)
        else:
            guide_label = y if guide.config.num_classes else None
            weak: Any = partial(apply, network=guide, apply_block=blocks[1])
            networks = (lambda x, t, *d: apply(x, t, y, *d)), (lambda x, t, *d: weak(x, t, guide_label, *d))
            predict = guidance.guide(*networks, **options)
        return samplers.sample(step or named, predict, params.grid, start, key=noise_key)

    def run_batch(network, guide, labels, seed, first, params):
        gather, gather_guide = make_gather(network, mesh), make_gather(guide, mesh)
        blocks = [gather_blocks(kernels.apply_block(), model, mesh) for model in (network, guide)]

        def local(networks, rows):
            network, guide = gather(networks[0]), gather_guide(networks[1])
            return jax.vmap(lambda y, key: sample(network, guide, y, key, params, blocks))(*rows)

        rows = labels, sample_keys(seed, first, batch)
        samples, states = data_parallel(local, (network, guide), mesh)((network, guide), rows)
        return states[:, ::-stride][:, ::-1] if stride else samples  # Unused states are never stored.

    options = compiler_options(mesh, fp8=kernels.matmul_dtype == "fp8")
    program = jax.jit(run_batch, out_shardings=replicated(mesh), compiler_options=options)
    return Sampler(program, config.params(objective), batch, decode)


def sample_keys(seed: Integer[Array, ""] | int, first: Integer[Array, ""] | int, count: int) -> Key[Array, " b"]:
    """The keys of samples `first` to `first + count - 1`: sample k depends on the seed and k only."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(count))


def choose_batch_size(num: int, limit: int, parts: int) -> int:
    """Choose how many of `num` samples to draw at a time: at most about `limit`, shared by `parts` devices.

    Batches are as few as possible and equally large. A device gets 1, 2, 3, 4, 6, 8, 12, 16, 24, ... samples, or its
    share of `limit`, so that few programs serve all numbers; surplus samples are dropped.
    """
    limit = -(-limit // parts)
    batches = -(-num // (limit * parts))
    rows = -(-num // (batches * parts))
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return parts * min(limit, between if between >= rows and power > 2 else power)


def to_uint8(x: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels 0..255 of values in [-1, 1], truncated as in the ADM evaluation; the exact inverse of `to_unit`."""
    return np.clip(127.5 * x.astype(np.float32) + 128, 0, 255).astype(np.uint8)


def _to_images(x: Array, count: int, network: Any) -> UInt8[np.ndarray, "n ..."]:
    samples = np.asarray(x)[:count]
    if not np.isfinite(samples).all():
        leaves = jax.tree.leaves(network)
        if not all(np.asarray(jnp.isfinite(leaf).all()) for leaf in leaves):
            raise ValueError("samples are not finite, since the weights have NaN or infinity; take other weights")
        wider = "" if leaves[0].dtype == jnp.float32 else "--dtype float32, "
        raise ValueError(f"samples are not finite; try {wider}a lower --guidance-scale, or more steps")
    return to_uint8(samples)


def make_decode(vae: AutoencoderKL | None, mesh: Mesh, batch_size: int = 4) -> Decode | None:
    """Compile the decoder of latents, `batch_size` of them on each device at a time; a call does not wait.

    Returns None without an autoencoder, that is, for a network of pixels.

    A decoder's memory grows with its batch: about 0.4 GB for an image of 256 pixels, four times that for 512.
    """
    if vae is None:
        return None
    count, rows, whole = batch_size * data_parallel_size(mesh), batch_sharding(mesh), replicated(mesh)
    weights = jax.tree.map(lambda leaf: shard_host_array(leaf, whole), vae)

    def part(vae, latents):
        return jax.vmap(vae.decode)(jax.lax.with_sharding_constraint(latents, rows))

    def parts(vae, latents):
        padded = jnp.concatenate([latents, jnp.zeros((-len(latents) % count, *latents.shape[1:]), latents.dtype)])
        images = jax.lax.map(partial(part, vae), rearrange(padded, "(p n) h w z -> p n h w z", n=count))
        return rearrange(images, "p n h w c -> (p n) h w c")[: len(latents)]

    return partial(jax.jit(parts, out_shardings=whole), weights)
