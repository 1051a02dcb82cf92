"""Our attention, run by Pallas' interpreter, against the plain one; and lowered for a GPU."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import example, random_dit
from references import assert_close

import ditx
from ditx.kernels.attention import attend
from ditx.kernels.block import KernelConfig, operations
from ditx.nn.blocks import AdaLNZeroBlock
from ditx.nn.layers import attend as plain
from ditx.training.step import recompute


def draw(batch, n, m, d, dtype=jnp.float32):
    """Queries, keys, values and what is sent back."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, count, d)), dtype) for count in (n, m, m, n)]


@partial(jax.jit, static_argnums=(0, 1))
def pull_back(attend, heads, q, k, v, sent):
    result, back = jax.vjp(jax.vmap(partial(attend, num_heads=heads)), q, k, v)
    return result, *back(sent)


# Widths of one part and of two, masked and not; tokens that fill their blocks, that do not, and fewer than a block.
@pytest.mark.parametrize(
    ("n", "m", "width"),
    [(256, 256, 72), (258, 258, 64), (49, 49, 32), (130, 130, 24), (100, 2, 96), (16, 70, 4), (3, 5, 128)],
)
def test_values_and_gradients_equal_the_plain_ones(n, m, width):
    arguments = draw(2, n, m, 2 * width)
    for ours, expected in zip(pull_back(attend, 2, *arguments), pull_back(plain, 2, *arguments), strict=True):
        assert ours.dtype == jnp.float32
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize(("n", "width"), [(256, 72), (49, 24)])
def test_in_bfloat16_as_near_as_the_plain_one(n, width):
    arguments = draw(1, n, n, 2 * width, jnp.bfloat16)
    exact = pull_back(plain, 2, *(argument.astype(jnp.float32) for argument in arguments))
    ours, theirs = pull_back(attend, 2, *arguments), pull_back(plain, 2, *arguments)
    for one, other, expected in zip(ours, theirs, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error, plain_error = (np.linalg.norm(np.asarray(x, np.float32) - expected) for x in (one, other))
        # Weights and slopes are rounded to 8 bits before products, sums are not; the plain one rounds more often.
        assert error < min(1.1 * plain_error, 2**-7 * np.linalg.norm(expected))


def test_large_logits_do_not_overflow():
    q, k, v, sent = draw(1, 70, 70, 32)
    for one in pull_back(attend, 2, 1e3 * q, 1e2 * k, v, sent):
        assert np.isfinite(one).all()
    assert_close(pull_back(attend, 2, 1e3 * q, 1e2 * k, v, sent)[0], plain(1e3 * q[0], 1e2 * k[0], v[0], 2)[None], 1e-5)


@pytest.mark.parametrize(("block", "remat"), [("adaln-zero", "dots"), ("cross-attention", "full")])
def test_networks_equal_plain_ones_recomputed_or_not(block, remat):
    config = ditx.DiTConfig(6, 2, 3, 24, 2, 2, num_classes=10, block=block)
    model, (x, t, y) = random_dit(config), example(config)

    @partial(jax.jit, static_argnames=("attention", "remat"))
    def gradient(model, attention, remat="none"):
        apply_block = recompute(KernelConfig(attention=attention).apply_block(), remat)

        def loss(model):
            return jnp.square(jax.vmap(lambda x: model(x, t, y, apply_block=apply_block))(x[None])).mean()

        return jax.value_and_grad(loss)(model)

    expected = jax.tree.leaves(gradient(model, "xla"))
    largest = max(np.abs(leaf).max() for leaf in expected[1:])
    for one, other in zip(jax.tree.leaves(gradient(model, "fused", remat)), expected, strict=True):
        # The gradient of a key's bias is 0 but for rounding, since it moves all logits of a query alike.
        np.testing.assert_allclose(one, other, rtol=0, atol=max(1e-5 * np.abs(other).max(), 1e-7 * largest))


@pytest.mark.parametrize(
    ("backend", "attention", "dtype", "width", "cudnn"),
    [
        ("gpu", "auto", jnp.bfloat16, 72, True),
        ("gpu", "auto", jnp.float16, 128, True),
        ("gpu", "auto", jnp.float32, 72, False),
        ("gpu", "auto", jnp.bfloat16, 36, False),
        ("gpu", "auto", jnp.bfloat16, 512, False),
        ("gpu", "xla", jnp.bfloat16, 72, False),
        ("cpu", "auto", jnp.bfloat16, 72, False),
        ("cpu", "cudnn", jnp.bfloat16, 72, True),  # as named, for programs compiled where there is no GPU
    ],
)
def test_cudnn_is_used_where_named_or_where_it_can_be(backend, attention, dtype, width, cudnn, monkeypatch):
    def by_cudnn(q, k, v, *, implementation):
        assert implementation == "cudnn" and q.shape == (5, 2, width)
        return 0 * v

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_cudnn)
    x = jnp.ones((5, 2 * width), dtype)
    np.testing.assert_array_equal(operations(KernelConfig(attention=attention)).attend(x, x, x, 2), 0 if cudnn else 1)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-S/8"])
def test_a_block_and_its_gradient_lower_to_three_launches_for_all_examples(name):
    config, batch = ditx.DIT_CONFIGS[name], 128
    width, n = config.hidden_size, config.num_tokens
    block = partial(AdaLNZeroBlock, width, config.num_heads, config.mlp_size)
    shapes = jax.eval_shape(lambda key: block(key=key), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    x, c = (jax.ShapeDtypeStruct((batch, *shape, width), jnp.bfloat16) for shape in [(n,), ()])

    apply_block = KernelConfig(attention="fused").apply_block()

    def loss(block, x, c):
        each = jax.vmap(lambda x, c: apply_block(block, x, c))
        return jnp.square(each(x, c).astype(jnp.float32)).sum()

    # Newer versions of JAX ask which GPU it is to be for.
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shapes, x, c)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    grids = re.findall(r"grid_x = (\d+) : i32, grid_y = (\d+) : i32, grid_z = (\d+) : i32", lowered)
    assert grids == [(str(max(1, n // 64)), str(config.num_heads), "128")] * 3
    assert not re.search(rf"transpose.*{batch}x{n}x{config.num_heads}x", lowered)
