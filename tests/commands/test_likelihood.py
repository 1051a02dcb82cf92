import json

import jax
import numpy as np
import pytest
from networks import random_dit

import ditx
from ditx.data.image_files import to_unit
from ditx.diffusion import likelihood
from ditx.diffusion.objective import ObjectiveConfig
from ditx.sampling import SamplingConfig, sample_keys
from ditx.weights import pretrained
from ditx.weights.pretrained import Description


@pytest.fixture
def stored(tmp_path):
    """A network of three classes, and six images of theirs."""
    config = ditx.DiTConfig(4, 2, 1, 8, 1, 1, num_classes=3, learn_sigma=False)
    described = Description(config, ObjectiveConfig("flow", "velocity"), SamplingConfig(), ("a", "b", "c"))
    network = random_dit(config)
    pretrained.write(tmp_path / "network.safetensors", network, described)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(6) % 3, classes=["a", "b", "c"])
    return network, images, tmp_path


def test_both_bounds_are_means_over_images_with_their_labels(run, stored):
    network, images, folder = stored
    flags = ["--steps", 5, "--batch", 4, "--seed", 3, "--probes", 2]
    code, said = run.ditx("likelihood", folder / "network.safetensors", folder / "data.npz", *flags, "--json")
    assert code == 0, said
    grid = ObjectiveConfig("flow", "velocity").sampler_grid(5, "log-snr")

    def one(x, y, key):
        def predict(x, t):
            return network(x, t, y)

        bound = likelihood.variational_bpd(grid, predict, x, key=key)["total"]
        return bound, likelihood.ode_bpd(grid, predict, x, key=key, probes=2)

    both = np.stack(jax.jit(jax.vmap(one))(to_unit(images), np.arange(6) % 3, sample_keys(3, 0, 6)), 1)
    told, errors = json.loads(said), both.std(0) / np.sqrt(6)
    expected = dict(
        zip(
            ("variational", "variational_error", "ode", "ode_error"),
            np.stack([both.mean(0), errors], 1).ravel(),
            strict=True,
        )
    )
    assert told == {"images": 6, "steps": 5} | {
        name: pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }


def test_mistakes_are_one_sentence(run, stored):
    folder = stored[2]
    np.savez(folder / "other.npz", images=np.zeros((2, 4, 4, 1), np.uint8), labels=[0, 1], classes=["a", "c"])
    for data, flags, sentence in [
        ("digits", [], "the images are 28x28x1, but the network's are 4x4x1"),
        (folder / "other.npz", [], "are not those of"),
        (folder / "data.npz", ["--steps", 1], "steps is 1; it must be at least 2"),
        (folder / "none.npz", [], "there is no such file or folder"),
    ]:
        code, said = run.ditx("likelihood", folder / "network.safetensors", data, *flags)
        assert code == 2 and sentence in said and "Traceback" not in said, said
