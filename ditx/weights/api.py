"""Load, save and sample trained networks in Python: `ditx.load`, `ditx.save`, `ditx.sample`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from ditx.checks import check_options
from ditx.data import imagenet
from ditx.diffusion import samplers
from ditx.nn.dit import DiT
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.sampling import Sampler, SamplingConfig, choose_batch_size, make_decode, make_sampler
from ditx.weights import pretrained
from ditx.weights.frozen import load_decoder
from ditx.weights.pretrained import Description, SourceConfig


def load(source: str | Path, *, block: type | None = None, **options: Any) -> tuple[DiT, Description]:
    """Load a network and its description from a run, a file or folder of weights, or a name of the hub.

    `block` is the class of blocks of one's own. `options` are the fields of `SourceConfig`: `weights="live"`,
    `step=5000`, `input_size=32`. Raises ValueError if there is no such network.
    """
    check_options(options, SourceConfig)
    config = SourceConfig(**options)
    info = pretrained.describe(source, block=block, **config.facts())
    return pretrained.load(source, info, **config.choice())[0], info


def save(path: str | Path, model: DiT, info: Description) -> None:
    """Write a network with its description to a new `.safetensors` file, for `load` and sample.py."""
    pretrained.write(Path(path), model, info)


def sample(
    model: DiT,
    info: Description,
    labels: Sequence[int | str] = (),
    num: int | None = None,
    *,
    seed: int = 0,
    vae: str = "",
    batch: int = 100,
    **sampling: Any,
) -> UInt8[np.ndarray, "n h w c"]:
    """Draw `num` images of the labels in turn, by default one of each; without labels, of all classes.

    `sampling` replaces fields of `info.sampling`: `steps=50`, `guidance_scale=2.0`; `sampler` may also be a step of
    one's own (`ditx.diffusion.samplers`). `vae` decodes latents, by default with the autoencoder of `info`. Image k is
    that of sample.py with the same seed. Raises ValueError for samples that cannot be drawn.
    """
    check_options(sampling, SamplingConfig)
    found = imagenet.find_labels(tuple(map(str, labels)), info.class_names or ("any",))
    y = np.resize(np.array(found, np.int32), len(found) if num is None else num)
    step = sampling.pop("sampler") if callable(sampling.get("sampler")) else None
    config = replace(info.sampling, **sampling)
    sampler = _sampler(replace(info, model=model.config, vae=vae or info.vae), config, min(batch, max(len(y), 1)), step)
    mesh = make_mesh(MeshConfig())
    placed = with_shardings(jax.eval_shape(lambda: model), mesh)
    with jax.set_mesh(mesh):  # instead of one that the caller has set
        return sampler(jax.device_put(model, jax.tree.map(lambda leaf: leaf.sharding, placed)), y, seed=seed)


@lru_cache(maxsize=2)  # Calls that differ in labels and seed share a compiled program.
def _sampler(info: Description, config: SamplingConfig, batch: int, step: samplers.Step | None) -> Sampler:
    mesh = make_mesh(MeshConfig())
    decode = make_decode(load_decoder(info.vae, info.model.in_channels, info.latent_scale)[0], mesh)
    batch = choose_batch_size(batch, batch, mesh.size)
    return make_sampler(config, info.model, info.objective, mesh, batch_size=batch, decode=decode, step=step)
