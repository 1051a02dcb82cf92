"""The three designs for which there is no reference program, against their formulas written out in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from networks import example, forward, random_dit
from references import assert_close

import ditx
from ditx.nn.embeddings import grid_positions

CONFIG = ditx.DiTConfig(
    input_size=6, patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=2, mlp_ratio=2.0, num_classes=10
)


def linear(layer, x):
    return np.tensordot(x, layer.weight, 1) + layer.bias


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normal(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def norm(layer, x):
    return normal(x) * layer.weight + layer.bias


def heads(q, k, v, count):
    outputs = []
    for part in np.split(np.arange(q.shape[-1]), count):
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(len(part)))
        outputs.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(outputs, axis=-1)


def attention(layer, x):
    return linear(layer.out, heads(*np.moveaxis(linear(layer.qkv, x), 1, 0), layer.num_heads))


def cross_attention(layer, x, context):
    q, k, v = linear(layer.q, x), linear(layer.k, context), linear(layer.v, context)
    return linear(layer.out, heads(q, k, v, layer.num_heads))


def mlp(layer, x):
    return linear(layer.down, gelu(linear(layer.up, x)))


def network(model, x, t, y):
    """The whole network, a block of each design as section 3.2 of the paper describes it."""
    config = model.config
    model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
    p, side = config.patch_size, config.input_size // config.patch_size
    patches = np.asarray(x).reshape(side, p, side, p, -1).transpose(0, 2, 1, 3, 4).reshape(side * side, -1)
    tokens = linear(model.patch, patches) + grid_positions(side, config.hidden_size)
    angles = t * np.exp(-np.log(10000) * np.arange(128) / 128)
    time = linear(model.time.down, silu(linear(model.time.up, np.concatenate([np.cos(angles), np.sin(angles)]))))
    label = model.label.table[y]
    if config.block == "in-context":
        tokens = np.concatenate([tokens, [time, label]])
    for i in range(config.depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        if config.block == "adaln":
            shift1, scale1, shift2, scale2 = np.split(linear(block.modulation, silu(time + label)), 4)
            tokens = tokens + attention(block.attention, normal(tokens) * (1 + scale1) + shift1)
            tokens = tokens + mlp(block.mlp, normal(tokens) * (1 + scale2) + shift2)
        elif config.block == "cross-attention":
            tokens = tokens + attention(block.attention, norm(block.norm1, tokens))
            context = np.stack([time, label])
            tokens = tokens + cross_attention(block.cross_attention, norm(block.norm2, tokens), context)
            tokens = tokens + mlp(block.mlp, norm(block.norm3, tokens))
        else:
            tokens = tokens + attention(block.attention, norm(block.norm1, tokens))
            tokens = tokens + mlp(block.mlp, norm(block.norm2, tokens))
    if config.block == "adaln":
        shift, scale = np.split(linear(model.final.modulation, silu(time + label)), 2)
        patches = linear(model.final.linear, normal(tokens) * (1 + scale) + shift)
    else:
        patches = linear(model.final.linear, norm(model.final.norm, tokens[: side * side]))
    patches = patches.reshape(side, side, p, p, -1).transpose(0, 2, 1, 3, 4)
    return patches.reshape(config.input_size, config.input_size, -1)


@pytest.mark.parametrize("block", ["adaln", "cross-attention", "in-context"])
def test_output_is_that_of_the_formulas(block, highest_precision):
    config = dataclasses.replace(CONFIG, block=block)
    model, (x, t, y) = random_dit(config), example(config)
    assert_close(forward(model, x, t, y), network(model, x, int(t), int(y)), 1e-4)


@pytest.mark.parametrize("block", ["adaln", "cross-attention", "in-context"])
def test_a_new_network_has_xavier_weights_and_neutral_norms(block):
    model = ditx.DiT(dataclasses.replace(CONFIG, block=block), key=jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.blocks):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert np.all(leaf == name.endswith("weight")), name
        elif "bias" in name or "modulation" in name:
            assert not np.any(leaf), name
        else:
            bound = np.sqrt(6 / (leaf.shape[1] + np.prod(leaf.shape[2:])))
            assert 0.95 * bound < np.abs(leaf).max() <= bound, name
