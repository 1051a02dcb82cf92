"""Trained networks, wherever they come from: our runs, our files, those of the authors and of diffusers, or the hub."""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ditx import checkpoint, convert, imagenet, runs, weights
from ditx.nn.dit import DiT, DiTConfig
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.sampling import SamplingConfig
from ditx.weights import WeightFile

# Where the three decoders of the paper's Table 5 lie on the Hugging Face hub.
VAES = {
    "original": ("CompVis/stable-diffusion-v1-4", "vae/diffusion_pytorch_model.safetensors"),
    "ft-ema": ("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors"),
    "ft-mse": ("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors"),
}
# Weights do not tell the number of heads; these are the published ones, by width.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_METADATA = "ditx"


@dataclass(frozen=True)
class Description:
    """What one must know of a trained network to draw from it."""

    model: DiTConfig
    objective: str
    sampling: SamplingConfig
    """how it is usually drawn from"""
    class_names: tuple[str, ...]
    vae: str = ""
    """name or path of the autoencoder for its latents, where that is known"""
    latent_scale: float | None = None
    """that autoencoder's scale, where it is known"""

    @classmethod
    def of(cls, fields: Mapping[str, Any], source: object) -> "Description":
        """From the fields of a run's configuration. Raises ValueError if another version of ditx wrote them."""
        try:
            return cls(
                DiTConfig(**fields["model"]),
                fields["objective"],
                SamplingConfig(**fields["sampling"]),
                tuple(fields["class_names"]),
                fields.get("vae") or fields.get("latents", {}).get("vae", "").rsplit(" (CRC-32", 1)[0],
                fields.get("latent_scale") or fields.get("latents", {}).get("scale"),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{source} was written by another version of ditx ({error})") from error


def describe(source: Path, **overrides: int) -> Description:
    """Describe a run's folder or a file of weights, without reading the weights.

    `overrides` are fields of `DiTConfig` that files of other programs do not tell: `num_heads` for widths that were
    never published, `num_classes` where the label table has no null row, `frequency_shift`.
    """
    if is_run(source):
        return Description.of(runs.read_config(source), source)
    file, config = _open(source)
    if _layout(source, file) == "ditx":
        return Description.of(json.loads(file.metadata[_METADATA]), source)
    model = _infer(source, file.tensors, config, overrides)
    # The settings of the authors' sample.py.
    sampling = SamplingConfig(sampler="ddpm", steps=250, guidance_scale=4.0, guidance_channels=3)
    if model.null_label is None or not model.learn_sigma or model.in_channels < 3:
        sampling = SamplingConfig()
    count = model.num_classes
    names = tuple(imagenet.classes()) if count == 1000 else tuple(map(str, range(count)))
    return Description(model, "eps", sampling, names)


def load(source: Path, description: Description, places: Any = None) -> tuple[DiT, str]:
    """Read the averaged weights of what `describe` described, where `places` (shapes with shardings) has them lie.

    That is the first device if it is not given. Also returns a sentence on what was read. Raises ValueError if it is
    damaged or does not fit.
    """
    if places is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.jit(lambda key: DiT(description.model, key=key), out_shardings=first).eval_shape(jax.random.key(0))
    if is_run(source):
        restored = checkpoint.load_newest(source / "checkpoints", {"ema": places})
        if restored is None:
            raise ValueError(f"{source} has no checkpoint yet; let train.py reach its first")
        step, trees, damaged = restored
        passed_over = "".join(f"; warning: {sentence}; passed over" for _, sentence in damaged)
        return trees["ema"], f"{source} at step {step:,}{passed_over}"
    file, _ = _open(source)
    layout = _layout(source, file)
    if layout == "ditx":
        model = convert.dit_from_arrays(file.tensors, description.model)
    elif layout == "authors":
        model = convert.dit_from_torch(file.tensors, description.model)
    else:
        shift = description.model.frequency_shift
        model = convert.dit_from_diffusers(file.tensors, description.model, frequency_shift=shift)
    model = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), model, places)
    return model, f"{source} in the layout of {layout}{', ' + file.note if file.note else ''}"


def write(path: Path, model: DiT, description: Description) -> None:
    """Write a new `.safetensors` file of our own, which `describe` and `load` read."""
    described = json.dumps(asdict(replace(description, model=model.config)))
    weights.write_safetensors(path, convert.dit_to_arrays(model), {"format": "np", _METADATA: described})


def load_vae(source: str) -> tuple[AutoencoderKL, str]:
    """Read an autoencoder: one of `VAES` by name, from the hub, or a file or folder in diffusers' layout.

    Also returns its name or path with the CRC-32 of its weights. Its shape is read from the `config.json` beside the
    weights, and is Stable Diffusion's where there is none.
    """
    if source in VAES and not Path(source).exists():
        file, config = weights.read(weights.fetch(*VAES[source])), None
    elif not Path(source).exists():
        raise ValueError(f"there is no autoencoder {source!r}; give {', '.join(VAES)}, or the path of a file or folder")
    else:
        file, config = _open(Path(source), part="vae")
    model = convert.vae_from_torch(file.tensors, VAEConfig() if config is None else _vae_config(source, config))
    crc = 0
    for leaf in jax.tree.leaves(model):
        crc = zlib.crc32(np.asarray(leaf).data, crc)
    return model, f"{source} (CRC-32 {crc:08x})"


def check_scale(vae: AutoencoderKL, name: str, scale: float | None) -> None:
    """Raise ValueError for an autoencoder of another scale than that of the latents, where that is known."""
    if scale not in (None, vae.config.scale):
        raise ValueError(
            f"the autoencoder {name} scales latents by {vae.config.scale}, those of the data by {scale}; give the one"
            " that made them"
        )


def is_run(source: Path) -> bool:
    """Whether a path is the folder of a run."""
    return (source / runs.CONFIG).is_file() and (source / "checkpoints").is_dir()


def _open(source: Path, part: str = "transformer") -> tuple[WeightFile, dict[str, Any] | None]:
    """The weights at a path, and what `config.json` beside them says if it is diffusers'."""
    if source.is_dir():
        folder = source / part if (source / part).is_dir() else source
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise ValueError(f"{source} is neither a run nor a folder with {' or '.join(names)}")
        file = found[0]
    else:
        file = source
    beside = file.with_name("config.json")
    config = None
    if beside.is_file():
        try:
            config = json.loads(beside.read_text())
        except ValueError as error:
            raise ValueError(f"{beside} is damaged ({error}); fetch it anew, or remove it") from error
        config = config if isinstance(config, dict) and "_class_name" in config else None
    return weights.read(file), config


def _layout(source: Path, file: WeightFile) -> str:
    if _METADATA in file.metadata:
        return "ditx"
    if "x_embedder.proj.weight" in file.tensors:
        return "authors"
    if "pos_embed.proj.weight" in file.tensors:
        return "diffusers"
    some = ", ".join(list(file.tensors)[:3])
    raise ValueError(f"{source} holds no DiT of ditx, of the authors or of diffusers; its tensors are {some}, ...")


def _infer(
    source: Path, tensors: Mapping[str, np.ndarray], config: dict[str, Any] | None, overrides: dict[str, int]
) -> DiTConfig:
    """The configuration that the shapes of another program's weights tell."""
    authors = "x_embedder.proj.weight" in tensors
    names = (
        (
            "x_embedder.proj.weight",
            "y_embedder.embedding_table.weight",
            "blocks.0.mlp.fc1.bias",
            "final_layer.linear.bias",
        )
        if authors
        else (
            "pos_embed.proj.weight",
            "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
            "transformer_blocks.0.ff.net.0.proj.bias",
            "proj_out_2.bias",
        )
    )
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{source} is no complete DiT: {', '.join(missing)} missing among {len(tensors)} tensors")
    (width, channels, patch, _), (rows, _), (mlp,), (out,) = (tensors[name].shape for name in names)
    depth = len({found[1] for name in tensors if (found := re.match(r"(?:transformer_)?blocks\.(\d+)\.", name))})
    given = config or {}
    heads = overrides.get("num_heads") or given.get("num_attention_heads") or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"{source} has width {width}, for which no number of heads is known; convert with --num-heads")
    side = (
        round(tensors["pos_embed"].shape[1] ** 0.5) * patch if "pos_embed" in tensors else given.get("sample_size", 32)
    )
    classes = overrides.get("num_classes") or given.get("num_embeds_ada_norm") or rows - 1
    return DiTConfig(
        input_size=side,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp / width,
        num_classes=classes,
        label_dropout=0.1 if rows > classes else 0.0,
        learn_sigma=out == 2 * channels * patch**2,
        frequency_shift=overrides.get("frequency_shift", 0 if authors else 1),
    )


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
    fields |= {"block_channels": tuple(fields["block_channels"])} if "block_channels" in fields else {}
    return VAEConfig(**fields)
