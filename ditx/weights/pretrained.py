"""Trained networks: `describe` and `load` runs, our own files, and those of the authors, SiT and diffusers."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

from ditx.checks import check_choice
from ditx.data import imagenet
from ditx.diffusion.objective import ObjectiveConfig
from ditx.files import first_line
from ditx.nn.blocks import BlockStyle, find_block
from ditx.nn.dit import DIT_CONFIGS, Convention, DiT, DiTConfig
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import shard_host_array
from ditx.sampling import SamplingConfig
from ditx.training import checkpoint
from ditx.training import run as runs
from ditx.training.config import PRESETS
from ditx.weights import convert, files, hub
from ditx.weights.files import WeightFile

# Fields of the `config.json` of diffusers' DiTs that are the same for all of them.
DIFFUSERS_DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
# The class of DiTs in diffusers before 2024, and the defaults of its fields that say otherwise.
_OLD_CLASS = {"_class_name": "Transformer2DModel", "norm_type": "layer_norm", "activation_fn": "geglu"}
_POSITIONS = {"authors": "pos_embed", "diffusers": "pos_embed.pos_embed"}
Weights: TypeAlias = Literal["ema", "live"]
_CONTEXT_START = {768: 4, 1024: 8, 1280: 10}  # of JiT's published widths
_METADATA = "ditx"  # key of the description in the metadata of our files


@dataclass(frozen=True)
class SourceConfig:
    """Which of a run's weights to take, and facts that files of other programs do not tell."""

    weights: Weights = "ema"
    """of a run: the averaged weights, or the live ones that training updates"""
    step: int = 0
    """of a run: the step of a kept checkpoint; 0: the newest"""
    convention: Convention | None = None
    """sit for a checkpoint of SiT, repa for one of REPA; the file does not tell, since DiT's have the same tensors"""
    context_start: int | None = None
    """for a JiT of a width that was never published: block, from 0, before which the context tokens enter"""
    num_heads: int | None = None
    """for a source of a width that was never published"""
    num_classes: int | None = None
    """for a source without a null label; otherwise classes are one fewer than rows of the label table"""
    input_size: int | tuple[int, int] | None = None
    """for a rectangle, or a file without positions and without diffusers' config.json: side, or height and width"""
    frequency_shift: int | None = None
    """for a source of diffusers: 0 if its weights were trained in the authors' program and then converted"""

    def facts(self) -> dict[str, Any]:
        """The facts given, for `describe`."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: value for name, value in facts.items() if value is not None}

    def choice(self) -> dict[str, Any]:
        """The choice of weights, for `load`."""
        return {"weights": self.weights, "step": self.step}


@dataclass(frozen=True)
class Description:
    """Everything about a trained network that sampling needs, except its weights."""

    model: DiTConfig
    objective: ObjectiveConfig
    sampling: SamplingConfig
    """the run's sampler settings, or the published ones"""
    class_names: tuple[str, ...]
    vae: str = ""
    """name or path of the autoencoder of the latents, if known"""
    latent_scale: float | None = None
    """scale of that autoencoder, if known"""

    @classmethod
    def of(cls, config: Any, source: object, block: type | None = None) -> "Description":
        """The description in a run's `config.json` or in a file's metadata; `block` is the class of its own blocks.

        Raises ValueError if this version cannot read it.
        """

        def tuples(config: dict[str, Any]) -> dict[str, Any]:  # JSON has only lists.
            return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}

        if isinstance(config, dict) and isinstance(name := config.get("model", {}).get("block"), str):
            config = config | {"model": config["model"] | {"block": find_block(name, block, source)}}
        try:
            config = _first_edition(config) if isinstance(config.get("objective"), str) else config
            objective = {field.name: config[field.name] for field in fields(ObjectiveConfig) if field.name in config}
            latents, model = config.get("latents", {}), tuples(config["model"])
            sit: Any = {"convention": "sit"} if model.pop("sit", False) else {}  # a field of older files
            description = cls(
                DiTConfig(**model, **sit),
                ObjectiveConfig(**tuples(objective)),
                SamplingConfig(**tuples(config["sampling"])),
                tuple(config["class_names"]),
                config.get("vae") or latents.get("vae", "").rsplit(" (CRC-32", 1)[0],
                config.get("latent_scale") or latents.get("scale"),
            )
            description.objective.check(description.model.trains_variance)
            names, classes = len(description.class_names), description.model.num_classes
            if names != classes:
                raise ValueError(f"{names} class names for {classes} classes")
            return description
        except Exception as error:  # Type checks raise types of their own.
            cause = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"{source} was written by another version of ditx, or is damaged ({cause})") from error

    def check_guides(self, described: "Description") -> None:
        """Raise ValueError if this network cannot guide the described one."""
        for part, names in (("objective", ("schedule", "prediction")), ("model", ("input_size", "in_channels"))):
            for name in names:
                theirs, ours = (getattr(getattr(each, part), name) for each in (self, described))
                if theirs != ours:
                    raise ValueError(
                        f"{name} of --guide is {theirs}, but of the network {ours}; give a guide of the same kind"
                    )
        if self.model.num_classes and self.class_names != described.class_names:
            raise ValueError("the classes of --guide are not those of the network; give one with the same, or none")


def describe(source: Path | str, *, block: type | None = None, **overrides: Any) -> Description:
    """Describe a run's folder, a file of weights or a name of `hub.find`, without reading the weights.

    `block` is the class of blocks of one's own. `overrides` are the fields of `SourceConfig` that files of other
    programs do not tell.
    """
    config = None
    if is_run(source):
        config = runs.read_config(Path(source))
    else:
        file, diffusers_config = open_weights(source)
        layout = _layout(source, file)
        if layout != "ditx":
            pipeline = diffusers_config or {}
            model = _infer(source, layout, file.tensors, pipeline, overrides)
            names = _class_names(source, pipeline.get("id2label"), model.num_classes)
            described = Description(model, *published(model), names)
            own_vae = "vae" in pipeline and (hub.is_name(source) or (Path(source) / "vae").is_dir())
            return replace(described, vae=str(source) if own_vae else "ft-mse" if str(source) in hub.AUTHORS else "")
        with suppress(ValueError):  # `Description.of` raises for None.
            config = json.loads(file.metadata[_METADATA])
    if overrides:
        raise ValueError(f"{source} tells {', '.join(overrides)} itself; leave that out")
    return Description.of(config, source, block)


def load(
    source: Path | str, description: Description, shapes: Any = None, *, step: int = 0, weights: Weights = "ema"
) -> tuple[DiT, str]:
    """Read the weights of a source that `describe` described, and a sentence on where they come from.

    `shapes` (`jax.ShapeDtypeStruct`s with shardings) places them, by default on the first device. Of a run, reads the
    averaged or the live weights of the newest sound checkpoint, or of the one at `step`. Raises ValueError if the
    source is damaged or does not fit.
    """
    check_choice("weights", weights, get_args(Weights))
    if shapes is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.jit(lambda key: DiT(description.model, key=key), out_shardings=first).eval_shape(jax.random.key(0))
    if is_run(source):
        return _load_run(Path(source), shapes, step, weights)
    if step or weights != "ema":
        raise ValueError(
            f"{source} is not a run, so it has no steps and no live weights; leave --step and --weights out"
        )
    file, _ = open_weights(source)
    layout, config = _layout(source, file), description.model
    if layout == "ditx":
        model = convert.dit_from_arrays(file.tensors, config)
    elif layout == "diffusers":
        model = convert.dit_from_diffusers(file.tensors, config, frequency_shift=config.frequency_shift)
    else:
        model = convert.dit_from_torch(file.tensors, config)
    for name, fixed in convert.fixed_tables(config).items() if layout != "ditx" else ():
        table = file.tensors.get(name if layout == "authors" else _POSITIONS[layout], fixed).astype(np.float32)
        kind = "rotary" if "rope" in name else "sine-cosine"
        if table.shape != fixed.shape or not np.allclose(table, fixed, atol=4e-3):  # room for bfloat16
            raise ValueError(
                f"{source} has a {name} of {table.shape} that is not the {kind} one of {fixed.shape}; networks with"
                " other positions are not supported"
            )
    model = jax.tree.map(lambda leaf, shape: shard_host_array(leaf, shape.sharding), model, shapes)
    return model, f"{source} in the layout of {layout}{', ' + file.note if file.note else ''}"


def _load_run(run: Path, shapes: Any, step: int, weights: str) -> tuple[DiT, str]:
    folder, tree, live = run / "checkpoints", "ema" if weights == "ema" else "model", ", live weights"
    if step:
        if step not in (steps := checkpoint.steps(folder)):
            kept = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"{run} has no checkpoint of step {step:,}; choose a step that it keeps: {kept}")
        trees, damaged = checkpoint.load(folder, step, {tree: shapes}), []
    elif restored := checkpoint.load_newest(folder, {tree: shapes}):
        step, trees, damaged = restored
    else:
        raise ValueError(f"{run} has no checkpoint yet; wait until training writes the first")
    skipped = "".join(f"; warning: {sentence}; skipped" for _, sentence in damaged)
    return trees[tree], f"{run} at step {step:,}{live if tree == 'model' else ''}{skipped}"


def load_on_mesh(
    source: Path | str, description: Description, mesh: Mesh, dtype: str, **choice: Any
) -> tuple[DiT, str]:
    """`load` onto a mesh, in `dtype`; `choice` is its `step` and `weights`."""
    shapes = jax.eval_shape(lambda key: DiT(description.model, key=key), jax.random.key(0))
    model, note = load(source, description, with_shardings(shapes, mesh), **choice)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model), note


def describe_initial(source: Path | str, model: DiTConfig) -> Description:
    """Describe the run or file from which a network of configuration `model` starts.

    Raises ValueError if they differ in more than the labels.
    """
    description = describe(source, block=model.own_block)
    labels = {name: getattr(description.model, name) for name in ("num_classes", "label_dropout")}
    changes = runs.diff(description.model.described(), replace(model, **labels).described())
    if changes:
        raise ValueError(f"{source} holds another network: {changes}; change the flags to match it")
    return description


def load_initial(source: Path | str, fresh: DiT, mesh: Mesh) -> tuple[DiT, str]:
    """The averaged weights of a run or file from which a network like `fresh` starts, and a sentence on their origin.

    The label table stays that of `fresh` if the numbers of rows differ. Raises ValueError as `describe_initial` and
    `load` do.
    """
    description = describe_initial(source, fresh.config)
    shapes = jax.eval_shape(lambda key: DiT(description.model, key=key), jax.random.key(0))
    model, note = load(source, description, with_shardings(shapes, mesh))
    before, now = (len(network.label.table) for network in (model, fresh))
    if before != now:
        model = eqx.tree_at(lambda m: m.label.table, model, fresh.label.table)
        note += f"; its label table had {before:,} rows, the new one has {now:,} and starts from random values"
    return jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(model)), note


def write(path: Path, model: DiT, description: Description, dtype: Any = np.float32) -> None:
    """Write a new `.safetensors` file in our layout, for `describe` and `load`."""
    config = asdict(replace(description, model=model.config))
    config |= config.pop("objective") | {"model": model.config.described()}
    arrays = {name: array.astype(dtype) for name, array in convert.dit_to_arrays(model).items()}
    files.write_safetensors(path, arrays, {"format": "np", _METADATA: json.dumps(config)})


def is_run(source: Path | str) -> bool:
    """Whether a path is the folder of a run."""
    return (Path(source) / runs.CONFIG).is_file() and (Path(source) / "checkpoints").is_dir()


def open_weights(source: Path | str, part: str = "transformer") -> tuple[WeightFile, dict[str, Any] | None]:
    """The weights at a path or with a name of `hub.find`, and diffusers' `config.json` beside them, if there is one.

    A pipeline's `id2label` is added to the configuration of its networks.
    """
    path, variant = hub.find(source, part), ""
    if path.is_dir():
        found = hub.find_in(path, part)
        if found is None:
            raise ValueError(
                f"{source} is neither a run nor a folder with diffusion_pytorch_model.safetensors or .bin; give one"
            )
        path, variant = found
    file, config = files.read(path), _read_json(path.with_name("config.json"))
    if variant:
        file = file._replace(note=f"variant {variant!r}{', ' + file.note if file.note else ''}")
    if "_class_name" not in config:
        return file, None
    folder = path.parents[1] if path.parent.name == part else path.parent
    return file, _read_json(folder / "model_index.json") | config


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file, or something else in it."""
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again, or remove it") from error
    return value if isinstance(value, dict) else {}


def check_config(source: object, config: dict[str, Any], supported: dict[str, Any]) -> None:
    """Raise ValueError if diffusers' `config.json` of a network sets fields to values that are not supported."""
    differing = [f"{name} {config[name]!r}" for name, value in supported.items() if config.get(name, value) != value]
    if differing:
        raise ValueError(f"the config.json of {source} is of a network that is not supported: {', '.join(differing)}")


def _layout(source: object, file: WeightFile) -> str:
    if _METADATA in file.metadata:
        return "ditx"
    for layout in ("authors", "diffusers"):
        if any(name in file.tensors for name in convert.dit_tensor_names(layout, DiTConfig()).values()):
            return layout
    names = ", ".join(list(file.tensors)[:3])
    raise ValueError(f"{source} has no DiT of ditx, of the authors or of diffusers; its tensors are {names}, ...")


def _first_edition(config: dict[str, Any]) -> dict[str, Any]:
    """A description of ditx 0.1 with today's fields: its `objective` was eps, x0, v, flow or sit."""
    name, flow = config["objective"], config["objective"] in ("flow", "sit")
    logit_normal = config.get("flow_time", (0.0, 1.0))
    return config | {
        "model": config["model"] | {"sit": name == "sit"},
        "schedule": "flow" if flow else config.get("schedule", "linear"),
        "prediction": config.get("prediction", "velocity") if flow else name,
        "loss_weight": config.get("weighting", "none"),
        "flow_times": "uniform" if config.get("flow_density") == "uniform" else logit_normal,
    }


def _class_names(source: object, id2label: Any, num_classes: int) -> tuple[str, ...]:
    """The names in diffusers' `id2label`; without it, ImageNet's for 1,000 classes, else numbers."""
    ours = imagenet.classes()
    if id2label is None:
        return tuple(ours) if num_classes == 1000 else tuple(map(str, range(num_classes)))
    labels: dict[Any, Any] = id2label if isinstance(id2label, dict) else {str(k): x for k, x in enumerate(id2label)}
    names = [labels.get(str(k)) for k in range(num_classes)]
    if None in names:
        raise ValueError(f"id2label of {source} has no name for class {names.index(None)} of {num_classes}; add it")
    names = tuple(map(str, names))
    firsts = [name.split(",")[0] for name in names]  # ImageNet's classes keep their identifiers
    return tuple(ours) if firsts == [own[0] for own in ours.values()] else names


def published(model: DiTConfig) -> tuple[ObjectiveConfig, SamplingConfig]:
    """The objective of a published network, and its sampler with the published settings."""
    if model.convention == "jit" or (model.convention == "sit" and model.style != BlockStyle()):
        alike = [preset for preset in PRESETS.values() if preset.model.convention == model.convention]
        nearest = min(alike, key=lambda preset: abs(preset.model.hidden_size - model.hidden_size))
        objective = ObjectiveConfig(**{field.name: getattr(nearest, field.name) for field in fields(ObjectiveConfig)})
        sampling = nearest.sampling
    elif model.convention == "dit":
        objective = ObjectiveConfig()
        sampling = SamplingConfig("ddpm", 250, guidance_scale=4.0, guidance_channels=3)
    else:
        objective = ObjectiveConfig("flow", "velocity")
        sampling = SamplingConfig("euler-maruyama", 250, guidance_scale=4.0, guidance_channels=3)
        if model.convention == "repa":
            sampling = SamplingConfig("euler-maruyama", 250, guidance_scale=1.8, guidance_interval=(0.0, 700.0))
    unpublished = model.convention == "dit" and not model.learn_sigma
    guided = model.null_label is not None and model.in_channels >= 3 and not unpublished
    return objective, sampling if guided else SamplingConfig()


def _infer_layers(source: object, tensors: Mapping[str, np.ndarray], overrides: dict[str, Any]) -> dict[str, Any]:
    """The kinds of layers in a file of the authors, LightningDiT, JiT, SiT or REPA, by the names of its tensors."""

    def size(name: str, axis: int = 0) -> int:
        shape = tensors[name].shape if name in tensors else ()
        return shape[axis] if len(shape) > axis else 0

    names = ("blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "feat_rope.freqs_cos", "x_embedder.proj1.weight")
    rms, swiglu, rope, jit = (name in tensors for name in names)
    qk_norm, lightning = "blocks.0.attn.q_norm.weight" in tensors, rms or swiglu or rope
    if qk_norm and not lightning and "convention" not in overrides:
        raise ValueError(f"{source} has a q_norm, as LightningDiT's and REPA's networks; give --convention sit or repa")
    context_tokens = size("in_context_posemb", 1)
    start = _CONTEXT_START.get(size("t_embedder.mlp.0.bias"), overrides.get("context_start"))
    if context_tokens and start is None:
        raise ValueError(f"{source} does not tell where its context tokens enter; give --context-start, a block")
    modulation = size("blocks.0.adaLN_modulation.1.bias")
    return {
        "norm": "rms" if rms else "layer",
        "qk_norm": qk_norm,
        "mlp": "swiglu" if swiglu else "gelu",
        "positions": "both" if rope or jit else "sincos",
        "modulation_shift": not modulation or modulation != 2 * size("final_layer.adaLN_modulation.1.bias"),
        "context_tokens": context_tokens,
        "context_start": start if context_tokens else 0,
        "patch_bottleneck": size("x_embedder.proj1.weight"),
        "convention": "jit" if jit else "sit" if lightning else "dit",
    }


_HEADS = {published.hidden_size: published.num_heads for published in DIT_CONFIGS.values()} | {1280: 16}


def _infer(
    source: object, layout: str, tensors: Mapping[str, np.ndarray], config: dict[str, Any], overrides: dict[str, Any]
) -> DiTConfig:
    """The configuration from the shapes of another program's tensors and, for diffusers, its `config.json`.

    A tensor that is missing or mis-shaped is taken to be DiT-XL/2's, so that `load` can name all faults at once.
    """
    layers = _infer_layers(source, tensors, overrides) if layout == "authors" else {}
    kinds = DiTConfig(**layers)  # of another size
    names = {"positions": _POSITIONS[layout], **convert.dit_tensor_names(layout, kinds)}
    if config.get("_class_name") == "Transformer2DModel":
        config = _OLD_CLASS | config | {"_class_name": "DiTTransformer2DModel"}

    def shape(path: str, default: tuple[int, ...]) -> tuple[int, ...]:
        name = names.get(path, path)
        actual = tensors[name].shape if name in tensors else ()
        return actual if len(actual) == len(default) and all(actual) else default

    (width,) = shape("time.down.bias", (1152,))
    patches = "bottleneck.weight" if kinds.patch_bottleneck else "patch.weight"
    _, channels, side, _ = shape(patches, (width, 4, 2, 2))
    rows, _ = shape("label.table", (1001, width))
    _, mlp_size = shape("blocks.mlp.down.weight", (width, 4 * width))
    _, tokens, _ = shape("positions", (1, (32 // side) ** 2, width))
    eps = config.get("norm_eps", 1e-5) if layout == "diffusers" and overrides.get("frequency_shift") != 0 else 1e-6
    if not isinstance(eps, float):
        raise ValueError(f"{source} has norm_eps {eps!r}, not a number; correct its config.json")
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"(?:transformer_)?blocks\.(\d{1,4})\.", name))]
    (head_width,) = shape("blocks.attention.q_norm.weight", (shape("feat_rope.freqs_cos", (tokens, 0))[1],))
    outputs = (2 * channels * side**2,)
    model: dict[str, Any] = {
        "patch_size": side,
        "in_channels": channels,
        "hidden_size": width,
        "depth": max(blocks, default=27) + 1,
        "mlp_ratio": _mlp_ratio(mlp_size, width, kinds.mlp),
        "learn_sigma": shape("final.linear.bias", outputs) == outputs,
        "frequency_shift": int(layout == "diffusers"),
        "num_heads": config.get("num_attention_heads", width // head_width if head_width else _HEADS.get(width)),
        "input_size": math.isqrt(tokens) * side if names["positions"] in tensors else config.get("sample_size"),
        "num_classes": config.get("num_embeds_ada_norm", rows - 1),
        "mlp_norm_eps": eps,
        **layers,
        **overrides,
    }
    if model["num_heads"] is None:
        raise ValueError(f"{source} has width {width}, whose number of heads is unknown; give --num-heads")
    if model["input_size"] is None:
        advice = "give --input-size, the side of the latents" + ", or its config.json" * (layout == "diffusers")
        raise ValueError(f"{source} has no positions, so that its input size is unknown; {advice}")
    for name in ("num_heads", "input_size", "num_classes"):
        if not isinstance(model[name], int | tuple):
            raise ValueError(f"{source} has {name} {model[name]!r}, not a whole number; correct its config.json")
    supported = DIFFUSERS_DIT | {
        "num_layers": model["depth"],
        "patch_size": side,
        "in_channels": channels,
        "attention_head_dim": width // max(model["num_heads"], 1),
    }
    check_config(source, config, supported)
    return DiTConfig(**model, label_dropout=0.1 if rows > model["num_classes"] else 0.0)


def _mlp_ratio(mlp_size: int, width: int, kind: str) -> float:
    """The `mlp_ratio` of an MLP of this width; SwiGLU rounds, so that several ratios give it."""
    if kind == "gelu":
        return mlp_size / width
    return 4.0 if int(2 / 3 * (4 * width)) == mlp_size else (math.ceil(1.5 * mlp_size) + 0.5) / width
