import dataclasses
import json
import os
import pickle

import jax
import numpy as np
import pytest
from networks import random_dit
from references import load, weights

import ditx
from ditx.diffusion.objective import ObjectiveConfig
from ditx.sampling import SamplingConfig
from ditx.weights import pretrained
from ditx.weights.files import read, write_safetensors, write_torch
from ditx.weights.pretrained import Description

TINY = weights(load("dit_tiny.npz"))
DIFFUSERS = weights(load("diffusers_dit_tiny.npz"))


@pytest.fixture
def released(tmp_path):
    """A file in the layout of the authors' checkpoints."""
    write_torch(tmp_path / "tiny.pt", TINY)
    return tmp_path / "tiny.pt"


def assert_same(tensors, expected):
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_the_authors_weights_come_back_bit_for_bit(run, released, tmp_path):
    ours, back = tmp_path / "new" / "ours.safetensors", tmp_path / "back.pt"
    code, output = run.ditx("convert", released, ours, "--num-heads", 3)
    assert code == 0 and "in the layout of authors" in output and f"wrote {ours} in the layout of ditx" in output
    code, output = run.ditx("convert", ours, back)
    assert code == 0 and "in the layout of authors" in output
    assert_same(read(back).tensors, TINY)
    code, _ = run.ditx("convert", back, tmp_path / "back.safetensors", "--to", "authors", "--num-heads", 3)
    assert code == 0
    assert_same(read(tmp_path / "back.safetensors").tensors, TINY)


def test_a_diffusers_folder_comes_back_bit_for_bit(run, tmp_path):
    source, ours, back = tmp_path / "source", tmp_path / "ours.safetensors", tmp_path / "back"
    source.mkdir()
    config = json.loads(str(load("diffusers_dit_tiny.npz")["config"]))
    (source / "config.json").write_text(json.dumps(config | {"_class_name": "DiTTransformer2DModel"}))
    write_safetensors(source / "diffusion_pytorch_model.safetensors", DIFFUSERS)
    for arguments in ((source, ours), (ours, back, "--to", "diffusers")):
        code, output = run.ditx("convert", *arguments)
        assert code == 0 and "time frequencies" not in output, output
    assert_same(read(back / "diffusion_pytorch_model.safetensors").tensors, DIFFUSERS)
    written = json.loads((back / "config.json").read_text())
    assert {name: written[name] for name in config} == config
    assert pretrained.describe(ours) == pretrained.describe(back)
    assert pretrained.describe(ours).model.frequency_shift == 1


def test_a_difference_of_diffusers_is_noted(run, released, tmp_path):
    code, output = run.ditx("convert", released, tmp_path / "folder", "--num-heads", 3, "--to", "diffusers")
    assert code == 0 and "time frequencies of diffusers differ from those that this network was trained with" in output
    folder = tmp_path / "folder"
    code, output = run.ditx("convert", folder, tmp_path / "back.pt", "--frequency-shift", 0)
    assert code == 0 and "time frequencies" not in output
    assert_same(read(tmp_path / "back.pt").tensors, TINY)


def test_sit_weights_are_read_with_their_flag(run, released, tmp_path):
    ours = tmp_path / "sit.safetensors"
    code, output = run.ditx("convert", released, ours, "--num-heads", 3, "--convention", "sit")
    assert code == 0, output
    described = pretrained.describe(ours)
    assert described.objective == ObjectiveConfig("flow", "velocity") and described.model.convention == "sit"
    assert described.sampling.sampler == "euler-maruyama"
    code, output = run.ditx("convert", ours, tmp_path / "again.safetensors", "--convention", "sit")
    assert code == 2 and "tells convention itself; leave that out" in output


@pytest.mark.parametrize("block", ["adaln", "cross-attention", "in-context"])
def test_our_layout_keeps_every_block(tmp_path, block):
    config = ditx.DiTConfig(8, 2, 4, 24, 2, 2, num_classes=3, learn_sigma=False, block=block)
    model = random_dit(config)
    sampling = SamplingConfig(steps=3, sampler="heun", guidance_interval=(0.0, 500.0))
    objective = ObjectiveConfig("flow", "velocity", flow_times=(0.5, 1.0), flow_shift=3.0)
    described = Description(config, objective, sampling, ("a", "b", "c"), "ft-mse", 0.2)
    pretrained.write(tmp_path / "model.safetensors", model, described)
    assert pretrained.describe(tmp_path / "model.safetensors") == described
    back, _ = pretrained.load(tmp_path / "model.safetensors", described)
    jax.tree.map(np.testing.assert_array_equal, back, model)


def test_a_hostile_pickle_is_refused_and_not_executed(run, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"weight": Hostile()}, protocol=2))
    code, output = run.ditx("convert", tmp_path / "hostile.pt", tmp_path / "out.safetensors")
    assert code == 2 and "cannot read weights from" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists() and not (tmp_path / "out.safetensors").exists()


def test_all_faults_of_a_file_are_in_one_sentence(run, tmp_path):
    state = dict(TINY)
    del state["blocks.1.attn.qkv.bias"]
    state |= {"stray": np.zeros(2, np.float32), "t_embedder.mlp.0.bias": np.zeros(47, np.float32)}
    write_torch(tmp_path / "wrong.pt", state)
    code, output = run.ditx("convert", tmp_path / "wrong.pt", tmp_path / "out.safetensors", "--num-heads", 3)
    assert code == 2
    for fault in (
        "missing ['blocks.1.attn.qkv.bias']",
        "surplus ['stray']",
        "t_embedder.mlp.0.bias is (47,), not (48,)",
    ):
        assert fault in output
    assert not (tmp_path / "out.safetensors").exists()


def test_mistakes_are_one_sentence(run, released, tmp_path):
    (tmp_path / "taken.safetensors").write_text("mine")
    (tmp_path / "empty").mkdir()
    write_safetensors(tmp_path / "other.safetensors", {"weight": np.zeros(2, np.float32)})
    new = tmp_path / "new.safetensors"
    for arguments, sentence in [
        ((released, new), "width 48, whose number of heads is unknown; give --num-heads"),
        ((released, tmp_path / "taken.safetensors"), "already exists; choose another name"),
        ((released, tmp_path / "new.bin"), "give a name with .safetensors, as the layout of ditx has"),
        ((released, tmp_path / "new.pt", "--to", "diffusers"), "with no suffix, for a folder"),
        ((tmp_path / "missing.pt", new), "there is no such file"),
        ((tmp_path / "empty", new), "is neither a run nor a folder with diffusion_pytorch_model.safetensors"),
        ((tmp_path / "other.safetensors", new), "has no DiT of ditx, of the authors or of diffusers"),
    ]:
        code, output = run.ditx("convert", *arguments)
        assert code == 2 and sentence in output and "Traceback" not in output, output
    assert (tmp_path / "taken.safetensors").read_text() == "mine" and not new.exists()


def test_facts_that_a_layout_does_not_tell_are_refused_or_noted(run, tmp_path):
    config = ditx.DiTConfig(8, 2, 4, 24, 2, 2, num_classes=3, label_dropout=0.0)
    names = ("a", "b", "c")
    for schedule, dropout in (("flow", 0.1), ("linear", 0.0)):
        network = random_dit(dataclasses.replace(config, label_dropout=dropout, learn_sigma=schedule == "linear"))
        described = Description(network.config, ObjectiveConfig(schedule), SamplingConfig(steps=3), names)
        pretrained.write(tmp_path / f"{schedule}.safetensors", network, described)
    code, output = run.ditx("convert", tmp_path / "flow.safetensors", tmp_path / "flow.pt")
    assert code == 2 and "schedule flow and prediction eps, which the layout of authors does not tell" in output
    code, output = run.ditx("convert", tmp_path / "linear.safetensors", tmp_path / "linear.pt")
    assert code == 0 and "no null label" in output
    back = tmp_path / "back.safetensors"
    code, _ = run.ditx("convert", tmp_path / "linear.pt", back, "--num-heads", 2, "--num-classes", 3)
    assert code == 0 and pretrained.describe(back).model == config
    code, output = run.ditx("convert", back, tmp_path / "other.pt", "--num-heads", 3)
    assert code == 2 and "tells num_heads itself" in output


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: [s.pop("final_layer.linear.bias"), s.pop("x_embedder.proj.weight")], "'final_layer.linear.bias'"),
        (
            lambda s: s.update({"x_embedder.proj.weight": np.zeros((48, 16), np.float32)}),
            "x_embedder.proj.weight is (48,",
        ),
        (lambda s: s.update({"t_embedder.mlp.2.bias": np.zeros(0, np.float32)}), "t_embedder.mlp.2.bias is (0,)"),
    ],
)
def test_key_tensors_that_are_missing_or_mis_shaped_are_listed(run, tmp_path, change, fault):
    state = dict(TINY)
    change(state)
    write_torch(tmp_path / "wrong.pt", state)
    code, output = run.ditx("convert", tmp_path / "wrong.pt", tmp_path / "out.pt", "--num-heads", 3)
    assert code == 2 and "the weights do not fit the configuration" in output and fault in output, output


@pytest.mark.parametrize("positions", [TINY["pos_embed"] + 1, np.zeros(7, np.float32)])
def test_positions_of_its_own_are_refused(run, tmp_path, positions):
    write_torch(tmp_path / "wrong.pt", TINY | {"pos_embed": positions})
    code, output = run.ditx("convert", tmp_path / "wrong.pt", tmp_path / "out.pt", "--num-heads", 3)
    assert code == 2 and f"a pos_embed of {positions.shape} that is not the sine-cosine one" in output, output


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 3},
        {"attention_head_dim": 12},
        {"activation_fn": "gelu"},
        {"norm_eps": "1e-5"},
        {"_class_name": "PixArtTransformer2DModel"},
        {"norm_type": "layer_norm", "_class_name": "Transformer2DModel"},
        {"sample_size": "8"},
        {"num_attention_heads": "3"},
    ],
)
def test_a_config_json_of_another_network_is_refused(run, tmp_path, change):
    config = json.loads(str(load("diffusers_dit_tiny.npz")["config"])) | {"_class_name": "DiTTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", DIFFUSERS)
    code, output = run.ditx("convert", tmp_path, tmp_path / "out.safetensors")
    name = {"sample_size": "input_size", "num_attention_heads": "num_heads"}.get(*[next(iter(change))] * 2)
    assert code == 2 and name in output and "Traceback" not in output, output


def test_a_diffusers_file_without_config_json_does_not_tell_its_size(run, tmp_path):
    write_safetensors(tmp_path / "alone.safetensors", DIFFUSERS)
    arguments = ("convert", tmp_path / "alone.safetensors", tmp_path / "out.safetensors", "--num-heads", 3)
    code, output = run.ditx(*arguments)
    assert code == 2 and "has no positions, so that its input size is unknown; give --input-size" in output
    code, output = run.ditx(*arguments, "--input-size", 8)
    assert code == 0 and pretrained.describe(tmp_path / "out.safetensors").model.input_size == 8


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"depth": "2"}}'])
def test_damaged_descriptions_are_one_sentence(run, tmp_path, text):
    write_safetensors(tmp_path / "odd.safetensors", {"patch.bias": np.zeros(2, np.float32)}, {"ditx": text})
    code, output = run.ditx("convert", tmp_path / "odd.safetensors", tmp_path / "out.safetensors")
    assert code == 2 and "odd.safetensors was written by another version of ditx, or is damaged" in output, output
    assert len(output) < 400


def test_a_users_partial_file_is_left_alone(run, released, tmp_path):
    (tmp_path / "new.safetensors.partial").write_text("mine")
    code, _ = run.ditx("convert", released, tmp_path / "new.safetensors", "--num-heads", 3)
    assert code == 0 and (tmp_path / "new.safetensors.partial").read_text() == "mine"
