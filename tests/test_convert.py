import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from references import GOLDEN, assert_close, load, tiny_dit
from strategies import NETWORKS, configs, example, forward, random_dit

import ditx
from ditx.convert import dit_from_torch, dit_to_torch


def test_reference_weights_come_back_bit_for_bit():
    model, golden = tiny_dit()
    written = dit_to_torch(model)
    expected = {k.removeprefix("weight/"): v for k, v in golden.items() if k.startswith("weight/")}
    expected.pop("pos_embed")
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous
        np.testing.assert_array_equal(value, expected[name])


@NETWORKS
@given(configs())
def test_any_network_comes_back_bit_for_bit(config):
    model = random_dit(config)
    back = dit_from_torch(dit_to_torch(model), config)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, back, model)


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
def test_names_and_shapes_are_those_of_released_checkpoints(name):
    shapes = load("dit_state_dict_shapes.json")[name]
    empty = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}  # of any size, in four bytes
    with pytest.raises(ValueError, match=r"missing none; surplus \['extra'\]; wrong shapes none"):
        dit_from_torch(empty | {"extra": np.zeros(1)}, ditx.DIT_CONFIGS[name])


def test_all_faults_are_listed_at_once():
    model, _ = tiny_dit()
    weights = dit_to_torch(model)
    del weights["blocks.1.attn.qkv.bias"], weights["final_layer.linear.weight"]
    weights |= {"stray": np.zeros(2), "blocks.2.mlp.fc1.bias": np.zeros(192)}
    weights["x_embedder.proj.bias"] = np.zeros(47)
    weights["y_embedder.embedding_table.weight"] = np.zeros((10, 48))
    with pytest.raises(ValueError, match="the weights do not fit the configuration") as error:
        dit_from_torch(weights, model.config)
    for fault in [
        "missing ['blocks.1.attn.qkv.bias', 'final_layer.linear.weight']",
        "surplus ['stray', 'blocks.2.mlp.fc1.bias']",
        "x_embedder.proj.bias is (47,), not (48,)",
        "y_embedder.embedding_table.weight is (10, 48), not (11, 48)",
    ]:
        assert fault in str(error.value)


def test_weights_of_another_configuration_are_refused():
    model, _ = tiny_dit()
    without_null = dataclasses.replace(model.config, label_dropout=0.0)
    with pytest.raises(ValueError, match=r"embedding_table.weight is \(11, 48\), not \(10, 48\)"):
        dit_from_torch(dit_to_torch(model), without_null)


def test_half_precision_weights_become_float32():
    model, _ = tiny_dit()
    half = {name: value.astype(np.float16) for name, value in dit_to_torch(model).items()}
    back = dit_from_torch(half, model.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype("float32")}
    arguments = example(model.config)
    assert_close(forward(back, *arguments), forward(model, *arguments), 0.01)  # eleven bits of weights


def test_golden_files_are_all_read():
    names = {path.name for path in GOLDEN.iterdir()}
    assert names >= {"dit_tiny.npz", "dit_s8_formula.npz", "diffusion.npz", "paper_tables.json"}
