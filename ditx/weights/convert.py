"""Conversions between our networks and the layouts of other programs: mappings from tensor names to NumPy arrays.

A layout is a table of rows (tensor name, attribute path of our array, einops pattern from our array to the tensor). A
field in braces in a tensor name is an axis of the pattern: they have one tensor for each index, we have one array. A
field that is not in the pattern marks copies of the same tensor. Both directions read the same table. Arrays that are
read become float32.
"""

import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ditx.nn.dit import LAYER_FIELDS, DiT, DiTConfig
from ditx.nn.embeddings import grid_positions
from ditx.nn.inception import ConvUnit, Inception
from ditx.nn.layers import rotary_angles
from ditx.nn.vae import AutoencoderKL, VAEConfig

StateDict = Mapping[str, np.ndarray]
Layout = list[tuple[str, str, str]]
Fields = Mapping[str, Sequence[str | int]]
Model = TypeVar("Model", bound=eqx.Module)


def _layer(name: str, path: str, weight: str, bias: str = "o -> o") -> Layout:
    return [(f"{name}.weight", f"{path}.weight", weight), (f"{name}.bias", f"{path}.bias", bias)]


def _linear(name: str, path: str, axes: str = "") -> Layout:
    return _layer(name, path, f"{axes} i o -> {axes} o i", f"{axes} o -> {axes} o")


_conv = partial(_layer, weight="h w i o -> o i h w")
_pointwise = partial(_layer, weight="i o -> o i 1 1")
_norm = partial(_layer, weight="o -> o")


def _authors(config: DiTConfig) -> Layout:
    """The layout of the authors' checkpoints, and of LightningDiT's and JiT's, which add to it."""
    layout = [
        *_linear("t_embedder.mlp.0", "time.up"),
        *_linear("t_embedder.mlp.2", "time.down"),
        ("y_embedder.embedding_table.weight", "label.table", "rows d -> rows d"),
        *_layer("blocks.{n}.attn.qkv", "blocks.attention.qkv", "n i qkv o -> n (qkv o) i", "n qkv o -> n (qkv o)"),
        *_linear("blocks.{n}.attn.proj", "blocks.attention.out", "n"),
        *_linear("blocks.{n}.adaLN_modulation.1", "blocks.modulation", "n"),
        *_linear("final_layer.linear", "final.linear"),
        *_linear("final_layer.adaLN_modulation.1", "final.modulation"),
    ]
    if config.patch_bottleneck:
        layout.append(("x_embedder.proj1.weight", "bottleneck.weight", "(p q c) o -> o c p q"))
        layout += _pointwise("x_embedder.proj2", "patch")
    else:
        layout += _layer("x_embedder.proj", "patch", "(p q c) o -> o c p q")
    if config.mlp == "swiglu":
        layout += _layer("blocks.{n}.mlp.w12", "blocks.mlp.up", "n i two o -> n (two o) i", "n two o -> n (two o)")
        layout += _linear("blocks.{n}.mlp.w3", "blocks.mlp.down", "n")
    else:
        layout += _linear("blocks.{n}.mlp.fc1", "blocks.mlp.up", "n")
        layout += _linear("blocks.{n}.mlp.fc2", "blocks.mlp.down", "n")
    if config.norm == "rms":
        layout += [(f"blocks.{{n}}.norm{k}.weight", f"blocks.norm{k}.weight", "n o -> n o") for k in (1, 2)]
        layout.append(("final_layer.norm_final.weight", "final.norm.weight", "o -> o"))
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            rows = _layer(f"blocks.{{n}}.attn.{norm}", f"blocks.attention.{norm}", "n o -> n o", "n o -> n o")
            layout += rows if config.norm == "layer" else rows[:1]  # RMS norms have no bias
    return layout + ([("in_context_posemb", "context", "m d -> 1 m d")] if config.context_tokens else [])


_BLOCK = "transformer_blocks.{n}"
_EMBEDDERS = f"{_BLOCK}.norm1.emb"  # We have one; diffusers has a copy in every block.
_DIFFUSERS: Layout = [
    *_layer("pos_embed.proj", "patch", "(p q c) o -> o c p q"),
    *_linear(f"{_EMBEDDERS}.timestep_embedder.linear_1", "time.up"),
    *_linear(f"{_EMBEDDERS}.timestep_embedder.linear_2", "time.down"),
    (f"{_EMBEDDERS}.class_embedder.embedding_table.weight", "label.table", "rows d -> rows d"),
    *_layer(f"{_BLOCK}.attn1.{{qkv}}", "blocks.attention.qkv", "n i qkv o -> n qkv o i", "n qkv o -> n qkv o"),
    *_linear(f"{_BLOCK}.attn1.to_out.0", "blocks.attention.out", "n"),
    *_linear(f"{_BLOCK}.ff.net.0.proj", "blocks.mlp.up", "n"),
    *_linear(f"{_BLOCK}.ff.net.2", "blocks.mlp.down", "n"),
    *_linear(f"{_BLOCK}.norm1.linear", "blocks.modulation", "n"),
    *_linear("proj_out_1", "final.modulation"),
    *_linear("proj_out_2", "final.linear"),
]


def _res_block(name: str, path: str, shortcut: bool = False) -> Layout:
    layout = [row for n in "12" for row in _conv(f"{name}.conv{n}", f"{path}.conv{n}")]
    layout += [row for n in "12" for row in _norm(f"{name}.norm{n}", f"{path}.norm{n}")]
    return layout + (_pointwise(f"{name}.conv_shortcut", f"{path}.shortcut") if shortcut else [])


def _vae(config: VAEConfig) -> Layout:
    layout = _pointwise("quant_conv", "quant") + _pointwise("post_quant_conv", "post_quant") if config.quant else []
    sides = [
        ("encoder", "down", config.block_channels, config.layers_per_block),
        ("decoder", "up", config.block_channels[::-1], config.layers_per_block + 1),
    ]
    for side, way, widths, depth in sides:
        attention, middle = f"{side}.mid_block.attentions.0", f"{side}.middle"
        layout += _conv(f"{side}.conv_in", f"{side}.conv_in") + _conv(f"{side}.conv_out", f"{side}.conv_out")
        layout += _norm(f"{side}.conv_norm_out", f"{side}.norm")
        layout += _res_block(f"{side}.mid_block.resnets.0", f"{middle}.block1")
        layout += _res_block(f"{side}.mid_block.resnets.1", f"{middle}.block2")
        layout += _norm(f"{attention}.group_norm", f"{middle}.norm")
        layout += _linear(f"{attention}.{{out}}", f"{middle}.attention.out")
        layout += _layer(f"{attention}.{{qkv}}", f"{middle}.attention.qkv", "i qkv o -> qkv o i", "qkv o -> qkv o")
        for i, width in enumerate(widths):
            name, path = f"{side}.{way}_blocks.{i}", f"{side}.levels.{i}"
            for j in range(depth):
                shortcut = j == 0 and i > 0 and width != widths[i - 1]
                layout += _res_block(f"{name}.resnets.{j}", f"{path}.blocks.{j}", shortcut)
            if i + 1 < len(widths):
                layout += _conv(f"{name}.{way}samplers.0.conv", f"{path}.resample")
    return layout


# Parts of names in diffusers and in the authors' latent-diffusion (LDM), whose attention has 1 x 1 convolutions.
_LDM_PARTS = """mid_block.resnets.0 mid.block_1, mid_block.resnets.1 mid.block_2, _blocks. ., .resnets. .block.,
    mid_block.attentions.0.group_norm mid.attn_1.norm, mid_block.attentions.0 mid.attn_1, conv_shortcut nin_shortcut,
    conv_norm_out norm_out, downsamplers.0 downsample, upsamplers.0 upsample"""


def _ldm_vae(config: VAEConfig) -> Layout:
    layout, levels = [], len(config.block_channels)
    for name, path, pattern in _vae(config):
        for theirs, ldm in (part.split() for part in _LDM_PARTS.split(",")):
            name = name.replace(theirs, ldm)
        name = re.sub(r"\.up\.(\d+)", lambda match: f".up.{levels - 1 - int(match[1])}", name)
        layout.append((name, path, f"{pattern} 1 1" if "attn_1." in name and pattern.endswith(" i") else pattern))
    return layout


def _inception(model: Inception) -> Layout:
    """The layout of pytorch-fid's file; each unit has the name of its tensors."""
    layout: Layout = [] if model.logits is None else [("fc.weight", "logits", "i o -> o i")]
    for key, unit in jax.tree.leaves_with_path(model, is_leaf=lambda part: isinstance(part, ConvUnit)):
        if isinstance(unit, ConvUnit):
            path = jax.tree_util.keystr(key, simple=True, separator=".")
            layout.append((f"{unit.name}.conv.weight", f"{path}.weight", "h w i o -> o i h w"))
            parts = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
            layout += [(f"{unit.name}.bn.{name}", f"{path}.{part}", "o -> o") for name, part in parts.items()]
    return layout


_TO_QKV = ("to_q", "to_k", "to_v")
_VAE_FIELDS = {"qkv": _TO_QKV, "out": ("to_out.0",)}
# Names in diffusers before 2023, as in the Stable Diffusion files.
_OLD_VAE_FIELDS = {"qkv": ("query", "key", "value"), "out": ("proj_attn",)}


def dit_from_torch(state_dict: StateDict, config: DiTConfig) -> DiT:
    """Read a network from the layout of the authors' checkpoints, of LightningDiT's or of JiT's.

    Positions are computed, not read (`fixed_tables`). SiT's and REPA's checkpoints (Ma et al. 2024; Yu et al. 2025)
    have the same names and shapes as the authors', so the file does not tell; read them with `convention="sit"` or
    `"repa"` in `config`, and LightningDiT's and JiT's with `"sit"` and `"jit"`. REPA's projectors are ignored. Raises
    ValueError with all missing, surplus and mis-shaped names at once, or if `config` has a block that the layout lacks.
    """
    projectors = [name for name in state_dict if name.startswith("projectors.") and config.convention == "repa"]
    fields, ignored = _dit_fields(config), {*fixed_tables(config), *projectors}
    return _read(state_dict, _abstract(DiT, config), _authors(config), fields, ignored=ignored)


def dit_to_torch(model: DiT) -> dict[str, np.ndarray]:
    """Write a network in the layout of the authors' checkpoints, of LightningDiT's or of JiT's.

    Arrays may be views of the network's. Raises ValueError if the network has a block or positions that the layout
    lacks.
    """
    config = model.config
    if config.positions == "rotary":
        raise ValueError("positions are rotary; the layout of the authors needs sincos or both, use the layout of ditx")
    tables = fixed_tables(config)
    if config.convention == "jit":  # stores no tables of rotary positions
        tables = {"pos_embed": tables["pos_embed"]}
    return {**tables, **_write(model, _authors(config), _dit_fields(config))}


def dit_from_diffusers(state_dict: StateDict, config: DiTConfig, *, frequency_shift: int = 1) -> DiT:
    """Read a network from the layout of diffusers' `DiTTransformer2DModel`.

    The network computes the same as in diffusers, whose time frequencies differ from the authors'; `frequency_shift`
    replaces the field of `config`. Give 0 for weights that were trained in the authors' program and then converted.
    Raises ValueError as `dit_from_torch` does, and if the blocks' copies of the embedders differ.
    """
    config = dataclasses.replace(config, frequency_shift=frequency_shift)
    _check_diffusers(config)
    return _read(state_dict, _abstract(DiT, config), _DIFFUSERS, _dit_fields(config), ignored={"pos_embed.pos_embed"})


def dit_to_diffusers(model: DiT) -> dict[str, np.ndarray]:
    """Write a network in the layout of diffusers' `DiTTransformer2DModel`; arrays may be views of the network's."""
    _check_diffusers(model.config)
    return _write(model, _DIFFUSERS, _dit_fields(model.config))


def dit_from_arrays(state_dict: StateDict, config: DiTConfig) -> DiT:
    """Read a network with any block from arrays named as by `dit_to_arrays`. Raises ValueError as `dit_from_torch`."""
    template = _abstract(DiT, config)
    return _read(state_dict, template, _own(template), {})


def dit_to_arrays(model: DiT) -> dict[str, np.ndarray]:
    """A network's arrays, unchanged, named by their attribute paths: `blocks.attention.qkv.weight`."""
    return _write(model, _own(model), {})


def vae_from_torch(state_dict: StateDict, config: VAEConfig) -> AutoencoderKL:
    """Read an autoencoder from the layout of diffusers' `AutoencoderKL`, with the names since 2023 or older ones.

    Also reads the layout of latent-diffusion (LDM), alone or as `first_stage_model` of a whole model. Raises ValueError
    with all missing, surplus and mis-shaped names at once.
    """
    prefix = "first_stage_model." if any(name.startswith("first_stage_model.") for name in state_dict) else ""
    if f"{prefix}encoder.mid.block_1.norm1.weight" in state_dict:
        layout = [(f"{prefix}{name}", path, pattern) for name, path, pattern in _ldm_vae(config)]
        parts = tuple(f"{prefix}{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
        ignored = {name for name in state_dict if not name.startswith(parts)}  # other networks, the discriminator
        fields = {"qkv": ("q", "k", "v"), "out": ("proj_out",)}
        return _read(state_dict, _abstract(AutoencoderKL, config), layout, fields, ignored=ignored)
    fields = _OLD_VAE_FIELDS if "encoder.mid_block.attentions.0.query.weight" in state_dict else _VAE_FIELDS
    return _read(state_dict, _abstract(AutoencoderKL, config), _vae(config), fields)


def vae_to_torch(model: AutoencoderKL) -> dict[str, np.ndarray]:
    """Write an autoencoder in the layout of diffusers' `AutoencoderKL`; arrays may be views of the network's."""
    return _write(model, _vae(model.config), _VAE_FIELDS)


def inception_from_torch(state_dict: StateDict) -> Inception:
    """Read the FID network from the layout of pytorch-fid's file; ignores the bias of the logits.

    A file without `fc.weight` gives a network without logits; one without any `bn.weight` gives scales of 1. Raises
    ValueError with all missing, surplus and mis-shaped names at once.
    """
    template = _abstract(Inception, logits="fc.weight" in state_dict)
    layout = _inception(template)
    if not any(name.endswith(".bn.weight") for name in state_dict):
        ones = {name: np.ones(_get(template, path).shape) for name, path, _ in layout if path.endswith(".scale")}
        state_dict = {**state_dict, **ones}
    ignored = {"fc.bias", *(name for name in state_dict if name.endswith(".bn.num_batches_tracked"))}
    return _read(state_dict, template, layout, {}, ignored=ignored)


def dit_tensor_names(layout: str, config: DiTConfig) -> dict[str, str]:
    """Tensor names of the layout "authors" or "diffusers" by our attribute paths; of block 0 for stacked arrays."""
    rows = _authors(config) if layout == "authors" else _DIFFUSERS
    return {path: name.replace("{n}", "0") for name, path, _ in rows}


def fixed_tables(config: DiTConfig) -> dict[str, np.ndarray]:
    """The positions in the authors' layout, which ditx computes and does not store.

    `pos_embed` has shape (1, n, d). LightningDiT's rotary tables have shape (n, k), and every value twice in a row.
    """
    tables = {"pos_embed": grid_positions(config.grid, config.hidden_size)[None]}
    if config.positions != "sincos":
        angles = np.repeat(rotary_angles(config.grid, config.hidden_size // config.num_heads), 2, axis=1)
        tables |= {"feat_rope.freqs_cos": np.cos(angles), "feat_rope.freqs_sin": np.sin(angles)}
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _abstract(module: Callable[..., Model], *args: Any, **options: Any) -> Model:
    return jax.eval_shape(lambda key: module(*args, **options, key=key), jax.random.key(0))


def _own(model: DiT) -> Layout:
    paths = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in jax.tree.leaves_with_path(model)]
    return [(path, path, "... -> ...") for path in paths]


def _check_diffusers(config: DiTConfig) -> None:
    changes = {name: getattr(config, name) for name in (*LAYER_FIELDS[1:], "convention")}
    for name, value in changes.items():
        if value != getattr(DiTConfig(), name):
            raise ValueError(f"{name} is {value!r}, which diffusers' DiT lacks; use the layout of ditx")


def _dit_fields(config: DiTConfig) -> Fields:
    if config.block != "adaln-zero":
        raise ValueError(f"block is {config.block!r}; other programs only have 'adaln-zero', use the layout of ditx")
    if config.mean_velocity:
        raise ValueError("the network predicts mean velocities, which no other program's layout has; use that of ditx")
    return {"n": range(config.depth), "qkv": _TO_QKV, "p": range(config.patch_size), "q": range(config.patch_size)}


def _names(name: str, pattern: str, fields: Fields) -> dict[str, tuple[int, ...]]:
    """All tensor names of a row, each with its index along the leading axes of the pattern."""
    braces, axes = [field for _, field, _, _ in string.Formatter().parse(name) if field], pattern.split()
    names = {}
    for indices in itertools.product(*(range(len(fields[field])) for field in braces)):
        index = dict(zip(braces, indices, strict=True))
        full_name = name.format(**{field: fields[field][i] for field, i in index.items()})
        names[full_name] = tuple(i for field, i in index.items() if field in axes)
    return names


def _view(array: np.ndarray, pattern: str, fields: Fields) -> np.ndarray:
    """Our array with the axes of the other program."""
    axes = pattern.replace("(", " ").replace(")", " ").split()
    return rearrange(array, pattern, **{axis: len(values) for axis, values in fields.items() if axis in axes})


def _write(model: eqx.Module, layout: Layout, fields: Fields) -> dict[str, np.ndarray]:
    """Our arrays by tensor name."""
    tensors = {}
    for name, path, pattern in layout:
        view = _view(np.asarray(_get(model, path), np.float32), pattern, fields)
        tensors |= {each: view[index] for each, index in _names(name, pattern, fields).items()}
    return tensors


def _read(state: StateDict, template: Model, layout: Layout, fields: Fields, *, ignored: Collection[str] = ()) -> Model:
    """The inverse of `_write`, into the structure of `template`, whose leaves are `jax.ShapeDtypeStruct`s.

    Looks tensors up one by one: a `state` that reads them from a file never needs to be in memory whole.
    """
    missing, shapes, differing, arrays, expected = [], [], [], [], set(ignored)
    for row, path, pattern in layout:
        array, (left, right) = np.empty(_get(template, path).shape, np.float32), pattern.split(" -> ")
        # Without merged axes this is a view: writing into it writes into `array`.
        unmerged = right.replace("(", "").replace(")", "")
        view, written = _view(array, f"{left} -> {unmerged}", fields), set()
        for name, index in _names(row, pattern, fields).items():
            expected.add(name)
            if name not in state:
                missing.append(name)
                continue
            tensor, part = np.asarray(state[name], np.float32), view[index]
            axes = [" ".join(side.split()[len(index) :]) for side in (unmerged, right)]
            shape = rearrange(np.broadcast_to(np.int8(0), part.shape), " -> ".join(axes)).shape
            if tensor.shape != shape:
                shapes.append(f"{name} is {tensor.shape}, not {shape}")
            elif index in written and not np.array_equal(tensor, part, equal_nan=True):
                differing.append(name)
            else:
                part[...] = tensor.reshape(part.shape)
                written.add(index)
        arrays.append(jnp.asarray(array))
    faults = {"missing": missing, "surplus": [name for name in state if name not in expected], "wrong shapes": shapes}
    faults |= {"not repeated in every block": differing} if differing else {}
    if any(faults.values()):
        listed = "; ".join(
            f"{fault} {names[:10] or 'none'}{f' and {len(names) - 10:,} more' if len(names) > 10 else ''}"
            for fault, names in faults.items()
        )
        raise ValueError(f"the weights do not fit the configuration: {listed}")
    return eqx.tree_at(lambda model: [_get(model, path) for _, path, _ in layout], template, arrays)


def _get(model: Any, path: str) -> Any:
    """The array at a path of attributes and, in tuples, positions."""
    for step in path.split("."):
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    return model
