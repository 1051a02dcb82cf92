"""The tuned block equals the plain one, and says so when it has no implementation of a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import BLOCKS, example, random_dit

import ditx
from ditx.kernels.block import KernelConfig
from ditx.nn.blocks import InContextBlock
from ditx.nn.dit import call_block
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.testing import x64
from ditx.training.step import recompute

CONFIG = ditx.DiTConfig(6, 2, 3, 24, 3, 2, num_classes=10)


@pytest.mark.parametrize("unroll", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", BLOCKS)
@x64
def test_the_tuned_block_equals_the_plain_one(block, unroll):
    config = dataclasses.replace(CONFIG, block=block)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_dit(config))
    x, t, y = example(config)
    x = jnp.stack([x, -x]).astype(jnp.float64)

    def loss(model, apply_block):
        each = jax.vmap(lambda x: model(x, t, y, apply_block=apply_block, unroll=unroll))
        return jnp.square(each(x)).mean()

    plain, tuned = (
        jax.jit(jax.value_and_grad(lambda model, apply=apply: loss(model, apply)))(model)
        for apply in (call_block, recompute(KernelConfig().apply_block(), "full", unroll=unroll))
    )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(tuned), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13 * largest)


MODERN = {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "positions": "rotary"}
# Norms or rotations of the keys alone, too: with either, their bias counts.
KINDS = [*({"block": block, **MODERN} for block in BLOCKS), {"qk_norm": True, "modulation_shift": False}]


@pytest.mark.parametrize("kinds", [*KINDS, {"positions": "both"}], ids=str)
@x64
def test_the_tuned_block_has_the_modern_layers(kinds):
    config = dataclasses.replace(CONFIG, depth=1, **kinds)
    stack = random_dit(config).blocks
    block = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float64), stack)
    tokens, c = jax.random.normal(jax.random.key(0), (2, 11, 24)), jax.random.normal(jax.random.key(1), (2, 24))

    def loss(block, tokens, apply):
        return jnp.square(jax.vmap(lambda x: apply(block, x, c if "cross" in config.block else c[0]))(tokens)).mean()

    plain, tuned = (
        jax.jit(jax.value_and_grad(lambda *args, apply=apply: loss(*args, apply), (0, 1)))(block, tokens)
        for apply in (call_block, KernelConfig().apply_block())
    )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(tuned), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13 * largest)


@pytest.mark.parametrize("kinds", [{"norm": "rms"}, {"mlp": "swiglu"}])
def test_fused_kernels_refuse_layers_that_they_lack(kinds):
    config = dataclasses.replace(CONFIG, **kinds)
    fused = KernelConfig("fused")
    message = "kernels is fused, which has layer norms and MLPs with a GELU, not .*; use xla"
    with pytest.raises(ValueError, match=message):
        random_dit(config)(*example(config), apply_block=fused.apply_block())
    with pytest.raises(ValueError, match=message):
        fused.check_kernels(make_mesh(MeshConfig()), "bfloat16", config)


class Fifth(InContextBlock):
    """A block of a user's own."""


class Plain(InContextBlock):
    """A block without other layers than the paper's."""

    def __init__(self, hidden_size, num_heads, mlp_size, *, key):
        super().__init__(hidden_size, num_heads, mlp_size, key=key)


def test_a_block_of_ones_own_runs_as_it_is_and_has_no_fused_implementation():
    model, (x, t, y) = ditx.DiT(CONFIG, block=Fifth, key=jax.random.key(0)), example(CONFIG)
    tuned = model(x, t, y, apply_block=KernelConfig().apply_block())
    np.testing.assert_array_equal(tuned, model(x, t, y))
    with pytest.raises(ValueError, match="Plain takes no style, so it has the paper's layers only"):
        ditx.DiT(dataclasses.replace(CONFIG, norm="rms"), block=Plain, key=jax.random.key(0))
    for config in (KernelConfig("fused"), KernelConfig(attention="fused"), KernelConfig(matmul_dtype="fp8")):
        with pytest.raises(ValueError, match="Fifth has no fused or FP8 implementation; use kernels xla"):
            model(x, t, y, apply_block=config.apply_block())
