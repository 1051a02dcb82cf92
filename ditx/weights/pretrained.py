"""Trained networks, wherever they come from: our runs, our files, those of the authors and of diffusers, or the hub."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

from ditx.data import imagenet
from ditx.diffusion.objective import ObjectiveConfig
from ditx.nn.dit import DiT, DiTConfig
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import shard_host_array
from ditx.sampling import SamplingConfig
from ditx.training import checkpoint
from ditx.training import run as runs
from ditx.weights import convert, files
from ditx.weights.files import WeightFile

# Weights do not tell the number of heads; these are the published ones, by width.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_METADATA = "ditx"


@dataclass(frozen=True)
class Description:
    """What one must know of a trained network to draw from it."""

    model: DiTConfig
    objective: ObjectiveConfig
    sampling: SamplingConfig
    """how it is usually drawn from"""
    class_names: tuple[str, ...]
    vae: str = ""
    """name or path of the autoencoder for its latents, where that is known"""
    latent_scale: float | None = None
    """that autoencoder's scale, where it is known"""

    @classmethod
    def of(cls, told: Any, source: object) -> "Description":
        """From the fields of a run's configuration. Raises ValueError if they are none of this version's."""
        try:

            def tuples(told) -> dict[str, Any]:  # JSON has none.
                return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}

            told = _in_todays_fields(told)
            described = cls(
                DiTConfig(**told["model"]),
                ObjectiveConfig(**tuples({field.name: told[field.name] for field in fields(ObjectiveConfig)})),
                SamplingConfig(**tuples(told["sampling"])),
                tuple(told["class_names"]),
                told.get("vae") or told.get("latents", {}).get("vae", "").rsplit(" (CRC-32", 1)[0],
                told.get("latent_scale") or told.get("latents", {}).get("scale"),
            )
            described.objective.check(described.model.learn_sigma and not described.model.sit)
            if len(described.class_names) != described.model.num_classes:
                raise ValueError(f"{len(described.class_names)} class names for {described.model.num_classes} classes")
            return described
        except Exception as error:  # Of checked types, too, which raise their own kind.
            what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise ValueError(f"{source} was written by another version of ditx, or is damaged ({what})") from error


def describe(source: Path, **overrides: int) -> Description:
    """Describe a run's folder or a file of weights, without reading the weights.

    `overrides` are fields of `DiTConfig` that files of other programs do not tell: `num_heads` for widths that were
    never published, `num_classes` where the label table has no null row, `input_size`, `frequency_shift`, and `sit` for
    SiT's, which are like DiT's.
    """
    told = None
    if is_run(source):
        told = runs.read_config(source)
    else:
        file, config = open_weights(source)
        layout = _layout(source, file)
        if layout != "ditx":
            model = _infer(source, layout, file.tensors, config or {}, overrides)
            return _described(model, ObjectiveConfig("flow", "velocity") if model.sit else ObjectiveConfig())
        with suppress(ValueError):  # Such fields are of no description, as is said below.
            told = json.loads(file.metadata[_METADATA])
    if overrides:
        raise ValueError(f"{source} tells {', '.join(overrides)} itself; leave that out")
    return Description.of(told, source)


def _in_todays_fields(told: dict[str, Any]) -> dict[str, Any]:
    """A description with the fields of `ObjectiveConfig`; version 0.1 had `objective`, and older runs fewer fields."""
    if not isinstance(told.get("objective"), str):
        return asdict(ObjectiveConfig()) | told
    name, is_flow = told["objective"], told["objective"] in ("flow", "sit")
    uniform = told.get("flow_density") == "uniform"
    return told | {
        "model": told["model"] | ({"sit": True} if name == "sit" else {}),
        "schedule": "flow" if is_flow else told.get("schedule", "linear"),
        "prediction": told.get("prediction", "velocity") if is_flow else name,
        "loss_weight": told.get("weighting", "none"),
        "flow_times": "uniform" if uniform else told.get("flow_time", (0.0, 1.0)),
        "flow_shift": told.get("flow_shift", 1.0),
    }


def _described(model: DiTConfig, objective: ObjectiveConfig) -> Description:
    """What one draws from a released network with, and its classes."""
    objective.check(model.learn_sigma and not model.sit)
    # The settings of the authors' sample.py, and of SiT's for the SDE.
    sampler = "euler-maruyama" if objective.is_flow else "ddpm"
    sampling = SamplingConfig(sampler=sampler, steps=250, guidance_scale=4.0, guidance_channels=3)
    if model.null_label is None or not model.learn_sigma or model.in_channels < 3:
        sampling = SamplingConfig()
    count = model.num_classes
    names = tuple(imagenet.classes()) if count == 1000 else tuple(map(str, range(count)))
    return Description(model, objective, sampling, names)


def load(source: Path, description: Description, places: Any = None, *, step: int = 0) -> tuple[DiT, str]:
    """Read the averaged weights of what `describe` described, where `places` (shapes with shardings) has them lie.

    That is the first device if it is not given. Of a run, they are those of the newest sound checkpoint, or of the one
    at `step`. Also returns a sentence on what was read. Raises ValueError if it is damaged or does not fit.
    """
    if places is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.jit(lambda key: DiT(description.model, key=key), out_shardings=first).eval_shape(jax.random.key(0))
    if is_run(source):
        if step:
            return checkpoint.load(source / "checkpoints", step, {"ema": places})["ema"], f"{source} at step {step:,}"
        restored = checkpoint.load_newest(source / "checkpoints", {"ema": places})
        if restored is None:
            raise ValueError(f"{source} has no checkpoint yet; let train.py reach its first")
        step, trees, damaged = restored
        passed_over = "".join(f"; warning: {sentence}; passed over" for _, sentence in damaged)
        return trees["ema"], f"{source} at step {step:,}{passed_over}"
    file, _ = open_weights(source)
    layout = _layout(source, file)
    if layout == "ditx":
        model = convert.dit_from_arrays(file.tensors, description.model)
    elif layout == "authors":
        model = convert.dit_from_torch(file.tensors, description.model)
        fixed = convert.fixed_positions(description.model)
        found = file.tensors.get("pos_embed", fixed)
        if found.shape != fixed.shape or not np.allclose(found, fixed, atol=1e-3):  # as much as half precision may lose
            raise ValueError(
                f"{source} has a pos_embed of {found.shape} that is not the sine-cosine one of {fixed.shape}; a network"
                " with positions of its own is not supported"
            )
    else:
        shift = description.model.frequency_shift
        model = convert.dit_from_diffusers(file.tensors, description.model, frequency_shift=shift)
    model = jax.tree.map(lambda leaf, place: shard_host_array(leaf, place.sharding), model, places)
    return model, f"{source} in the layout of {layout}{', ' + file.note if file.note else ''}"


def describe_initial(source: Path, model: DiTConfig) -> Description:
    """Describe the run or file of weights that such a network begins with.

    Raises ValueError where they differ in more than labels.
    """
    described = describe(source)
    rows = ("num_classes", "label_dropout")
    wanted = replace(model, **{name: getattr(described.model, name) for name in rows})
    changed = runs.diff(asdict(described.model), asdict(wanted))
    if changed:
        raise ValueError(f"{source} holds another network: {changed}; give the flags that make the two agree")
    return described


def load_initial(source: Path, fresh: DiT, mesh: Mesh) -> tuple[DiT, str]:
    """The averaged weights of a run or file for a network like `fresh` to begin with, and a sentence on what was read.

    The label table is that of `fresh` where its rows differ. Raises ValueError as `describe_initial` and `load` do.
    """
    described = describe_initial(source, fresh.config)
    shapes = jax.eval_shape(lambda key: DiT(described.model, key=key), jax.random.key(0))
    model, note = load(source, described, with_shardings(shapes, mesh))
    if model.label.table.shape != fresh.label.table.shape:
        had, has = model.label.table.shape[0], fresh.label.table.shape[0]
        model = eqx.tree_at(lambda m: m.label.table, model, fresh.label.table)
        note += f"; its label table had {had:,} rows and now has {has:,}, which begin anew"
    return jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(model)), note


def write(path: Path, model: DiT, description: Description, dtype: Any = np.float32) -> None:
    """Write a new `.safetensors` file of our own, which `describe` and `load` read."""
    described = json.dumps(asdict(replace(description, model=model.config)) | asdict(description.objective))
    arrays = {name: array.astype(dtype) for name, array in convert.dit_to_arrays(model).items()}
    files.write_safetensors(path, arrays, {"format": "np", _METADATA: described})


def is_run(source: Path) -> bool:
    """Whether a path is the folder of a run."""
    return (source / runs.CONFIG).is_file() and (source / "checkpoints").is_dir()


def open_weights(source: Path, part: str = "transformer") -> tuple[WeightFile, dict[str, Any] | None]:
    """The weights at a path, and what `config.json` beside them says if it is diffusers'."""
    if source.is_dir():
        folder = source / part if (source / part).is_dir() else source
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise ValueError(f"{source} is neither a run nor a folder with {' or '.join(names)}")
        file = found[0]
    elif not source.exists():
        raise ValueError(f"{source}: there is no such file or folder; give that of a run, or of weights")
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
    return files.read(file), config


def _layout(source: Path, file: WeightFile) -> str:
    if _METADATA in file.metadata:
        return "ditx"
    for layout, beginnings in {
        "diffusers": ("transformer_blocks.", "pos_embed.proj.", "proj_out_"),
        "authors": ("x_embedder.", "t_embedder.", "y_embedder.", "blocks.", "final_layer."),
    }.items():
        if any(name.startswith(beginnings) for name in file.tensors):
            return layout
    some = ", ".join(list(file.tensors)[:3])
    raise ValueError(f"{source} holds no DiT of ditx, of the authors or of diffusers; its tensors are {some}, ...")


def _infer(
    source: Path, layout: str, tensors: Mapping[str, np.ndarray], config: dict[str, Any], overrides: dict[str, int]
) -> DiTConfig:
    """The configuration that the shapes of another program's weights, and diffusers' `config`, tell.

    What tensors that are missing or mis-shaped would tell is that of DiT-XL/2, so that reading can name all faults.
    """

    def shape(name, rank):
        found = tensors[name].shape if name in tensors else ()
        return found if len(found) == rank and all(found) else None

    authors = layout == "authors"
    time, label, mlp, final, patch = (
        ("t_embedder.mlp.2", "y_embedder", "blocks.0.mlp.fc1", "final_layer.linear", "x_embedder.proj")
        if authors
        else (
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
            "transformer_blocks.0.norm1.emb.class_embedder",
            "transformer_blocks.0.ff.net.0.proj",
            "proj_out_2",
            "pos_embed.proj",
        )
    )
    (width,) = shape(f"{time}.bias", 1) or (1152,)
    _, channels, side, _ = shape(f"{patch}.weight", 4) or (width, 4, 2, 2)
    rows, _ = shape(f"{label}.embedding_table.weight", 2) or (1001, width)
    (mlp_size,) = shape(f"{mlp}.bias", 1) or (4 * width,)
    (out,) = shape(f"{final}.bias", 1) or (2 * channels * side**2,)
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"(?:transformer_)?blocks\.(\d{1,4})\.", name))]
    fields: dict[str, Any] = {
        "patch_size": side,
        "in_channels": channels,
        "hidden_size": width,
        "depth": max(numbers, default=27) + 1,
        "mlp_ratio": mlp_size / width,
        "learn_sigma": out == 2 * channels * side**2,
        "frequency_shift": overrides.get("frequency_shift", 0 if authors else 1),
        "sit": bool(overrides.get("sit")),
    }
    if config:
        _check_transformer(source, config, fields)
    heads: Any = overrides.get("num_heads", config.get("num_attention_heads", _HEADS.get(width)))
    if heads is None:
        raise ValueError(f"{source} has width {width}, for which no number of heads is known; convert with --num-heads")
    positions = shape("pos_embed", 3)
    size: Any = overrides.get("input_size", config.get("sample_size"))
    if size is None and authors:
        size = math.isqrt(positions[1]) * side if positions else 32
    if size is None:
        raise ValueError(f"{source} does not tell its input size; put its config.json beside it, or give --input-size")
    classes: Any = overrides.get("num_classes", config.get("num_embeds_ada_norm", rows - 1))
    for name, value in {"num_heads": heads, "input_size": size, "num_classes": classes}.items():
        if not isinstance(value, int):
            raise ValueError(f"{source} has {name} {value!r}, which is no whole number; mend its config.json")
    dropout = 0.1 if rows > classes else 0.0
    return DiTConfig(input_size=size, num_heads=heads, num_classes=classes, label_dropout=dropout, **fields)


def _check_transformer(source: Path, config: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raise ValueError where diffusers' description is of another network than a DiT, or than the weights beside it."""
    width, heads = fields["hidden_size"], config.get("num_attention_heads")
    expected = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
        "num_layers": fields["depth"],
        "patch_size": fields["patch_size"],
        "in_channels": fields["in_channels"],
        "attention_head_dim": width // heads if isinstance(heads, int) and heads > 0 else None,
    }
    differing = [f"{name} {config[name]!r}" for name, value in expected.items() if config.get(name, value) != value]
    if differing:
        raise ValueError(f"the config.json of {source} is not that of such a DiT: {', '.join(differing)}")
