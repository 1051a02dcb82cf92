"""Golden arrays of other programs, in our conventions."""

import json
import zlib
from pathlib import Path

import numpy as np

import ditx
from ditx.weights.files import write_torch

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    """A golden file as a dictionary."""
    if name.endswith(".json"):
        return json.loads((GOLDEN / name).read_text())
    with np.load(GOLDEN / name) as file:
        return dict(file)


def hwc(array):
    """Transpose the references' `... c h w` to our `... h w c`."""
    return np.moveaxis(array, -3, -1)


def chw(array):
    return np.moveaxis(np.asarray(array), -1, -3)


def assert_close(ours, theirs, tolerance):
    """Agreement within `tolerance` of the largest entry of the reference."""
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def formula(name, shape):
    """Random weights seeded by the tensor's name."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    values = state.standard_normal(int(np.prod(shape))).reshape(shape)
    if name.endswith("running_var"):
        return (0.5 + np.abs(values)).astype(np.float32)
    if len(shape) > 1:
        return (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (0.1 * values + (("norm" in name or "bn" in name) and name.endswith("weight"))).astype(np.float32)


def inception_weights():
    """The state dict of `inception_formula.npz`: `formula`, scaled up so that signals survive all layers."""
    state = {name: formula(name, shape) for name, shape in load("inception_state_dict_shapes.json").items()}
    for name, value in state.items():
        if value.ndim == 4:
            state[name] = value * np.float32(np.sqrt(2))
        elif name.endswith(".bn.weight"):
            state[name] = np.abs(value)
    return state


def weights(golden):
    """The state dict in a golden file."""
    return {name.removeprefix("weight/"): golden[name] for name in golden if name.startswith("weight/")}


def tiny_dit():
    """The reference's tiny network and its whole golden file."""
    golden = load("dit_tiny.npz")
    fields = json.loads(str(golden["config"]))
    fields["label_dropout"] = fields.pop("class_dropout_prob")
    return ditx.weights.convert.dit_from_torch(weights(golden), ditx.DiTConfig(**fields)), golden


def tiny_diffusers_config():
    """The configuration of `diffusers_dit_tiny.npz`; `dit_from_diffusers` sets the other fields."""
    return ditx.DiTConfig(8, 2, 4, 48, 2, 3, num_classes=10)


def tiny_vae():
    """The reference's tiny autoencoder, without the scale, and its whole golden file."""
    golden = load("vae_tiny.npz")
    config = ditx.VAEConfig(block_channels=(16, 32), layers_per_block=1, norm_groups=8, scale=1.0)
    return ditx.weights.convert.vae_from_torch(weights(golden), config), golden


def write_tiny_vae(folder):
    """The tiny autoencoder as a pipeline's folder in diffusers' layout."""
    golden = load("vae_tiny.npz")
    (folder / "vae").mkdir(parents=True)
    config = json.loads(str(golden["config"])) | {"_class_name": "AutoencoderKL"}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    write_torch(folder / "vae" / "diffusion_pytorch_model.bin", weights(golden))
    return folder
