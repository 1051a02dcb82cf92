"""Networks that ditx uses and does not train: the autoencoder of the latents, and Inception for the metrics."""

import math
from pathlib import Path
from typing import Any

import jax

from ditx.checks import unknown
from ditx.files import checksum_arrays
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.weights import convert, files, hub
from ditx.weights.pretrained import check_config, open_weights

# The three decoders of the paper's Table 5, on the Hugging Face hub.
VAES = {
    "original": "CompVis/stable-diffusion-v1-4",
    "ft-ema": "stabilityai/sd-vae-ft-ema",
    "ft-mse": "stabilityai/sd-vae-ft-mse",
}
PYTORCH_FID = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
# Fields of diffusers' AutoencoderKL and of `VAEConfig`.
_VAE_FIELDS = {
    "in_channels": "in_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_groups",
    "scaling_factor": "scale",
    "latents_mean": "mean",
    "latents_std": "std",
    "use_quant_conv": "quant",
}


def load_vae(source: str) -> tuple[AutoencoderKL, str]:
    """Read an autoencoder: one of `VAES`, a file or folder in diffusers' layout, a name on the hub, or an LDM file.

    The configuration is the `config.json` beside the weights, or Stable Diffusion's if there is none. Also returns the
    name or path with the CRC-32 of the weights.
    """
    name = str(Path(source).absolute()) if Path(source).exists() else source
    if name == source and source not in VAES and not hub.is_name(source) and "/" not in source:
        raise unknown("autoencoder", source, [*VAES, "a file", "a folder"])
    file, config = open_weights(VAES.get(name, source), part="vae")
    config = VAEConfig() if config is None else _vae_config(source, config)
    model = convert.vae_from_torch(file.tensors, config)
    return model, f"{name} (CRC-32 {checksum_arrays(jax.tree.leaves(model))})"


def load_decoder(source: str, channels: int, scale: float | None) -> tuple[AutoencoderKL | None, str]:
    """`load_vae`, for a network of `channels` channels with latents, if `scale` is known, of that scale.

    A network of pixels, with 1 or 3 channels, has None. Raises ValueError for an autoencoder with other latents, a
    missing one, or one for pixels.
    """
    if channels in (1, 3):
        if source:
            raise ValueError(f"vae is {source!r}, but the network makes images of {channels} channels; leave it out")
        return None, ""
    if not source:
        raise ValueError(
            f"the network makes latents of {channels} channels; decode them with --vae ft-mse, as the paper, or a path"
        )
    vae, name = load_vae(source)
    if scale not in (None, vae.config.scale):
        raise ValueError(
            f"the autoencoder {name} scales latents by {vae.config.scale}, but the data's are scaled by {scale};"
            " give the one that made them"
        )
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"the autoencoder {name} has latents of {vae.config.latent_channels} channels, but the network makes"
            f" {channels}; give the one that it was trained with"
        )
    return vae, name


def load_inception(source: str = "") -> tuple[Inception, str]:
    """Read the FID network from a file of torch, safetensors or NumPy (`.npz`), by default from `PYTORCH_FID`.

    A file without logits gives a network without them. Also returns the file's path with the CRC-32 of the weights.
    Raises ValueError if the file cannot be downloaded, is damaged, or has another network.
    """
    path = Path(source) if source else hub.download(PYTORCH_FID)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give pytorch-fid's weights, or no file to download them")
    model = convert.inception_from_torch(files.read(path).tensors)
    return model, f"{path.absolute()} (CRC-32 {checksum_arrays(jax.tree.leaves(model))})"


def _vae_config(source: str, config: dict[str, Any]) -> VAEConfig:
    """`VAEConfig` from diffusers' `config.json`. Raises ValueError for features that `AutoencoderKL` lacks."""
    supported = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "out_channels": config.get("in_channels", 3),
        "use_post_quant_conv": config.get("use_quant_conv", True),
        "mid_block_add_attention": True,
        "shift_factor": None if config.get("latents_mean") else config.get("shift_factor"),  # one of the two
    }
    check_config(source, config, supported)
    fields = {ours: config[theirs] for theirs, ours in _VAE_FIELDS.items() if config.get(theirs) is not None}
    if config.get("shift_factor") is not None:
        fields["mean"] = [config["shift_factor"]] * config.get("latent_channels", 4)
    if (config.get("latents_mean") is None) != (config.get("latents_std") is None):
        raise ValueError(f"the autoencoder {source} has one of latents_mean and latents_std; add the other")
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        types = {"scale": (int, float), "mean": (int, float), "std": (int, float), "quant": (bool,)}.get(name, (int,))
        listed = name in ("block_channels", "mean", "std")
        if isinstance(value, list) != listed or not all(type(x) in types and math.isfinite(x) for x in values):
            raise ValueError(f"the autoencoder {source} has {name} {value!r} in its config.json; correct that file")
        fields[name] = tuple(values) if listed else value
    return VAEConfig(**fields)
