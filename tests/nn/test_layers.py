import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import load

from ditx.nn.embeddings import LabelEmbedding, TimeEmbedding, grid_positions, sinusoids
from ditx.nn.layers import (
    MLP,
    Attention,
    LayerNorm,
    Linear,
    RMSNorm,
    SwiGLU,
    head_by_head,
    layer_norm,
    modulate,
    rotate,
)
from ditx.testing import x64

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def wide(array):
    return np.asarray(array, np.float64)


def with_biases(layer):
    """A layer whose biases are not 0, so that a forgotten one shows."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.arange(leaf.size).reshape(leaf.shape) / leaf.size, layer)


def affine(linear, x):
    weight = wide(linear.weight)
    return (x @ weight.reshape(len(weight), -1)).reshape(*x.shape[:-1], *weight.shape[1:]) + wide(linear.bias)


@pytest.mark.parametrize("out_size", [5, (3, 2)])
def test_linear_is_affine_over_any_leading_axes(out_size):
    linear = with_biases(Linear(6, out_size, key=KEY))
    for shape in [(6,), (3, 6), (2, 3, 6)]:
        x = RANDOM.standard_normal(shape).astype(np.float32)
        np.testing.assert_allclose(linear(jnp.asarray(x)), affine(linear, wide(x)), atol=1e-5)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 192), (256, 64), (16, 64)])
def test_linear_starts_xavier_uniform_with_zero_bias(fan_in, fan_out):
    linear = Linear(fan_in, fan_out, key=KEY)
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.98 * bound < np.abs(linear.weight).max() <= bound
    assert np.std(linear.weight) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(np.mean(linear.weight)) < 0.1 * bound
    assert not np.any(linear.bias)


def test_fused_qkv_starts_as_one_matrix():
    weight = Attention(64, 4, key=KEY).qkv.weight
    bound = math.sqrt(6 / (64 + 3 * 64))
    assert weight.shape == (64, 3, 64)
    for part in np.moveaxis(np.asarray(weight), 1, 0):
        assert 0.98 * bound < np.abs(part).max() <= bound


def test_layer_norm_has_eps_1e_6_and_no_affine():
    # A variance of 1e-6 is where eps 1e-6 and 1e-5 differ by a factor of 2.3.
    x = (1e-3 * RANDOM.standard_normal((3, 32))).astype(np.float32)
    centred = wide(x) - wide(x).mean(-1, keepdims=True)
    expected = centred / np.sqrt(wide(x).var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x)), expected, atol=1e-5)


def test_layer_norm_keeps_half_precision_but_not_its_statistics():
    # In bfloat16 the mean of 512 numbers near 10 is off by far more than their spread rounded once.
    x = jnp.asarray(10 + RANDOM.standard_normal((2, 512)), jnp.bfloat16)
    result = layer_norm(x)
    assert result.dtype == jnp.bfloat16
    exact = (wide(x) - wide(x).mean(-1, keepdims=True)) / wide(x).std(-1, keepdims=True)
    np.testing.assert_allclose(wide(result), exact, rtol=2**-8, atol=1e-5)


def test_modulate_is_the_identity_at_zero_and_scales_before_it_shifts():
    x = jnp.asarray(RANDOM.standard_normal((3, 4)), jnp.float32)
    np.testing.assert_array_equal(modulate(x, jnp.zeros(4), jnp.zeros(4)), x)
    shift, scale = jnp.array([1.0, 2, 3, 4]), jnp.array([0.5, 0, -1, 2])
    np.testing.assert_allclose(modulate(x, shift, scale), wide(x) * [1.5, 1, 0, 3] + [1, 2, 3, 4], atol=1e-5)


def test_attention_is_softmax_attention_head_by_head():
    d, heads, n = 12, 3, 5
    attention = with_biases(Attention(d, heads, key=KEY))
    x = RANDOM.standard_normal((n, d)).astype(np.float32)
    packed = affine(attention.qkv, wide(x))
    width, mixed = d // heads, np.zeros((n, d))
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        q, k, v = (packed[:, part, columns] for part in range(3))
        weights = np.exp(q @ k.T / math.sqrt(width))
        mixed[:, columns] = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(attention(jnp.asarray(x)), affine(attention.out, mixed), atol=1e-5)


def test_attention_does_not_see_the_order_of_tokens():
    attention = with_biases(Attention(8, 2, key=KEY))
    x = jnp.asarray(RANDOM.standard_normal((6, 8)), jnp.float32)
    order = RANDOM.permutation(6)
    run = jax.jit(lambda x: attention(x))
    np.testing.assert_allclose(run(x[order]), run(x)[order], atol=1e-5)


def test_mlp_has_the_tanh_gelu():
    mlp = with_biases(MLP(8, 20, key=KEY))
    x = (3 * RANDOM.standard_normal((4, 8))).astype(np.float32)
    hidden = affine(mlp.up, wide(x))
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(mlp(jnp.asarray(x)), affine(mlp.down, gelu), atol=1e-5)


@x64
def test_sinusoids_are_cosines_then_sines():
    t = 417.25
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    np.testing.assert_allclose(sinusoids(jnp.asarray(t), 256), expected, atol=1e-10)
    np.testing.assert_array_equal(sinusoids(jnp.asarray(0.0), 8), [1, 1, 1, 1, 0, 0, 0, 0])


def test_sinusoids_of_whole_and_float_times_agree_in_float32():
    whole, real = sinusoids(jnp.asarray(999), 256), sinusoids(jnp.asarray(999.0), 256)
    assert whole.dtype == real.dtype == jnp.float32
    np.testing.assert_array_equal(whole, real)
    angles = 999 * np.exp(-math.log(10000) * np.arange(128) / 128)
    # An angle of 999 rounded to float32 is off by up to 6e-5, twice (frequency and product).
    np.testing.assert_allclose(real, np.concatenate([np.cos(angles), np.sin(angles)]), atol=1.3e-4)


def test_time_embedding_is_an_mlp_with_silu():
    embedding = with_biases(TimeEmbedding(12, key=KEY))
    t = jnp.asarray(37)
    hidden = affine(embedding.up, wide(sinusoids(t, 256)))
    np.testing.assert_allclose(embedding(t), affine(embedding.down, hidden / (1 + np.exp(-hidden))), atol=1e-5)


def test_time_embedding_starts_normal():
    embedding = TimeEmbedding(96, key=KEY)
    for linear in (embedding.up, embedding.down):
        assert np.std(linear.weight) == pytest.approx(0.02, rel=0.05)
        assert np.abs(linear.weight).max() > 0.05  # beyond any uniform of that deviation
        assert not np.any(linear.bias)


def test_time_embedding_in_bfloat16_rounds_waves_not_times():
    # 998 and 999 are one number (1000) in bfloat16; their waves are not.
    embedding = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), TimeEmbedding(64, key=KEY))
    reference = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), embedding)
    late, later = embedding(jnp.asarray(998)), embedding(jnp.asarray(999))
    assert later.dtype == jnp.bfloat16
    exact_late, exact_later = wide(reference(jnp.asarray(998))), wide(reference(jnp.asarray(999)))
    scale = np.abs(exact_later).max()
    np.testing.assert_allclose(wide(later), exact_later, atol=2**-6 * scale)
    assert np.corrcoef(wide(later) - wide(late), exact_later - exact_late)[0, 1] > 0.99


@pytest.mark.parametrize("null_label", [True, False])
def test_label_table_has_a_last_row_for_the_null_label(null_label):
    embedding = LabelEmbedding(300, 16, null_label=null_label, key=KEY)
    assert embedding.table.shape == (300 + null_label, 16)
    assert np.std(embedding.table) == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(embedding(jnp.asarray(7)), embedding.table[7])


def test_positions_equal_the_reference():
    reference = load("dit_tiny.npz")["weight/pos_embed"][0]  # rounded to float32 there
    np.testing.assert_allclose(grid_positions(4, 48), reference, atol=1e-7)


def test_positions_encode_column_then_row_in_float64():
    side, d = 5, 24
    table = grid_positions(side, d)
    assert table.dtype == np.float64
    frequencies = [1 / 10000 ** (i / (d / 4)) for i in range(d // 4)]
    for row in range(side):
        for column in range(side):
            waves = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            np.testing.assert_allclose(table[row * side + column], waves, atol=1e-12)


@x64
def test_rotary_logits_depend_on_offsets_only():
    rng, grid = np.random.default_rng(0), (3, 4)
    q, k = (jnp.broadcast_to(rng.standard_normal((2, 8)), (14, 2, 8)) for _ in "qk")
    turned_q, turned_k = rotate(q, grid), rotate(k, grid)
    np.testing.assert_array_equal(turned_q[12:], q[12:])  # tokens behind the grid have no position
    logits = np.einsum("nhk,mhk->hnm", turned_q[:12], turned_k[:12]).reshape(2, 3, 4, 3, 4)
    seen = {}
    for a, b, c, d in np.ndindex(3, 4, 3, 4):
        value = seen.setdefault((a - c, b - d), logits[:, a, b, c, d])
        np.testing.assert_allclose(logits[:, a, b, c, d], value, atol=1e-12)
    assert len(seen) == 35 and np.ptp(list(seen.values()), axis=0).min() > 0.1
    assert np.abs(seen[1, 0] - seen[0, 1]).min() > 1e-3  # rows and columns turn other channels


@x64
@pytest.mark.parametrize("norm", [RMSNorm(6), LayerNorm(6, eps=1e-5)])
def test_normalised_heads_ignore_their_scale(norm):
    x = 100 * jnp.asarray(np.random.default_rng(0).standard_normal((5, 12)))
    scales = jnp.repeat(jnp.array([2.0, 7.0]), 6)  # one for each head
    np.testing.assert_allclose(head_by_head(x * scales, norm, 2), head_by_head(x, norm, 2), atol=1e-6)
    np.testing.assert_allclose(jnp.square(head_by_head(x, norm, 2)).mean(), 1, atol=1e-6)


def test_rms_norm_scales_by_its_weight_only():
    x = jnp.array([[3.0, -4.0], [0.0, 5.0]])
    norm = eqx.tree_at(lambda n: n.weight, RMSNorm(2), jnp.array([2.0, 10.0]))
    np.testing.assert_allclose(norm(x), x / np.sqrt(12.5) * np.array([2, 10]), rtol=1e-6)


def test_swiglu_gates_the_second_half_by_the_first():
    layer, x = SwiGLU(3, 2, key=jax.random.key(0)), jnp.array([[0.3, -1.0, 2.0]])
    layer = eqx.tree_at(lambda m: (m.up.bias, m.down.bias), layer, (jnp.arange(4.0).reshape(2, 2), jnp.ones(3)))
    gate, value = x @ layer.up.weight[:, 0] + jnp.array([0.0, 1.0]), x @ layer.up.weight[:, 1] + jnp.array([2.0, 3.0])
    expected = (gate / (1 + jnp.exp(-gate)) * value) @ layer.down.weight + 1
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)
