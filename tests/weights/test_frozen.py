"""Autoencoders read by name and from every kind of place."""

import json

import jax
import numpy as np
import pytest
from references import assert_close, chw, hwc, load, tiny_vae, weights, write_tiny_vae

import ditx
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.sampling import make_decode
from ditx.weights import vae_weights
from ditx.weights.files import write_safetensors

TINY_VAE = weights(load("vae_tiny.npz"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_tiny_vae(tmp_path_factory.mktemp("vae") / "stable")


def test_an_autoencoder_is_read_from_every_kind_of_place(vae, tmp_path):
    model, _ = tiny_vae()
    config = (vae / "vae" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    write_safetensors(tmp_path / "renamed.safetensors", TINY_VAE)
    names = set()
    for place in (vae, vae / "vae", vae / "vae" / "diffusion_pytorch_model.bin", tmp_path / "renamed.safetensors"):
        read, name = vae_weights.load_vae(str(place))
        assert read.config == ditx.VAEConfig(block_channels=(16, 32), layers_per_block=1, norm_groups=8)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(read), jax.tree.leaves(model))
        names.add(name.removeprefix(str(place)))
    assert len(names) == 1  # the same checksum


def test_the_three_decoders_are_fetched_by_name(monkeypatch, tmp_path):
    shapes = load("vae_sd_state_dict_shapes.json")
    write_safetensors(
        tmp_path / "full.safetensors", {k: np.full(shape, 0.5, np.float32) for k, shape in shapes.items()}
    )
    asked = []
    monkeypatch.setattr("ditx.weights.files.fetch", lambda *what: asked.append(what) or tmp_path / "full.safetensors")
    for name in ("original", "ft-ema", "ft-mse"):
        model, said = vae_weights.load_vae(name)
        assert model.config == ditx.VAEConfig() and said.startswith(f"{name} (CRC-32 ")
    assert asked == [vae_weights.VAES[name] for name in ("original", "ft-ema", "ft-mse")]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shift_factor": 0.1}, "of a kind not supported: shift_factor 0.1"),
        ({"use_quant_conv": False, "act_fn": "relu"}, "act_fn 'relu', use_quant_conv False"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny'"),
        ({"norm_num_groups": 5}, "are not multiples of norm_groups 5"),
        ({"block_out_channels": [16, 64]}, "the weights do not fit the configuration"),
    ],
)
def test_other_autoencoders_are_refused(vae, tmp_path, changes, sentence):
    config = json.loads((vae / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", TINY_VAE)
    with pytest.raises(ValueError, match=sentence):
        vae_weights.load_vae(str(tmp_path))


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_in_batches_equals_the_reference(batch, highest_precision):
    model, golden = tiny_vae()
    decode = make_decode(model, make_mesh(MeshConfig()), batch)
    latents = np.resize(hwc(golden["latent"]), (11, 8, 8, 4))
    decoded = decode(latents)
    assert decoded.shape == (11, 16, 16, 3)
    assert_close(chw(decoded[:2]), golden["decoded"], 1e-5)
    assert_close(decoded[10], decoded[0], 1e-6)
