"""Weights of other programs as ours, and back: mappings of tensor name to NumPy array, in float32.

A layout is a list of (their name, our attribute path, einops pattern from our array to theirs). A field in braces in
their name is an axis of the pattern, along which they keep separate tensors where we keep one array; a field that the
pattern does not have is along which they repeat the same tensor. The way back is the same table, read into place.
"""

import dataclasses
import itertools
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ditx.nn.dit import DiT, DiTConfig
from ditx.nn.inception import ConvUnit, Inception
from ditx.nn.layers import grid_positions
from ditx.nn.vae import AutoencoderKL, VAEConfig

StateDict = Mapping[str, np.ndarray]
Layout = list[tuple[str, str, str]]
Fields = Mapping[str, Sequence[str | int]]
Model = TypeVar("Model", bound=eqx.Module)


def _linear(theirs: str, ours: str, axes: str = "") -> Layout:
    return [
        (f"{theirs}.weight", f"{ours}.weight", f"{axes} i o -> {axes} o i"),
        (f"{theirs}.bias", f"{ours}.bias", f"{axes} o -> {axes} o"),
    ]


_DIT: Layout = [
    ("x_embedder.proj.weight", "patch.weight", "(p q c) d -> d c p q"),
    ("x_embedder.proj.bias", "patch.bias", "d -> d"),
    *_linear("t_embedder.mlp.0", "time.up"),
    *_linear("t_embedder.mlp.2", "time.down"),
    ("y_embedder.embedding_table.weight", "label.table", "rows d -> rows d"),
    ("blocks.{n}.attn.qkv.weight", "blocks.attention.qkv.weight", "n i qkv o -> n (qkv o) i"),
    ("blocks.{n}.attn.qkv.bias", "blocks.attention.qkv.bias", "n qkv o -> n (qkv o)"),
    *_linear("blocks.{n}.attn.proj", "blocks.attention.out", "n"),
    *_linear("blocks.{n}.mlp.fc1", "blocks.mlp.up", "n"),
    *_linear("blocks.{n}.mlp.fc2", "blocks.mlp.down", "n"),
    *_linear("blocks.{n}.adaLN_modulation.1", "blocks.modulation", "n"),
    *_linear("final_layer.linear", "final.linear"),
    *_linear("final_layer.adaLN_modulation.1", "final.modulation"),
]

_EMBEDDERS = "transformer_blocks.{n}.norm1.emb"  # one for all, which diffusers repeats in every block
_DIFFUSERS: Layout = [
    ("pos_embed.proj.weight", "patch.weight", "(p q c) d -> d c p q"),
    ("pos_embed.proj.bias", "patch.bias", "d -> d"),
    *_linear(f"{_EMBEDDERS}.timestep_embedder.linear_1", "time.up"),
    *_linear(f"{_EMBEDDERS}.timestep_embedder.linear_2", "time.down"),
    (f"{_EMBEDDERS}.class_embedder.embedding_table.weight", "label.table", "rows d -> rows d"),
    ("transformer_blocks.{n}.attn1.{qkv}.weight", "blocks.attention.qkv.weight", "n i qkv o -> n qkv o i"),
    ("transformer_blocks.{n}.attn1.{qkv}.bias", "blocks.attention.qkv.bias", "n qkv o -> n qkv o"),
    *_linear("transformer_blocks.{n}.attn1.to_out.0", "blocks.attention.out", "n"),
    *_linear("transformer_blocks.{n}.ff.net.0.proj", "blocks.mlp.up", "n"),
    *_linear("transformer_blocks.{n}.ff.net.2", "blocks.mlp.down", "n"),
    *_linear("transformer_blocks.{n}.norm1.linear", "blocks.modulation", "n"),
    *_linear("proj_out_1", "final.modulation"),
    *_linear("proj_out_2", "final.linear"),
]


def _conv(theirs: str, ours: str) -> Layout:
    return [(f"{theirs}.weight", f"{ours}.weight", "h w i o -> o i h w"), (f"{theirs}.bias", f"{ours}.bias", "o -> o")]


def _pointwise(theirs: str, ours: str) -> Layout:
    return [(f"{theirs}.weight", f"{ours}.weight", "i o -> o i 1 1"), (f"{theirs}.bias", f"{ours}.bias", "o -> o")]


def _norm(theirs: str, ours: str) -> Layout:
    return [(f"{theirs}.{name}", f"{ours}.{name}", "c -> c") for name in ("weight", "bias")]


def _res_block(theirs: str, ours: str, widens: bool = False) -> Layout:
    convs = [*_conv(f"{theirs}.conv1", f"{ours}.conv1"), *_conv(f"{theirs}.conv2", f"{ours}.conv2")]
    norms = [*_norm(f"{theirs}.norm1", f"{ours}.norm1"), *_norm(f"{theirs}.norm2", f"{ours}.norm2")]
    return convs + norms + (_pointwise(f"{theirs}.conv_shortcut", f"{ours}.shortcut") if widens else [])


def _vae(config: VAEConfig) -> Layout:
    layout = _pointwise("quant_conv", "quant") + _pointwise("post_quant_conv", "post_quant")
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
        layout += [
            (f"{attention}.{{qkv}}.weight", f"{middle}.attention.qkv.weight", "i qkv o -> qkv o i"),
            (f"{attention}.{{qkv}}.bias", f"{middle}.attention.qkv.bias", "qkv o -> qkv o"),
        ]
        for i, width in enumerate(widths):
            theirs, ours = f"{side}.{way}_blocks.{i}", f"{side}.levels.{i}"
            for j in range(depth):
                widens = j == 0 and i > 0 and width != widths[i - 1]
                layout += _res_block(f"{theirs}.resnets.{j}", f"{ours}.blocks.{j}", widens)
            if i + 1 < len(widths):
                layout += _conv(f"{theirs}.{way}samplers.0.conv", f"{ours}.resample")
    return layout


def _inception(model: Inception) -> Layout:
    """Its units tell their names; pytorch-fid's file has no others."""
    layout: Layout = [] if model.logits is None else [("fc.weight", "logits", "i o -> o i")]
    for path, unit in jax.tree.leaves_with_path(model, is_leaf=lambda part: isinstance(part, ConvUnit)):
        if isinstance(unit, ConvUnit):
            ours = jax.tree_util.keystr(path, simple=True, separator=".")
            layout.append((f"{unit.name}.conv.weight", f"{ours}.weight", "h w i o -> o i h w"))
            names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
            layout += [(f"{unit.name}.bn.{theirs}", f"{ours}.{name}", "o -> o") for theirs, name in names.items()]
    return layout


_TO_QKV = ("to_q", "to_k", "to_v")
_VAE_FIELDS = {"qkv": _TO_QKV, "out": ("to_out.0",)}
# What diffusers called these before 2023, when the Stable Diffusion files were made.
_OLD_NAMES = {"qkv": ("query", "key", "value"), "out": ("proj_attn",)}


def dit_from_torch(state_dict: StateDict, config: DiTConfig) -> DiT:
    """Read a network from the layout of the authors' checkpoints (their `pos_embed`, `fixed_positions`, is ignored).

    SiT's (Ma et al. 2024) have the same names and shapes, so that nothing tells them apart: `ditx.flow.from_sit` makes
    flows of them.
    Raises ValueError with all missing, surplus and mis-shaped names at once, or if the layout has no such blocks.
    """
    return _read(state_dict, _abstract_dit(config), _DIT, _dit_fields(config), ignored={"pos_embed"})


def dit_to_torch(model: DiT) -> dict[str, np.ndarray]:
    """Write a network in the layout of the authors' checkpoints; arrays may be views of the network's.

    Raises ValueError if the layout has no such blocks.
    """
    return {"pos_embed": fixed_positions(model.config), **_write(model, _DIT, _dit_fields(model.config))}


def dit_from_diffusers(state_dict: StateDict, config: DiTConfig, *, frequency_shift: int = 1) -> DiT:
    """Read a network from the layout of diffusers' `DiTTransformer2DModel`.

    It computes what diffusers does, which spaces the frequencies of time otherwise than the authors do, whatever
    `config` says. For weights that were trained in the authors' program, `frequency_shift=0` is what they learnt.
    Raises ValueError as `dit_from_torch` does, and where the embedders that the blocks repeat are not all the same.
    """
    config = dataclasses.replace(config, frequency_shift=frequency_shift)
    return _read(state_dict, _abstract_dit(config), _DIFFUSERS, _dit_fields(config))


def dit_to_diffusers(model: DiT) -> dict[str, np.ndarray]:
    """Write a network in the layout of diffusers' `DiTTransformer2DModel`; arrays may be views of the network's."""
    return _write(model, _DIFFUSERS, _dit_fields(model.config))


def dit_from_arrays(state_dict: StateDict, config: DiTConfig) -> DiT:
    """Read a network of any block from arrays as `dit_to_arrays` names them. Raises ValueError as the others do."""
    template = _abstract_dit(config)
    return _read(state_dict, template, _own(template), {})


def dit_to_arrays(model: DiT) -> dict[str, np.ndarray]:
    """Our arrays as they are, by the paths of attributes to them: `blocks.attention.qkv.weight`."""
    return _write(model, _own(model), {})


def vae_from_torch(state_dict: StateDict, config: VAEConfig) -> AutoencoderKL:
    """Read an autoencoder from the layout of diffusers' `AutoencoderKL`, under its names of before or since 2023.

    Raises ValueError with all missing, surplus and mis-shaped names at once.
    """
    template = jax.eval_shape(lambda key: AutoencoderKL(config, key=key), jax.random.key(0))
    fields = _OLD_NAMES if "encoder.mid_block.attentions.0.query.weight" in state_dict else _VAE_FIELDS
    return _read(state_dict, template, _vae(config), fields)


def vae_to_torch(model: AutoencoderKL) -> dict[str, np.ndarray]:
    """Write an autoencoder in the layout of diffusers' `AutoencoderKL`; arrays may be views of the network's."""
    return _write(model, _vae(model.config), _VAE_FIELDS)


def inception_from_torch(state_dict: StateDict) -> Inception:
    """Read the FID network from the layout of pytorch-fid's file, whose bias of the logits is of no use.

    It has no logits where the file has no `fc.weight`, and no scales but 1 where that has no `bn.weight` at all. Raises
    ValueError with all missing, surplus and mis-shaped names at once.
    """
    logits = "fc.weight" in state_dict
    template = jax.eval_shape(lambda key: Inception(logits=logits, key=key), jax.random.key(0))
    layout = _inception(template)
    if not any(name.endswith(".bn.weight") for name in state_dict):
        ones = {theirs: np.ones(_get(template, ours).shape) for theirs, ours, _ in layout if ours.endswith(".scale")}
        state_dict = {**state_dict, **ones}
    ignored = {"fc.bias", *(name for name in state_dict if name.endswith(".bn.num_batches_tracked"))}
    return _read(state_dict, template, layout, {}, ignored=ignored)


def _abstract_dit(config: DiTConfig) -> DiT:
    return jax.eval_shape(lambda key: DiT(config, key=key), jax.random.key(0))


def fixed_positions(config: DiTConfig) -> np.ndarray:
    """The `pos_embed` of the authors' checkpoints, of shape (1, n, d), which we compute and do not keep."""
    return grid_positions(config.input_size // config.patch_size, config.hidden_size)[None].astype(np.float32)


def _own(model: DiT) -> Layout:
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(model)]
    return [(path, path, "... -> ...") for path in paths]


def _dit_fields(config: DiTConfig) -> Fields:
    if config.block != "adaln-zero":
        raise ValueError(f"block is {config.block!r}; other programs have 'adaln-zero' alone, keep this one in ours")
    return {"n": range(config.depth), "qkv": _TO_QKV, "p": range(config.patch_size), "q": range(config.patch_size)}


def _names(theirs: str, pattern: str, fields: Fields) -> dict[str, tuple[int, ...]]:
    """Each of their names that an entry stands for, and its index along the leading axes of the pattern."""
    found = [field for _, field, _, _ in string.Formatter().parse(theirs) if field]
    names = {}
    for indices in itertools.product(*(range(len(fields[field])) for field in found)):
        values = {field: fields[field][i] for field, i in zip(found, indices, strict=True)}
        axes = pattern.split()
        names[theirs.format(**values)] = tuple(i for field, i in zip(found, indices, strict=True) if field in axes)
    return names


def _view(array: np.ndarray, pattern: str, fields: Fields) -> np.ndarray:
    """Our array with their axes."""
    axes = pattern.replace("(", " ").replace(")", " ").split()
    return rearrange(array, pattern, **{axis: len(values) for axis, values in fields.items() if axis in axes})


def _write(model: eqx.Module, layout: Layout, fields: Fields) -> dict[str, np.ndarray]:
    """Our arrays by their names."""
    tensors = {}
    for theirs, ours, pattern in layout:
        view = _view(np.asarray(_get(model, ours), np.float32), pattern, fields)
        tensors |= {name: view[index] for name, index in _names(theirs, pattern, fields).items()}
    return tensors


def _read(state: StateDict, template: Model, layout: Layout, fields: Fields, *, ignored: Collection[str] = ()) -> Model:
    """The inverse of `_write`, into the structure of `template`, whose leaves are `jax.ShapeDtypeStruct`s.

    Tensors are asked for one by one, so that a state which reads them from a file need never be in memory whole.
    """
    missing, shapes, differing, arrays, expected = [], [], [], [], set(ignored)
    for theirs, ours, pattern in layout:
        array, (left, right) = np.empty(_get(template, ours).shape, np.float32), pattern.split(" -> ")
        # Less their merging of axes, it is a view, so that writing to it writes to ours.
        apart = right.replace("(", "").replace(")", "")
        view, written = _view(array, f"{left} -> {apart}", fields), set()
        for name, index in _names(theirs, pattern, fields).items():
            expected.add(name)
            if name not in state:
                missing.append(name)
                continue
            tensor, part = np.asarray(state[name], np.float32), view[index]
            axes = [" ".join(side.split()[len(index) :]) for side in (apart, right)]
            shape = rearrange(np.broadcast_to(np.int8(0), part.shape), " -> ".join(axes)).shape
            if tensor.shape != shape:
                shapes.append(f"{name} is {tensor.shape}, not {shape}")
            elif index in written and not np.array_equal(tensor, part, equal_nan=True):
                differing.append(name)
            else:
                part[...] = tensor.reshape(part.shape)
                written.add(index)
        arrays.append(jnp.asarray(array))
    surplus = [name for name in state if name not in expected]
    if missing or surplus or shapes or differing:
        faults = {"missing": missing, "surplus": surplus, "wrong shapes": shapes}
        faults |= {"not repeated in every block": differing} if differing else {}
        listed = "; ".join(f"{fault} {names or 'none'}" for fault, names in faults.items())
        raise ValueError(f"the weights do not fit the configuration: {listed}")
    return eqx.tree_at(lambda model: [_get(model, ours) for _, ours, _ in layout], template, arrays)


def _get(model: Any, path: str) -> Any:
    """The array at a path of attributes and, in tuples, positions."""
    for step in path.split("."):
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    return model
