"""Samples from a trained network: batches in which each one depends on the seed and its own number alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from ditx.diffusion import flow, guidance, samplers
from ditx.diffusion.schedule import linear_schedule, respace
from ditx.nn.dit import DiT, DiTConfig
from ditx.nn.vae import AutoencoderKL
from ditx.sharding import batch_parts, batch_sharding, by_rows, everywhere, make_gather, put_whole

Sampler = Literal["auto", "ddpm", "ddim", "euler", "heun"]
OBJECTIVE_SAMPLERS = {"eps": ("ddpm", "ddim"), "flow": ("heun", "euler")}


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn."""

    sampler: Sampler = "auto"
    """ddpm or ddim for a noise objective, heun or euler for a flow; auto takes the first"""
    steps: int = 250
    """steps from noise to image"""
    eta: float = 0.0
    """ddim alone: 0 is deterministic, 1 as noisy as ddpm"""
    guidance_scale: float = 1.0
    """classifier-free guidance; 1 is none"""
    guidance_channels: int = 0
    """guide the first so many channels (3, in the paper's numbers and the released code); 0 guides all"""

    def check(self, model: DiTConfig, objective: str) -> None:
        """Raise ValueError where this cannot work with such a network, trained with such an objective."""
        fitting = OBJECTIVE_SAMPLERS[objective]
        if self.sampler not in ("auto", *fitting):
            raise ValueError(f"sampler {self.sampler} does not fit objective {objective}; use {' or '.join(fitting)}")
        limit = 1000 if objective == "eps" else 10_000
        if not 1 <= self.steps <= limit:
            raise ValueError(f"steps is {self.steps}; objective {objective} samples in 1 to {limit} steps")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it goes from 0 (deterministic) to 1 (as noisy as ddpm)")
        if not 0 <= self.guidance_channels <= model.in_channels:
            raise ValueError(
                f"guidance_channels is {self.guidance_channels}; the network has {model.in_channels} (0 guides all)"
            )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; give a number, 1 for no guidance")
        if self.guidance_scale != 1 and model.null_label is None:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}, but the network has no null label (it was trained with"
                " label_dropout 0); use 1"
            )


Draw = Callable[[DiT, Int[Array, " b"], Key[Array, " b"]], tuple[Float[Array, "b h w c"], Float[Array, "b T h w c"]]]


def make_draw(config: SamplingConfig, model: DiTConfig, objective: str, *, unroll: int = 1) -> Draw:
    """The function that draws a batch: `draw(model, labels, keys) -> samples, states`, with a key for each sample.

    The states are all those on the way, to be dropped inside `jax.jit` where only samples are wanted. `unroll` blocks
    are compiled in a row.
    Raises ValueError where the configurations do not fit together.
    """
    config.check(model, objective)
    name = OBJECTIVE_SAMPLERS[objective][0] if config.sampler == "auto" else config.sampler
    steps = {
        "ddpm": samplers.ddpm_step,
        "ddim": partial(samplers.ddim_step, eta=config.eta),
        "euler": samplers.euler_step,
        "heun": samplers.heun_step,
    }
    grid = respace(linear_schedule(), config.steps) if objective == "eps" else flow.uniform_grid(config.steps)
    shape = (model.input_size, model.input_size, model.in_channels)

    def draw(network, labels, keys):
        def one(y, key):
            start_key, noise_key = jax.random.split(key)

            def apply(x, t, y):
                # The state of a sampler is float32, whatever the network computes in.
                return network(x.astype(network.patch.weight.dtype), t, y, unroll=unroll).astype(x.dtype)

            predict = guidance.classifier_free(
                apply,
                y,
                null_label=model.null_label,
                scale=config.guidance_scale,
                channels=config.guidance_channels or None,
            )
            return samplers.sample(steps[name], predict, grid, jax.random.normal(start_key, shape), key=noise_key)

        return jax.vmap(one)(labels, keys)

    return draw


def on_mesh(draw: Draw, mesh: Mesh) -> Draw:
    """The same on a mesh, to be called within `jax.jit`: each device draws its part, with weights as `place` has them.

    The batch must be a multiple of `batch_parts`.
    """

    def spread(model, labels, keys):
        gather = make_gather(model, mesh)
        return by_rows(lambda shards, rows: draw(gather(shards), *rows), model, mesh)(model, (labels, keys))

    return spread


def sample_keys(seed: int, first: Int[Array, ""] | int, count: int) -> Key[Array, " b"]:
    """The keys of samples number `first` to `first + count - 1`."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(count))


Decode = Callable[[Float[np.ndarray, "n h w z"]], Float[np.ndarray, "n h8 w8 c"]]


def make_decode(vae: AutoencoderKL, mesh: Mesh, batch_size: int = 4) -> Decode:
    """The function that decodes any number of latents, `batch_size` of them on each device at a time.

    A decoder's memory grows with its batch: some 0.4 GB for an image of 256 pixels, four times that for 512.
    """
    count, rows = batch_size * batch_parts(mesh), batch_sharding(mesh)
    weights = jax.tree.map(lambda leaf: put_whole(leaf, everywhere(mesh)), vae)
    compiled = jax.jit(lambda vae, latents: jax.vmap(vae.decode)(latents), out_shardings=everywhere(mesh))

    def decode(latents):
        # The last batch is filled up, so that one program serves all.
        padded = np.concatenate([latents, np.zeros((-len(latents) % count, *latents.shape[1:]), latents.dtype)])
        parts = [put_whole(padded[first : first + count], rows) for first in range(0, len(padded), count)]
        return np.concatenate([np.asarray(compiled(weights, part)) for part in parts])[: len(latents)]

    return decode
