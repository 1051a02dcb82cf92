"""Costs of a network, from its configuration only: parameters, multiply-adds, memory of a training step."""

import math
import re
from dataclasses import astuple, replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DiT, DiTConfig
from ditx.parallel.compile import resolve_dtype
from ditx.parallel.fsdp import bytes_per_device, with_shardings
from ditx.parallel.mesh import MeshConfig, check_batch, check_mesh, data_parallel_size


def parameters(config: DiTConfig) -> int:
    """Trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(_shapes(config)))


@cache
def macs(config: DiTConfig) -> int:
    """Multiply-adds of one forward pass of one example: the paper's Gflops (Table 4), in units of 1e9.

    They are counted in the traced network, so no kind of block can be left out. FLOPs are twice as many, and a training
    step costs about three forward passes. Element-wise operations are not counted.
    """
    return count_macs(jax.make_jaxpr(DiT.__call__)(_shapes(config), *_example(config)).jaxpr)


# Primitives whose products are not equations of a jaxpr, or whose number of repetitions is not in it.
_OPAQUE = {"pallas_call", "ffi_call", "pure_callback", "io_callback", "ragged_dot_general"}


def count_macs(jaxpr: Any) -> int:
    """Multiply-adds of all matrix products and convolutions of a traced program, each as often as its loops run it.

    Raises ValueError where they cannot be known: for a product in a while loop, and for programs that JAX cannot see
    into or runs on a grid.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in _OPAQUE:
            raise ValueError(f"the multiply-adds of {name} cannot be counted; use jax.numpy and jax.lax")
        inner = [count_macs(each) for each in jaxprs_in_params(parameters)]
        if name == "while" and any(inner):
            raise ValueError("a while loop contains matrix products, which cannot be counted; use lax.scan")
        total += max(inner) if name == "cond" else sum(inner) * parameters.get("length", 1)
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval, parameters["dimension_numbers"].rhs_spec[0]
            total += equation.outvars[0].aval.size * kernel.size // kernel.shape[outputs]
    return total


def scaled(count: int) -> str:
    """A count in words: 118.64 G."""
    units = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    unit = next((unit for unit, size in units.items() if count >= size), "k")
    return f"{count / units[unit]:,.2f} {unit}"


def describe_macs(config: DiTConfig) -> str:
    """The multiply-adds of a forward pass in words, also where a block of one's own does not tell them."""
    try:
        return f"{scaled(macs(config))} multiply-adds"
    except ValueError as error:
        return f"unknown multiply-adds ({error})"


def training_step(config: DiTConfig, batch_size: int) -> int:
    """FLOPs of a training step: two for a multiply-add, and a backward pass costs two forward passes.

    The forward derivative of a mean velocity costs one more.
    """
    return (8 if config.mean_velocity else 6) * batch_size * macs(config)


def step_memory(
    config: DiTConfig,
    *,
    batch_size: int,
    mesh: MeshConfig,
    dtype: str = "float32",
    accumulate: int = 1,
    remat: Literal["none", "dots", "full"] = "none",
    power_emas: int = 0,
) -> dict[str, int]:
    """Estimated bytes of one device in a training step, by purpose; their sum estimates its peak.

    The devices need not exist. Weights, averages, moments, batch and gradients are exact. Activations are the values
    that JAX saves for the backward pass; working memory is one recomputed block's values and its gathered weights in
    the compute dtype. Raises ValueError if the mesh does not fit the network or the batch.
    """
    from ditx.training.step import recompute  # imports optax, which `import ditx` does not

    dtype = resolve_dtype(dtype)
    axes, types = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    devices = Mesh(np.full(astuple(mesh), jax.devices()[0]), axes, axis_types=types)
    check_mesh(devices, num_heads=config.num_heads, mlp_size=config.mlp_size)
    check_batch(devices, batch_size, accumulate)
    shapes = with_shardings(_shapes(config), devices)
    weights, images = bytes_per_device(shapes), batch_size // data_parallel_size(devices)

    def tensor_shard(leaf):
        spec = P(*(axis if axis == "tensor" else None for axis in leaf.sharding.spec))
        return jax.ShapeDtypeStruct(NamedSharding(devices, spec).shard_shape(leaf.shape), dtype)

    # A device computes its heads and its part of the MLP, as a network that has only these would.
    narrow = _shapes(replace(config, num_heads=config.num_heads // mesh.tensor))
    model = jax.tree.unflatten(jax.tree.structure(narrow), map(tensor_shard, jax.tree.leaves(shapes)))

    def saved(remat, images):  # bytes for the backward pass, with the weights
        apply_block = KernelConfig().apply_block()
        if mesh.fsdp > 1 and remat == "none":  # as `fsdp.gather_blocks` does
            apply_block = jax.checkpoint(apply_block, policy=jax.checkpoint_policies.everything_saveable)
        apply_block = recompute(apply_block, remat)

        def derivative(model, x, t, y):
            return jax.vjp(lambda model, x: jax.vmap(partial(model, apply_block=apply_block))(x, t, y), model, x)[1]

        residuals = jax.eval_shape(derivative, model, *_example(config, (images,), dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    part = images // accumulate
    everything, activations = (part * (saved(kind, 2) - saved(kind, 1)) for kind in ("none", remat))
    cast = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.blocks)) // config.depth
    return {
        "weights": weights,
        "ema": (1 + power_emas) * weights,
        "moments": 2 * weights,
        "batch": 4 * images * (math.prod(config.input_shape) + 1),
        "gradients": weights * (2 if accumulate > 1 else 1),  # of one part, and their sum
        "activations": activations,
        "working_memory": everything // config.depth + cast,
    }


@cache
def _shapes(config: DiTConfig) -> DiT:
    return jax.eval_shape(lambda key: DiT(config, key=key), jax.random.key(0))


def _example(config: DiTConfig, batch: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
    shapes = (((*batch, *config.input_shape), dtype), (batch, jnp.float32), (batch, jnp.int32))
    return tuple(jax.ShapeDtypeStruct(*each) for each in shapes)


# TFLOP/s of dense bfloat16 products with float32 sums, by JAX's name of a device. Sources: NVIDIA's data sheets
# (without sparsity; GeForce: the Ada and Blackwell architecture papers) and Google Cloud's pages of TPU versions, which
# give a chip; up to v3, each of its two cores is a device.
_NOMINAL_TFLOPS = {
    "A100": 312,
    "L4": 121,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 5090": 209,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


def nominal_peak(device_kind: str) -> float | None:
    """The manufacturer's FLOP/s of bfloat16 products, or None for an unknown device."""
    words = set(re.split(r"[\s-]+", device_kind))
    matches = [name for name in _NOMINAL_TFLOPS if set(name.split()) <= words]
    return 1e12 * _NOMINAL_TFLOPS[max(matches, key=len)] if matches else None
