"""Weights of other programs as ours, and back: mappings of tensor name to NumPy array, in float32.

A layout is a list of (their name, our attribute path, einops pattern from our array to theirs); swapping the sides of
the pattern gives the way back. Where their name holds `{}`, they keep one tensor for each block and we one stack.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ditx.nn.dit import DiT, DiTConfig

StateDict = Mapping[str, np.ndarray]
Layout = list[tuple[str, str, str]]
Model = TypeVar("Model", bound=eqx.Module)


def _linear(theirs: str, ours: str) -> Layout:
    return [(f"{theirs}.weight", f"{ours}.weight", "i o -> o i"), (f"{theirs}.bias", f"{ours}.bias", "o -> o")]


_DIT: Layout = [
    ("x_embedder.proj.weight", "patch.weight", "(p q c) d -> d c p q"),
    ("x_embedder.proj.bias", "patch.bias", "d -> d"),
    *_linear("t_embedder.mlp.0", "time.up"),
    *_linear("t_embedder.mlp.2", "time.down"),
    ("y_embedder.embedding_table.weight", "label.table", "rows d -> rows d"),
    *_linear("blocks.{}.attn.qkv", "blocks.attention.qkv"),
    *_linear("blocks.{}.attn.proj", "blocks.attention.out"),
    *_linear("blocks.{}.mlp.fc1", "blocks.mlp.up"),
    *_linear("blocks.{}.mlp.fc2", "blocks.mlp.down"),
    *_linear("blocks.{}.adaLN_modulation.1", "blocks.modulation"),
    *_linear("final_layer.linear", "final.linear"),
    *_linear("final_layer.adaLN_modulation.1", "final.modulation"),
]


def dit_from_torch(state_dict: StateDict, config: DiTConfig) -> DiT:
    """Read a network from the layout of the authors' checkpoints (their fixed `pos_embed` is ignored).

    Raises ValueError with every missing, surplus and mis-shaped name where the weights are not those of `config`.
    """
    template = jax.eval_shape(lambda key: DiT(config, key=key), jax.random.key(0))
    state = {name: value for name, value in state_dict.items() if name != "pos_embed"}
    return _read(state, template, _DIT, {"p": config.patch_size, "q": config.patch_size})


def dit_to_torch(model: DiT) -> dict[str, np.ndarray]:
    """Write a network in the layout of the authors' checkpoints, less their fixed `pos_embed`."""
    p = model.config.patch_size
    tensors = _write(model, _DIT, {"p": p, "q": p})
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def _write(model: eqx.Module, layout: Layout, sizes: dict[str, int]) -> dict:
    """Our arrays (or, under `jax.eval_shape`, their shapes) by their names."""
    tensors = {}
    for theirs, ours, pattern in layout:
        array = attrgetter(ours)(model)
        for i, part in enumerate(array if "{}" in theirs else [array]):
            tensors[theirs.format(i)] = rearrange(part, pattern, **_known(pattern, sizes))
    return tensors


def _read(state: StateDict, template: Model, layout: Layout, sizes: dict[str, int]) -> Model:
    """The inverse of `_write`, into the structure of `template`, whose leaves are `jax.ShapeDtypeStruct`s."""
    expected = jax.eval_shape(lambda model: _write(model, layout, sizes), template)
    missing = [name for name in expected if name not in state]
    surplus = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {np.shape(state[name])}, not {expected[name].shape}"
        for name in expected
        if name in state and np.shape(state[name]) != expected[name].shape
    ]
    if missing or surplus or shapes:
        raise ValueError(
            "the weights do not fit the configuration: "
            f"missing {missing or 'none'}; surplus {surplus or 'none'}; wrong shapes {shapes or 'none'}"
        )
    arrays = []
    for theirs, ours, pattern in layout:
        back = " -> ".join(reversed(pattern.split(" -> ")))
        depth = attrgetter(ours)(template).shape[0] if "{}" in theirs else 1
        parts = [np.asarray(state[theirs.format(i)], np.float32) for i in range(depth)]
        parts = [rearrange(part, back, **_known(pattern, sizes)) for part in parts]
        arrays.append(jnp.asarray(np.stack(parts) if "{}" in theirs else parts[0]))
    return eqx.tree_at(lambda model: [attrgetter(ours)(model) for _, ours, _ in layout], template, arrays)


def _known(pattern: str, sizes: dict[str, int]) -> dict[str, int]:
    return {axis: size for axis, size in sizes.items() if axis in pattern.replace("(", " ").split()}
