"""Costs of a network, from its configuration alone."""

import re

import jax

from ditx.nn.dit import DiT, DiTConfig


def macs(config: DiTConfig) -> int:
    """Multiply-adds of one forward pass of one example.

    This is what the paper's Table 4 calls Gflops (in units of 1e9); FLOPs are twice as many, and a training step costs
    about three forward passes. Element-wise work is not counted.
    """
    tokens, d, patch = config.num_tokens, config.hidden_size, config.patch_size**2
    n = tokens + (2 if config.block == "in-context" else 0)
    embeddings = tokens * patch * config.in_channels * d + 256 * d + d * d
    block = n * (4 * d * d + 2 * d * config.mlp_size) + 2 * n * n * d
    if config.block == "cross-attention":
        block += 2 * n * d * d + 2 * 2 * d * d + 2 * n * 2 * d
    block += {"adaln-zero": 6, "adaln": 4}.get(config.block, 0) * d * d
    final = (2 * d * d if config.block in ("adaln-zero", "adaln") else 0) + tokens * d * patch * config.out_channels
    return embeddings + config.depth * block + final


def training_step(config: DiTConfig, batch_size: int) -> int:
    """FLOPs of a training step: two a multiply-add, a forward pass and twice as much backward."""
    return 6 * batch_size * macs(config)


def parameters(config: DiTConfig) -> int:
    """Trainable parameters, without building them."""
    template = jax.eval_shape(lambda key: DiT(config, key=key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(template))


# TFLOP/s of dense bfloat16 products with float32 sums, by what JAX calls a device: NVIDIA's data sheets (without
# sparsity; GeForce: the Ada and Blackwell architecture papers) and Google Cloud's pages of TPU versions, there by chip,
# of which each of the two cores is a device up to v3.
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
    """FLOP/s that the maker states for bfloat16 products, or None where the device is not known."""
    words = re.split(r"[\s-]+", device_kind)
    found = [name for name in _NOMINAL_TFLOPS if set(name.split()) <= set(words)]
    return 1e12 * _NOMINAL_TFLOPS[max(found, key=len)] if found else None
