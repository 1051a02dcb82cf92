"""Devices as a mesh, and where each array lies on it."""

from dataclasses import asdict, dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what the other leaves."""

    data: int = -1
    """copies of the weights, among which the batch is split"""
    fsdp: int = 1
    """devices that share one copy of weights, average and moments, and split its part of the batch"""


def make_mesh(config: MeshConfig) -> Mesh:
    """All devices as `data` x `fsdp`. Raises ValueError where the sizes do not make up the devices."""
    count = jax.device_count()
    sizes = asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and known > 0:
        sizes[free[0]] = count // known
    if min(sizes.values()) < 1 or sizes["data"] * sizes["fsdp"] != count:
        raise ValueError(
            f"a mesh of data={config.data}, fsdp={config.fsdp} does not make up the {count} devices at hand; use -1"
            " for one of the two"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto, AxisType.Auto))


def place(shapes: Tree, mesh: Mesh) -> Tree:
    """Give every leaf of a model, its average or its moments (arrays or their shapes) its place, as shapes alone.

    One rule: the largest axis that `fsdp` divides is split over it, never the axis that stacks the blocks; leaves
    without such an axis are replicated.
    """
    size = mesh.shape["fsdp"]

    def placed(path, leaf):
        stacked = any(getattr(entry, "name", None) == "blocks" for entry in path)
        axes = [axis for axis in range(int(stacked), len(leaf.shape)) if leaf.shape[axis] % size == 0]
        split = max(axes, key=lambda axis: leaf.shape[axis], default=None) if size > 1 else None
        spec = PartitionSpec(*("fsdp" if axis == split else None for axis in range(len(leaf.shape))))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Lay a batch, of which every process holds its own rows in order, on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)
