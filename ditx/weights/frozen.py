"""Networks that ditx uses and does not train: the autoencoder of the latents, and Inception for the metrics."""

import hashlib
import http.client
import math
import urllib.request
from pathlib import Path
from typing import Any

import jax

from ditx.files import cache_folder, checksum_arrays, first_line, read_npz, write_atomically
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.weights import convert, files
from ditx.weights.pretrained import check_config, open_weights

# The three decoders of the paper's Table 5: repository and file on the Hugging Face hub.
VAES = {
    "original": ("CompVis/stable-diffusion-v1-4", "vae/diffusion_pytorch_model.safetensors"),
    "ft-ema": ("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors"),
    "ft-mse": ("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors"),
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
}


def load_vae(source: str) -> tuple[AutoencoderKL, str]:
    """Read an autoencoder: one of `VAES` by name, or a file or folder in diffusers' layout.

    The configuration is the `config.json` beside the weights, or Stable Diffusion's if there is none. Also returns the
    name or path with the CRC-32 of the weights.
    """
    name = str(Path(source).absolute())
    if Path(source).exists():
        file, config = open_weights(Path(source), part="vae")
    elif source in VAES:
        name, file, config = source, files.read(fetch(*VAES[source])), None
    else:
        raise ValueError(f"unknown autoencoder {source!r}; choose from {', '.join(VAES)}, or give a file or folder")
    model = convert.vae_from_torch(file.tensors, VAEConfig() if config is None else _vae_config(source, config))
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
    path = Path(source) if source else download(PYTORCH_FID)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give pytorch-fid's weights, or no file to download them")
    model = convert.inception_from_torch(read_npz(path) if path.suffix == ".npz" else files.read(path).tensors)
    return model, f"{path.absolute()} (CRC-32 {checksum_arrays(jax.tree.leaves(model))})"


def download(url: str) -> Path:
    """Download a file into `~/.cache/ditx` (under `XDG_CACHE_HOME` if that is set), unless it is there already.

    The name ends in the first digits of the file's SHA-256, as in torch's hub, and they are checked. Raises ValueError
    if the file cannot be downloaded.
    """
    cache = cache_folder()
    path = cache / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    remedy = "check the network, or bring the file here by other means and give its path"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
        expected = path.stem.rsplit("-", 1)[-1]
        digits = hashlib.sha256(content).hexdigest()[: len(expected)]
        if digits != expected:
            raise ValueError(f"the file from {url} has a SHA-256 that begins with {digits}, not {expected}; {remedy}")
        cache.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write(content)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"cannot download {url} into {cache} ({type(error).__name__}: {first_line(error)}); {remedy}"
        ) from error
    return path


def fetch(repository: str, file: str) -> Path:
    """Download one file of a repository of the Hugging Face hub, unless it is in the hub's cache."""
    failure = f"cannot fetch {file} of {repository} from the Hugging Face hub"
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]

        return Path(hf_hub_download(repository, file))
    except ImportError as error:
        remedy = "install it with `uv run --extra hub ...` or `pip install huggingface-hub`, or give the path of a file"
        raise ValueError(f"{failure} without the package huggingface_hub; {remedy}") from error
    except Exception as error:  # The hub, the network and the disk raise many types.
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{failure} ({cause}); check both names and the network, or give a path") from error


def _vae_config(source: str, config: dict[str, Any]) -> VAEConfig:
    """`VAEConfig` from diffusers' `config.json`. Raises ValueError for features that `AutoencoderKL` lacks."""
    supported = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "out_channels": config.get("in_channels", 3),
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "shift_factor": None,
    }
    check_config(source, config, supported)
    fields = {ours: config[theirs] for theirs, ours in _VAE_FIELDS.items() if theirs in config}
    for name, value in fields.items():
        values = value if name == "block_channels" and isinstance(value, list) else [value]
        types = (int, float) if name == "scale" else (int,)
        if not all(type(number) in types and math.isfinite(number) for number in values):
            raise ValueError(f"the autoencoder {source} has {name} {value!r} in its config.json; correct that file")
        fields[name] = tuple(values) if name == "block_channels" else value
    return VAEConfig(**fields)
