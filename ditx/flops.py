"""Costs of a network, from its configuration alone."""

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
