"""Devices as a mesh, and how batches are split over it."""

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left."""

    data: int = -1
    """copies of the weights; each computes its part of the batch"""
    fsdp: int = 1
    """devices that share one copy of weights, average and moments, and split its part of the batch"""
    tensor: int = 1
    """devices that split the heads and the MLP width of each example"""


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """All devices, or the given ones, as `data` x `fsdp` x `tensor`.

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and known > 0:
        sizes[free[0]] = count // known
    if min(sizes.values()) < 1 or np.prod(list(sizes.values())) != count:
        raise ValueError(
            f"a mesh of {', '.join(f'{name}={size}' for name, size in asdict(config).items())} does not fit"
            f" {count} devices; use -1 for one of its axes"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_mesh(mesh: Mesh, *, num_heads: int, mlp_size: int) -> None:
    """Raise ValueError if a network's heads or MLP cannot be split over `tensor`."""
    for name, size in {"num_heads": num_heads, "the MLP width": mlp_size}.items():
        if size % mesh.shape["tensor"]:
            raise ValueError(f"mesh.tensor is {mesh.shape['tensor']}, which does not divide {name}, {size}")


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raise ValueError if a batch cannot be split evenly over the devices and `accumulate` parts."""
    if batch_size % (data_parallel_size(mesh) * accumulate):
        parts = f"{data_parallel_size(mesh)} devices" + (f" x accumulate {accumulate}" if accumulate > 1 else "")
        raise ValueError(f"batch_size is {batch_size}; make it a multiple of {parts}")


def data_parallel_size(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of several devices that split a batch."""
    return tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def local_batch_indices(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Indices of the examples of a batch that belong to devices of this process, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts if part is not None]))


def put_batch(batch: Tree, mesh: Mesh, rows: Int[np.ndarray, " rows"], batch_size: int) -> Tree:
    """Put a batch on the devices. Every process holds the examples `rows`, its `local_batch_indices`."""

    def put(array):
        def part(index):
            examples = np.arange(batch_size)[index[0]]
            first = np.searchsorted(rows, examples[0])
            return array[first : first + len(examples)]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(lambda array: put(np.asarray(array)), batch)


def shard_host_array(array: Any, sharding: Any) -> Array:
    """Put an array that every process holds whole on the devices of all."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
