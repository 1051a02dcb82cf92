"""`ditx.load`, `ditx.save` and `ditx.sample`, as the weights room's page shows them."""

import numpy as np
import pytest
from networks import random_dit

import ditx
from ditx.diffusion.objective import ObjectiveConfig
from ditx.sampling import SamplingConfig
from ditx.weights.pretrained import Description


def test_samples_are_those_of_sample_py(finished, run, tmp_path):
    model, info = ditx.load(str(finished[0]))
    images = ditx.sample(model, info, labels=[3, 7], num=5, seed=2)
    assert images.shape == (5, 28, 28, 1) and images.dtype == np.uint8
    flags = ("--labels", 3, 7, "--num-samples", 5, "--seed", 2, "--npz", "--out", tmp_path / "a.png")
    code, said = run.sample(finished[0], *flags, "--weights", "ema")
    assert code == 0, said
    with np.load(tmp_path / "a.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - images).max() <= 1
    live, _ = ditx.load(finished[0], weights="live")
    assert not np.array_equal(live.patch.weight, model.patch.weight)
    ditx.save(tmp_path / "a.safetensors", model, info)
    again, info_again = ditx.load(tmp_path / "a.safetensors")
    assert info_again == info
    np.testing.assert_array_equal(again.patch.weight, model.patch.weight)


def test_mistakes_are_value_errors(tmp_path):
    config = ditx.DiTConfig(4, 2, 1, 8, 1, 1, num_classes=2, learn_sigma=False)
    info = Description(config, ObjectiveConfig(), SamplingConfig("euler", 2), ("cat", "dog"))
    model = random_dit(config)
    assert ditx.sample(model, info, ["dog"]).shape == (1, 4, 4, 1)
    for call, sentence in [
        (lambda: ditx.load(tmp_path / "none.pt"), "there is no such file or folder"),
        (lambda: ditx.sample(model, info, ["bird"]), "unknown class 'bird'"),
        (lambda: ditx.sample(model, info, [0], steps=-1), "steps is -1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
