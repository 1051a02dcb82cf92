"""Autoencoders for latents: those of the paper by name, and any in diffusers' layout."""

import math
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.weights import convert, files
from ditx.weights.pretrained import open_weights

# Where the three decoders of the paper's Table 5 lie on the Hugging Face hub.
VAES = {
    "original": ("CompVis/stable-diffusion-v1-4", "vae/diffusion_pytorch_model.safetensors"),
    "ft-ema": ("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors"),
    "ft-mse": ("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors"),
}


def load_vae(source: str) -> tuple[AutoencoderKL, str]:
    """Read an autoencoder: one of `VAES` by name, from the hub, or a file or folder in diffusers' layout.

    Also returns its name or path with the CRC-32 of its weights. Its shape is read from the `config.json` beside the
    weights, and is Stable Diffusion's where there is none.
    """
    by_name = source in VAES and not Path(source).exists()
    if by_name:
        file, config = files.read(files.fetch(*VAES[source])), None
    elif not Path(source).exists():
        raise ValueError(f"there is no autoencoder {source!r}; give {', '.join(VAES)}, or the path of a file or folder")
    else:
        file, config = open_weights(Path(source), part="vae")
    model = convert.vae_from_torch(file.tensors, VAEConfig() if config is None else _vae_config(source, config))
    crc = 0
    for leaf in jax.tree.leaves(model):
        crc = zlib.crc32(np.asarray(leaf).data, crc)
    return model, f"{source if by_name else Path(source).absolute()} (CRC-32 {crc:08x})"


def load_decoder(source: str, channels: int, scale: float | None) -> tuple[AutoencoderKL, str]:
    """As `load_vae`, for latents of so many channels and, where it is known, of that scale.

    Raises ValueError for an autoencoder of others.
    """
    vae, name = load_vae(source)
    if scale not in (None, vae.config.scale):
        raise ValueError(
            f"the autoencoder {name} scales latents by {vae.config.scale}, those of the data by {scale}; give the one"
            " that made them"
        )
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"the autoencoder {name} has latents of {vae.config.latent_channels} channels, the network makes"
            f" {channels}; give the one that it was trained with"
        )
    return vae, name


def _vae_config(source: str, config: dict[str, Any]) -> VAEConfig:
    """Diffusers' description of an autoencoder as ours. Raises ValueError for what ours does not have."""
    expected = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "out_channels": config.get("in_channels", 3),
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "shift_factor": None,
    }
    differing = [f"{name} {config[name]!r}" for name, value in expected.items() if config.get(name, value) != value]
    if differing:
        raise ValueError(f"the autoencoder {source} is of a kind not supported: {', '.join(differing)}")
    names = {
        "in_channels": "in_channels",
        "latent_channels": "latent_channels",
        "block_out_channels": "block_channels",
        "layers_per_block": "layers_per_block",
        "norm_num_groups": "norm_groups",
        "scaling_factor": "scale",
    }
    fields = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    for name, value in fields.items():
        values = value if name == "block_channels" and isinstance(value, list) else [value]
        kind = int | float if name == "scale" else int
        if not all(isinstance(each, kind) and not isinstance(each, bool) and math.isfinite(each) for each in values):
            raise ValueError(f"the autoencoder {source} has {name} {value!r} in its config.json; mend that")
    if "block_channels" in fields:
        fields["block_channels"] = tuple(np.atleast_1d(fields["block_channels"]).tolist())
    return VAEConfig(**fields)
