"""Samples of a network as they are drawn to be judged, and what tells them from all others."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditx.evaluation.evaluate import draw_labels
from ditx.nn.dit import DiT
from ditx.nn.vae import AutoencoderKL
from ditx.parallel.compile import Dtype, resolve_dtype
from ditx.parallel.distributed import broadcast_from_main
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import check_mesh
from ditx.sampling import SamplingConfig, make_decode, make_sampler
from ditx.training import checkpoint
from ditx.weights import pretrained
from ditx.weights.frozen import load_decoder
from ditx.weights.pretrained import Description


@dataclass(frozen=True)
class DrawingConfig:
    """How many samples, of which weights, and how they are drawn."""

    num: int = 50_000
    """samples to draw"""
    balanced: bool = False
    """draw each class as often as any other, rather than labels uniform at random as in the paper"""
    step: int = 0
    """of a run, the checkpoint of this step; the newest if not given"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vae: str = ""
    """what decodes latents: ft-ema, ft-mse, original, or a path; that of the run if not given"""
    seed: int = 0
    """sample number k depends on this and on k alone; of a classifier, that of its training"""
    dtype: Dtype = "float32"
    """what the network computes in; auto is float32 on CPUs and bfloat16, which is faster, elsewhere"""
    unroll: int = 1
    """blocks compiled in a row: all of them are some 5 % faster on a GPU, and take long to compile"""
    batch: int = 128
    """samples drawn, or images read, at a time; a matter of memory and speed alone"""
    decode_batch: int = 4
    """latents decoded at a time on each device"""

    def check(self) -> None:
        """Raise ValueError for values that cannot be."""
        for name, least in {"num": 2, "batch": 1, "decode_batch": 1, "unroll": 1, "step": 0}.items():
            if getattr(self, name) < least:
                why = ", since a covariance needs as many samples" if name == "num" else ""
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}{why}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it goes from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Samples:
    """What is judged, before any of it is read or drawn."""

    about: dict[str, Any]
    """what tells these samples from all others, but for their number, and where they lie"""
    count: int
    image_shape: tuple[int, ...]
    batches: Callable[[int], Iterator[np.ndarray]]
    """from the number of the first on"""


def generate_samples(source: Path, described: Description, config: DrawingConfig, mesh: Mesh) -> Samples:
    """Those of a run or of weights. Raises ValueError where they cannot be drawn so."""
    model, dtype = described.model, resolve_dtype(config.dtype)
    config.sampling.check(model, described.objective)
    check_mesh(mesh, num_heads=model.num_heads, mlp_size=model.mlp_size)
    step, weights = _identify(source, config.step)
    vae, vae_name, shape = _decoder(described, config)
    about = {
        "step": step,
        "weights": weights,
        "vae": vae_name,
        "seed": config.seed,
        "labels": "balanced" if config.balanced else "uniform at random",
        "dtype": dtype,
        **json.loads(json.dumps(asdict(config.sampling.resolved(described.objective)))),  # as it is read back
    }

    def batches(start):
        abstract = with_shardings(jax.eval_shape(lambda key: DiT(model, key=key), jax.random.key(0)), mesh)
        network, _ = pretrained.load(source, described, abstract, step=step)
        network = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), network)
        decode = None if vae is None else make_decode(vae, mesh, config.decode_batch)
        sampler = make_sampler(
            config.sampling,
            model,
            described.objective,
            mesh,
            batch_size=min(config.batch, config.num),
            decode=decode,
            unroll=config.unroll,
        )
        labels = draw_labels(model.num_classes, config.num, config.seed, balanced=config.balanced)
        return sampler.batches(network, labels[start:], seed=config.seed, first=start)

    return Samples(about, config.num, shape, batches)


def _identify(source: Path, step: int) -> tuple[int, str]:
    """The step of a run's checkpoint, or 0, and a checksum of the weights."""
    if pretrained.is_run(source):
        folder = source / "checkpoints"
        kept = checkpoint.steps(folder)
        if not kept:
            raise ValueError(f"{source} has no checkpoint yet; let train.py reach its first")
        if step not in (0, *kept):
            there = ", ".join(f"{each:,}" for each in kept)
            raise ValueError(f"{source} has no checkpoint of step {step:,}; there are: {there}")
        step = broadcast_from_main(step or kept[-1])
        manifest = json.loads((folder / str(step) / checkpoint.MANIFEST).read_text())
        return step, f"{zlib.crc32(json.dumps(manifest['files']).encode()):08x}"
    if step:
        raise ValueError(f"step is {step}, but {source} is no run; leave it out")
    crc = 0
    for name, tensor in sorted(pretrained.open_weights(source)[0].tensors.items()):
        crc = zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), crc))
    return 0, f"{crc:08x}"


def _decoder(described: Description, config: DrawingConfig) -> tuple[AutoencoderKL | None, str, tuple[int, int, int]]:
    """What decodes latents, if that is what the network makes, its name, and the shape of the images."""
    model = described.model
    side, channels = model.input_size, model.in_channels
    if channels in (1, 3):
        if config.vae:
            raise ValueError(
                f"vae is {config.vae!r}, but the network makes images of {channels} channels; leave it out"
            )
        return None, "", (side, side, channels)
    if not config.vae:
        raise ValueError(
            f"the network makes latents of {channels} channels; decode them with --vae ft-mse, as the paper, or a path"
        )
    vae, name = load_decoder(config.vae, channels, described.latent_scale)
    side *= vae.config.downsampling
    return vae, name, (side, side, 3)
