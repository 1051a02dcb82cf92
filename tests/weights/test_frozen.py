"""Frozen networks: autoencoders by name and from files, Inception from files and downloads."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_close, chw, hwc, load, tiny_vae, weights, write_tiny_vae

import ditx
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.sampling import make_decode
from ditx.weights import frozen
from ditx.weights.files import write_safetensors, write_torch
from ditx.weights.frozen import load_inception

TINY_VAE = weights(load("vae_tiny.npz"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_tiny_vae(tmp_path_factory.mktemp("vae") / "stable")


def test_an_autoencoder_is_read_from_files_and_folders(vae, tmp_path):
    model, _ = tiny_vae()
    config = (vae / "vae" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    write_safetensors(tmp_path / "renamed.safetensors", TINY_VAE)
    names = set()
    for place in (vae, vae / "vae", vae / "vae" / "diffusion_pytorch_model.bin", tmp_path / "renamed.safetensors"):
        read, name = frozen.load_vae(str(place))
        assert read.config == ditx.VAEConfig(block_channels=(16, 32), layers_per_block=1, norm_groups=8)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(read), jax.tree.leaves(model))
        names.add(name.removeprefix(str(place)))
    assert len(names) == 1  # the same checksum


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents_mean": [0.1] * 4}, "has one of latents_mean and latents_std; add the other"),
        ({"latents_mean": [0.1], "latents_std": [1.0]}, r"mean is \(0.1,\); give a number for each of 4 channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1] * 4, "shift_factor": 0.1}, "not supported: shift_factor 0.1"),
        ({"use_quant_conv": False, "use_post_quant_conv": True}, "use_post_quant_conv True"),
        ({"act_fn": "relu"}, "act_fn 'relu'"),
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
        frozen.load_vae(str(tmp_path))


MEAN, STD = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 1.0, 4.0]


@pytest.mark.parametrize("fields", [{"latents_mean": MEAN, "latents_std": STD}, {"shift_factor": 0.3}])
def test_latents_are_normalised_as_in_diffusers(vae, tmp_path, fields):
    """diffusers' pipelines decode z * std / scaling_factor + mean, or z / scaling_factor + shift_factor."""
    config = json.loads((vae / "vae" / "config.json").read_text()) | {"scaling_factor": 0.5} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", TINY_VAE)
    (model, _), (plain, _) = frozen.load_vae(str(tmp_path)), frozen.load_vae(str(vae))
    scale = plain.config.scale
    mean, std = np.array(fields.get("latents_mean", 0.3)), np.array(fields.get("latents_std", 1.0))
    random = np.random.default_rng(0)
    z, image = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((4, 4, 4), (8, 8, 3)))
    raw = jnp.asarray(z * std / 0.5 + mean, jnp.float32)
    assert_close(model.decode(z), plain.decode(raw * scale), 1e-5)
    ours, (theirs, log_variance) = model.encode(image), plain.encode(image)
    assert_close(ours[0], (theirs / scale - mean) / std * 0.5, 1e-5)
    assert_close(ours[1], log_variance - 2 * np.log(scale) + 2 * np.log(0.5 / std), 1e-5)


def test_an_autoencoder_without_quant_convolutions_is_read(vae, tmp_path):
    eye = np.eye(8, dtype=np.float32)[..., None, None]
    for name, quant in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        config = json.loads((vae / "vae" / "config.json").read_text())
        config |= {"use_quant_conv": quant, "use_post_quant_conv": quant}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        state = {key: value for key, value in TINY_VAE.items() if "quant" not in key}
        if quant:
            state |= {"quant_conv.weight": eye, "post_quant_conv.weight": eye[:4, :4]}
            state |= {"quant_conv.bias": np.zeros(8, np.float32), "post_quant_conv.bias": np.zeros(4, np.float32)}
        write_safetensors(tmp_path / name / "diffusion_pytorch_model.safetensors", state)
    (model, _), (same, _) = (frozen.load_vae(str(tmp_path / name)) for name in ("without", "with"))
    z, image = jnp.ones((4, 4, 4)), jnp.linspace(-1, 1, 192).reshape(8, 8, 3)
    assert_close(model.decode(z), same.decode(z), 1e-6)
    assert_close(model.encode(image)[0], same.encode(image)[0], 1e-6)


def ldm_name(name):
    """A name of diffusers' autoencoder in the authors' latent-diffusion, whose decoder counts its levels backwards."""
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{1 - int(match[1])}", name).replace("down_blocks", "down")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace("to_out.0", "proj_out")
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block").replace(".to_", ".")
    name = name.replace("samplers.0", "sample").replace("conv_shortcut", "nin_shortcut")
    return name.replace("conv_norm_out", "norm_out")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_layout_of_latent_diffusion_is_read(prefix):
    model, _ = tiny_vae()
    modern = ditx.convert.vae_to_torch(model)
    state = {prefix + ldm_name(name): value for name, value in modern.items()}
    state = {
        name: value[..., None, None] if "attn_1" in name and value.ndim == 2 else value for name, value in state.items()
    }
    state |= {"loss.discriminator.weight": np.zeros(3), "model.diffusion_model.out.bias": np.zeros(3)}
    assert f"{prefix}decoder.up.0.block.0.norm1.weight" in state and f"{prefix}encoder.mid.attn_1.q.weight" in state
    jax.tree.map(np.testing.assert_array_equal, ditx.convert.vae_from_torch(state, model.config), model)


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_in_batches_equals_the_reference(batch, highest_precision):
    model, golden = tiny_vae()
    decode = make_decode(model, make_mesh(MeshConfig()), batch)
    latents = np.resize(hwc(golden["latent"]), (11, 8, 8, 4))
    decoded = decode(latents)
    assert decoded.shape == (11, 16, 16, 3)
    assert_close(chw(decoded[:2]), golden["decoded"], 1e-5)
    assert_close(decoded[10], decoded[0], 1e-6)


# Inception.


@pytest.fixture(scope="module")
def state():
    """Half-precision weights with one value a tensor, so that files are written fast."""
    shapes = load("inception_state_dict_shapes.json")
    return {name: np.full(shape, i / 512, np.float16) for i, (name, shape) in enumerate(shapes.items())}


def test_every_kind_of_file_gives_the_same_network(state, tmp_path):
    write_torch(tmp_path / "a.pth", state)
    write_safetensors(tmp_path / "b.safetensors", state)
    np.savez(tmp_path / "c.npz", **state)
    (tmp_path / "c.npz").rename(tmp_path / "c.weights")  # by content, not by its name
    models, notes = zip(
        *[load_inception(str(tmp_path / name)) for name in ("a.pth", "b.safetensors", "c.weights")], strict=True
    )
    for model in models[1:]:
        jax.tree.map(np.testing.assert_array_equal, model, models[0])
    assert notes[0].startswith(f"{tmp_path / 'a.pth'} (CRC-32 ")
    assert len({note.split(" (")[1] for note in notes}) == 1


def test_other_files_are_refused_in_one_sentence(tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}]))
    (tmp_path / "text.pth").write_text("no weights at all")
    for name, sentence in [
        ("other.npz", r"the weights do not fit .* surplus \['arr_0'\]"),
        ("objects.npz", r"cannot read .* as an \.npz of plain arrays"),
        ("text.pth", "it begins with b'no weights at al', unlike files of safetensors and torch"),
        ("nowhere.pth", "there is no such file; give pytorch-fid's weights, or no file to download them"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_inception(str(tmp_path / name))
