"""Shards of weights, gathered block by block (Zhao et al. 2023, FSDP), and reductions of gradients.

A network's arrays are split over `fsdp`, and its blocks also over `tensor`. `make_gather` gathers the leaves outside
the blocks up front. `gather_blocks` wraps a block function: each block is gathered just before it runs, and again in
the backward pass, so a device holds at most one full block. The derivative of a gather sums gradients and scatters
them; `data_parallel_mean` reduces them over the other axes.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ditx.nn.dit import ApplyBlock
from ditx.parallel.mesh import batch_axes, data_parallel_size

Tree = TypeVar("Tree")


def specs(tree: Tree, mesh: Mesh) -> Tree:
    """The partition spec of every leaf of a model, its average or its moments (arrays or their shapes).

    One rule. Within blocks, `tensor` splits the layers as their `tensor_split` states (Shoeybi et al. 2019, section 3).
    Of the other array axes, `fsdp` splits the largest that it divides, never the one that stacks the blocks. A leaf
    without such an axis is copied. Raises ValueError if `tensor` is above 1 and no `tensor_split` names a matrix.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

    def spec(path, leaf):
        stacked = any(getattr(entry, "name", None) == "blocks" for entry in path)
        axes: list[str | None] = [None] * len(leaf.shape)
        if stacked and tensor > 1:
            axis = _tensor_axis(tree, path, leaf)
            if axis is not None:
                axes[axis] = "tensor"
        free = [axis for axis in range(stacked, len(axes)) if axes[axis] is None and leaf.shape[axis] % fsdp == 0]
        if free and fsdp > 1:
            axes[max(free, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return P(*axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def _tensor_axis(tree: Any, path: Any, leaf: Any) -> int | None:
    """The axis of a stacked leaf that `tensor` splits, by the `tensor_split` of the module that owns its layer."""
    owner = reduce(_child, path[:-2], tree)
    layer, name = (getattr(entry, "name", "") for entry in path[-2:])
    split = getattr(owner, "tensor_split", {}).get(layer)
    if split is None and name == "weight" and len(leaf.shape) > 2:
        raise ValueError(
            f"mesh.tensor is above 1, but {type(owner).__name__}.{layer} does not state its split; name it in the"
            " class's tensor_split (ditx/nn/blocks.py)"
        )
    if split == "out":
        return len(leaf.shape) - 1
    return 1 if split == "in" and name == "weight" else None


def _child(node: Any, entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return getattr(node, entry.name)
    return node[getattr(entry, "idx", getattr(entry, "key", None))]


def with_shardings(shapes: Tree, mesh: Mesh) -> Tree:
    """Shape, dtype and sharding of every leaf, by `specs`."""

    def place(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes, specs(shapes, mesh))


def data_parallel(function: Callable[[Any, Any], Any], model: Any, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """`function(model, batch)` on every device, with its shards of the model and its examples of the batch.

    The function gathers the shards by `make_gather` and `gather_blocks`, and returns arrays of examples.
    """
    return _on_each_device(function, model, mesh, out=P(batch_axes(mesh)))


def data_parallel_mean(function: Callable[[Any, Any], Any], model: Any, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Means over devices of `function(model, batch) -> gradients, terms`, called as by `data_parallel`.

    Each gradient is reduced once: over `fsdp` by the derivative of the gather, over the other axes here.
    """
    axes, shards = batch_axes(mesh), _shards(model, mesh)

    def local(model, batch):
        gradients, terms = jax.tree.map(lambda leaf: leaf / data_parallel_size(mesh), function(model, batch))
        left = jax.tree.map(lambda spec: tuple(axis for axis in axes if axis not in spec), shards)
        gradients = jax.tree.map(lambda leaf, over: jax.lax.psum(leaf, over) if over else leaf, gradients, left)
        return gradients, jax.lax.psum(terms, axes)

    return _on_each_device(local if axes else function, model, mesh, out=(shards, P()))


def make_gather(model: Any, mesh: Mesh | None) -> Callable[[Any], Any]:
    """A function that gathers every leaf of a model outside its blocks; the identity without `fsdp`."""
    if model is None or mesh is None or mesh.shape["fsdp"] == 1:
        return lambda shards: shards
    everything, nested = specs(model, mesh), mesh.shape["tensor"] > 1

    def gather(shards):
        rest, rest_specs = (eqx.tree_at(lambda m: m.blocks, tree, None) for tree in (shards, everything))
        whole = jax.tree.map(partial(_gather, nested=nested), rest, rest_specs)
        return eqx.tree_at(lambda m: m.blocks, whole, shards.blocks, is_leaf=lambda leaf: leaf is None)

    return gather


def gather_blocks(apply_block: ApplyBlock, model: Any, mesh: Mesh | None, *, recomputed: bool = False) -> ApplyBlock:
    """`apply_block` that takes shards of `model`'s blocks; gradients are summed and scattered in float32.

    `recomputed` states that blocks are recomputed in the backward pass anyway (`ditx.kernels.block.remat`).
    """
    if model is None or mesh is None or mesh.shape["fsdp"] == 1:
        return apply_block
    nested = mesh.shape["tensor"] > 1
    inner = [P(*spec[1:]) for spec in jax.tree.leaves(specs(model, mesh).blocks)]

    def apply(block, tokens, condition):
        leaves, structure = jax.tree.flatten(block)
        whole = [_gather(leaf, spec, nested=nested) for leaf, spec in zip(leaves, inner, strict=True)]
        return apply_block(jax.tree.unflatten(structure, whole), tokens, condition)

    if recomputed:
        return apply
    # Saves everything for the backward pass except gathered weights and slices of them.
    dropped = ("all_gather", "shard_map", "slice", "squeeze")
    return jax.checkpoint(apply, policy=lambda primitive, *_, **__: primitive.name not in dropped)


def _gather(shard: Array, spec: P, *, nested: bool) -> Array:
    if "fsdp" not in spec:
        return shard
    axis = spec.index("fsdp")

    # Without a nested shard_map that keeps the leaf split over `tensor`, XLA would first replicate it over that axis.
    def along(operation):
        kept = P(*("tensor" if name == "tensor" else None for name in spec))
        return (
            jax.shard_map(operation, in_specs=kept, out_specs=kept, axis_names={"tensor"}, check_vma=False)
            if nested
            else operation
        )

    def forward(shard):
        return along(lambda x: jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True))(shard)

    def backward(_, gradient):
        def scatter(x):
            wide = x.astype(jnp.float32)
            return jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=axis, tiled=True).astype(x.dtype)

        return (along(scatter)(gradient),)

    gathered = jax.custom_vjp(forward)
    gathered.defvjp(lambda shard: (forward(shard), None), backward)
    return gathered(shard)


def _shards(model: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: P(*(name if name == "fsdp" else None for name in spec)), specs(model, mesh))


def _on_each_device(function: Callable[[Any, Any], Any], model: Any, mesh: Mesh, *, out: Any) -> Any:
    axes = batch_axes(mesh)
    if not axes:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(_shards(model, mesh), P(axes)),
        out_specs=out,
        axis_names=set(axes),
        check_vma=False,
    )


def bytes_per_device(placed: Any) -> int:
    """Bytes that each device holds of a tree of `with_shardings`."""
    leaves = jax.tree.leaves(placed)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def table(placed: Any) -> str:
    """One line for every leaf of a tree of `with_shardings`: name, shape, split axes, bytes on a device."""
    rows = [("weights", "shape", "split", "a device holds")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        split = [f"axis {axis} over {name}" for axis, name in enumerate(leaf.sharding.spec) if name]
        shape = "x".join(map(str, leaf.shape))
        held = f"{bytes_per_device(leaf):,} bytes"
        rows.append((jax.tree_util.keystr(path, simple=True, separator="."), shape, ", ".join(split) or "no", held))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)
