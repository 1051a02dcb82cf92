"""Devices as a mesh, where each array lies on it, and how work on a batch is shared out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from ditx.nn.dit import DiTConfig
from ditx.nn.layers import Compute, cudnn_takes

Tree = TypeVar("Tree")

# What tensor parallelism splits: heads and the width of the MLP, by the outputs of the layers that lead into them and
# the inputs of those that lead out (Shoeybi et al. 2019, section 3).
_INTO, _OUT_OF = {"qkv", "q", "k", "v", "up"}, {"out", "down"}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what the others leave."""

    data: int = -1
    """copies of the weights, among which the batch is split"""
    fsdp: int = 1
    """devices that share one copy of weights, average and moments, and split its part of the batch"""
    tensor: int = 1
    """devices that split the heads and the width of the MLP of one example"""


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """All devices, or those given, as `data` x `fsdp` x `tensor`.

    Raises ValueError where the sizes do not make up the devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and known > 0:
        sizes[free[0]] = count // known
    if min(sizes.values()) < 1 or np.prod(list(sizes.values())) != count:
        raise ValueError(
            f"a mesh of {', '.join(f'{name}={size}' for name, size in asdict(config).items())} does not make up the"
            f" {count} devices at hand; use -1 for one of them"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_fit(mesh: Mesh, *, num_heads: int, mlp_size: int) -> None:
    """Raise ValueError where a network's heads or MLP cannot be split over `tensor`."""
    for name, size in {"num_heads": num_heads, "the width of the MLP": mlp_size}.items():
        if size % mesh.shape["tensor"]:
            raise ValueError(f"mesh.tensor is {mesh.shape['tensor']}, which does not divide {name}, {size}")


def check_compute(mesh: Mesh, compute: Compute, dtype: str, model: DiTConfig) -> None:
    """Raise ValueError where what is to compute the blocks of a network cannot, in `dtype` on these devices."""
    device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
    platform = device.platform
    for name, choice, instead in (("kernels", compute.kernels, "plain"), ("attention", compute.attention, "auto")):
        if choice == "fused" and tensor > 1:
            raise ValueError(f"{name} is fused, which needs whole examples, but mesh.tensor is {tensor}; use {instead}")
        if choice in ("fused", "cudnn") and platform != "gpu":
            raise ValueError(
                f"{name} is {choice}, which is for GPUs, but the devices are of the kind {platform}; use {instead}"
            )
    if compute.matmul_dtype == "fp8":
        _check_fp8(device)
    width = model.hidden_size // model.num_heads
    takes = {"cudnn": cudnn_takes(jnp.dtype(dtype), width), "fused": dtype != "float32" and width <= 128}
    if not takes.get(compute.attention, True):
        limits = {"cudnn": "whose width is a multiple of 8 up to 128", "fused": "up to 128 wide"}[compute.attention]
        raise ValueError(
            f"attention is {compute.attention}, which takes bfloat16 and heads {limits}, but the network computes in"
            f" {dtype} with heads {width} wide; use auto"
        )


def _check_fp8(device: Any) -> None:
    if device.platform == "cpu":  # which rounds as GPUs do, to try what FP8 costs
        return
    if device.platform != "gpu":
        raise ValueError(
            f"products is fp8, which is for GPUs, but the devices are of the kind {device.platform}; use plain"
        )
    major, _, minor = device.compute_capability.partition(".")
    if not major.isdecimal() or (int(major), int(minor or 0)) < (8, 9):  # AMD's has letters
        raise ValueError(
            "products is fp8, which needs NVIDIA's GPUs from compute capability 8.9 on (Ada, Hopper), but that of"
            f" {device.device_kind} is {device.compute_capability}; use plain"
        )


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raise ValueError where a batch cannot be shared out evenly, in so many parts one after the other."""
    if batch_size % (data_parallel_size(mesh) * accumulate):
        parts = f"the {data_parallel_size(mesh)} devices" + (f" x accumulate {accumulate}" if accumulate > 1 else "")
        raise ValueError(f"batch_size is {batch_size}; make it a multiple of {parts}")


def specs(tree: Tree, mesh: Mesh) -> Tree:
    """The place of every leaf of a model, its average or its moments (arrays or their shapes).

    One rule. Within blocks, `tensor` splits heads and MLP width. Of the other axes, the largest that `fsdp` divides is
    split over it, never the one that stacks the blocks; a leaf without such an axis is copied.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

    def spec(path, leaf):
        names = [getattr(entry, "name", None) for entry in path]
        stacked = "blocks" in names
        axes: list[str | None] = [None] * len(leaf.shape)
        if stacked and tensor > 1 and names[-2] in _INTO:
            axes[-1] = "tensor"
        elif stacked and tensor > 1 and names[-2] in _OUT_OF and names[-1] == "weight":
            axes[1] = "tensor"
        free = [axis for axis in range(stacked, len(axes)) if axes[axis] is None and leaf.shape[axis] % fsdp == 0]
        if free and fsdp > 1:
            axes[max(free, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return P(*axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def with_shardings(shapes: Tree, mesh: Mesh) -> Tree:
    """Every leaf as its shape, type and place by `specs`."""

    def placed(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, shapes, specs(shapes, mesh))


def data_parallel_size(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over all devices but those that share an example."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def local_batch_indices(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Those rows of a batch that lie on devices of this process, in order."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts if part is not None]))


def put_batch(batch: Tree, mesh: Mesh, rows: Int[np.ndarray, " rows"], batch_size: int) -> Tree:
    """Lay a batch, of which every process holds its `local_rows`, on the devices."""

    def put(array):
        def part(index):
            wanted = np.arange(batch_size)[index[0]]
            first = np.searchsorted(rows, wanted[0])
            return array[first : first + len(wanted)]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(lambda array: put(np.asarray(array)), batch)


def shard_host_array(array: Any, sharding: Any) -> Array:
    """Lay an array that every process holds whole on the devices of all."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what each device holds a copy of."""
    return NamedSharding(mesh, P())


def data_parallel(function: Callable[[Any, Any], Any], model: Any, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """`function(model, batch)`, each device given its own shards of the model and rows of all arrays in `batch`.

    It makes the shards a network by `make_gather`, and returns rows again.
    """
    return _on_each(function, model, mesh, out=P(_batch_axes(mesh)))


def data_parallel_mean(function: Callable[[Any, Any], Any], model: Any, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """The means over devices of `function(model, batch) -> gradients, terms`, which `by_rows` would call.

    Every gradient is reduced once: over `fsdp` by `make_gather`'s derivative, over what is left here.
    """
    axes, shards = _batch_axes(mesh), _shards(model, mesh)

    def local(model, batch):
        gradients, terms = jax.tree.map(lambda leaf: leaf / data_parallel_size(mesh), function(model, batch))
        left = jax.tree.map(lambda spec: tuple(axis for axis in axes if axis not in spec), shards)
        gradients = jax.tree.map(lambda leaf, over: jax.lax.psum(leaf, over) if over else leaf, gradients, left)
        return gradients, jax.lax.psum(terms, axes)

    return _on_each(local if axes else function, model, mesh, out=(shards, P()))


def make_gather(model: Any, mesh: Mesh | None, *, recomputed: bool = False) -> Callable[[Any], Any]:
    """The function from the shards of a model, as `by_rows` hands them out, to one that can be called.

    All but its stacked blocks are gathered at once; these as each is come to and, in the backward pass, again, so that
    no device ever holds more than one; gradients are summed and scattered in float32. So the network is called as ever,
    and knows nothing of it. `recomputed` says that whole blocks are recomputed in the backward pass anyway.
    """
    if model is None or mesh is None or mesh.shape["fsdp"] == 1:
        return lambda shards: shards
    places, nested = specs(model, mesh), mesh.shape["tensor"] > 1
    inner = tuple(P(*spec[1:]) for spec in jax.tree.leaves(places.blocks))

    def gather(shards):
        whole = jax.tree.map(
            partial(_gather, nested=nested),
            eqx.tree_at(lambda m: m.blocks, shards, None),
            eqx.tree_at(lambda m: m.blocks, places, None),
        )
        blocks = _Gathered(shards.blocks, inner, nested, recomputed)
        return eqx.tree_at(lambda m: m.blocks, whole, blocks, is_leaf=lambda leaf: leaf is None)

    return gather


class _Gathered(eqx.Module):
    """A block of shards, or a stack of them, called as the block is."""

    block: Any
    specs: tuple[P, ...] = eqx.field(static=True)
    nested: bool = eqx.field(static=True)
    recomputed: bool = eqx.field(static=True)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        def call(shards, *inputs):
            leaves, structure = jax.tree.flatten(shards)
            whole = [_gather(leaf, spec, nested=self.nested) for leaf, spec in zip(leaves, self.specs, strict=True)]
            return jax.tree.unflatten(structure, whole)(*inputs, **options)

        if not self.recomputed:  # What was gathered is not kept for the backward pass, nor parts of it; all else is.
            dropped = ("all_gather", "shard_map", "slice", "squeeze")
            call = jax.checkpoint(call, policy=lambda op, *_, **__: op.name not in dropped)
        return call(self.block, *inputs)


def _gather(shard: Array, spec: P, *, nested: bool) -> Array:
    if "fsdp" not in spec:
        return shard
    axis = spec.index("fsdp")

    # XLA would copy a leaf over `tensor` before such an operation; told that this axis, too, is split, it does not.
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


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)


def _shards(model: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: P(*(name if name == "fsdp" else None for name in spec)), specs(model, mesh))


def _on_each(function: Callable[[Any, Any], Any], model: Any, mesh: Mesh, *, out: Any) -> Callable[[Any, Any], Any]:
    axes = _batch_axes(mesh)
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
    """Bytes that each device holds of a tree of `place`."""
    leaves = jax.tree.leaves(placed)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def table(placed: Any) -> str:
    """A line for every leaf of a model of `place`: its name, its shape, which axes are split, the bytes on a device."""
    rows = [("weights", "shape", "split", "a device holds")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        split = [f"axis {axis} over {name}" for axis, name in enumerate(leaf.sharding.spec) if name]
        shape = "x".join(map(str, leaf.shape))
        held = f"{bytes_per_device(leaf):,} bytes"
        rows.append((jax.tree_util.keystr(path, simple=True, separator="."), shape, ", ".join(split) or "no", held))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)
