"""sample.py as a user runs it."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from scripts import TINY

from ditx.diffusion.objective import ObjectiveConfig
from ditx.training import checkpoint
from ditx.training import run as runs
from ditx.weights import pretrained


@pytest.mark.slow
def test_a_network_without_labels_trains_and_guides_another(finished, run, tmp_path):
    flags = [*TINY, "--model.num-classes", 0, "--sampling.guidance-scale", 1, "--steps", 1, "--sample-every", 1]
    code, said = run.train(*flags, "--run", tmp_path / "free")
    assert code == 0 and "5,000 images of 28x28x1, 0 classes" in said, said
    assert runs.read_config(tmp_path / "free")["class_names"] == []
    code, said = run.sample(tmp_path / "free", "--separate", "--num-samples", 2)
    assert code == 0 and (tmp_path / "free" / "samples-000" / "000001-any.png").exists(), said
    code, said = run.sample(tmp_path / "free", "--guidance-scale", 2)
    assert code == 2 and "the network has no labels; use 1" in said

    # Guided by itself, nothing changes; guided by another one, it does.
    grids = {}
    for name, guide in {"alone": "", "same": finished[0], "free": tmp_path / "free"}.items():
        scale, grid = (["--guidance-scale", 1 if name == "alone" else 3], tmp_path / f"{name}.png")
        succeed(run, finished[0], "--num-samples", 8, "--npz", "--guide", guide, *scale, "--out", grid)
        with np.load(grid.with_suffix(".npz")) as file:
            grids[name] = file["arr_0"].astype(int)
    assert np.abs(grids["same"] - grids["alone"]).max() <= 1 < np.abs(grids["free"] - grids["alone"]).max()


def test_a_guide_must_be_of_the_same_kind(finished):
    described = pretrained.describe(finished[0])
    replace(described, class_names=(), model=replace(described.model, num_classes=0)).check_guides(described)
    for other, sentence in [
        (
            replace(described, objective=ObjectiveConfig("cosine")),
            "schedule of --guide is cosine, but of the network flow",
        ),
        (replace(described, model=replace(described.model, in_channels=3)), "in_channels of --guide is 3, but of"),
        (replace(described, class_names=tuple("abcdefghij")), "the classes of --guide are not those of the network"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            other.check_guides(described)


def test_live_weights_and_older_checkpoints_are_chosen(finished, run, tmp_path):
    kept, images = checkpoint.steps(finished[0] / "checkpoints"), {}
    for name, flags in {"ema": [], "live": ["--weights", "live"], "older": ["--step", kept[0]]}.items():
        code, said = run.sample(finished[0], "--num-samples", 4, "--npz", "--out", tmp_path / f"{name}.png", *flags)
        assert code == 0 and f"at step {kept[0] if name == 'older' else 40}" in said
        assert (name == "live") == ("live weights" in said)
        with np.load(tmp_path / f"{name}.npz") as file:
            images[name] = file["arr_0"]
    assert (images["ema"] != images["live"]).any() and (images["ema"] != images["older"]).any()
    code, said = run.sample(finished[0], "--step", 39)
    assert code == 2 and f"no checkpoint of step 39; choose a step that it keeps: {kept[0]}, " in said
    code, said = run.ditx("convert", finished[0], tmp_path / "live.safetensors", "--weights", "live", "--step", kept[0])
    assert code == 0 and f"at step {kept[0]}, live weights" in said
    code, said = run.sample(tmp_path / "live.safetensors", "--weights", "live")
    assert code == 2 and "live.safetensors is not a run, so it has no steps and no live weights; leave" in said


def succeed(run, source, *flags):
    code, said = run.sample(source, *flags)
    assert code == 0, said


def test_samples_are_written_in_every_form_and_never_over_others(finished, run, tmp_path):
    out = tmp_path / "grid.png"
    succeed(run, finished[0], "--num-samples", 12, "--out", out, "--npz", "--separate", "--animate", "--steps", 4)
    with np.load(tmp_path / "grid.npz") as file:
        assert file["arr_0"].shape == (12, 28, 28, 1) and file["arr_0"].dtype == np.uint8
        assert file["labels"].tolist() == [*range(10), 0, 1]
        images = file["arr_0"]
    files = sorted((tmp_path / "grid").iterdir())
    assert [file.name for file in files][:2] == ["000000-0.png", "000001-1.png"] and len(files) == 12
    for file, image in zip(files, images, strict=True):
        with PIL.Image.open(file) as single:
            np.testing.assert_array_equal(np.asarray(single), image[..., 0])
    with PIL.Image.open(tmp_path / "grid.gif") as moving, PIL.Image.open(out) as grid:
        width, height = grid.size  # two columns of five classes, each with its name and room for two digits
        assert moving.n_frames > 2 and moving.size == grid.size and height == 5 * 58 - 2 and 4 * 58 < width < 6 * 58
    code, said = run.sample(finished[0], "--out", out)
    assert code == 2 and "exists already" in said


def test_sample_k_depends_on_seed_and_k_alone(finished, run, tmp_path):
    results = {}
    for name, flags in {"a": ["--batch", 8], "b": ["--batch", 24], "c": ["--seed", 1]}.items():
        succeed(run, finished[0], "--num-samples", 20, "--npz", "--out", tmp_path / f"{name}.png", *flags)
        with np.load(tmp_path / f"{name}.npz") as file:
            results[name] = file["arr_0"].astype(int)
    # Rounding may move a pixel that lies next to a boundary by one.
    assert np.abs(results["a"] - results["b"]).max() <= 1
    assert np.abs(results["a"] - results["c"]).max() > 50
    assert np.abs(results["a"][0] - results["a"][10]).max() > 50


def test_newest_run_is_the_default_and_classes_have_names(finished, run, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "runs" / "newer")
    shutil.copytree(finished[0], tmp_path / "runs" / "older")
    config = json.loads((tmp_path / "runs" / "newer" / "config.json").read_text())
    config["class_names"] = [f"digit {name}" for name in config["class_names"]]
    time.sleep(0.01)
    (tmp_path / "runs" / "newer" / "config.json").write_text(json.dumps(config))
    time.sleep(0.01)
    (tmp_path / "runs" / "older" / "samples-000.png").touch()  # drawn from since, but not trained
    monkeypatch.chdir(tmp_path)
    code, said = run.sample("--labels", "digit 7", 3, "--num-samples", 4, "--npz")
    assert code == 0 and "runs/newer at step 40" in said and "4 samples" in said, said
    with np.load(tmp_path / "runs" / "newer" / "samples-000.npz") as file:
        assert file["labels"].tolist() == [7, 3, 7, 3]
    run.sample("--num-samples", 1)
    assert (tmp_path / "runs" / "newer" / "samples-001.png").exists()


SAMPLE_MISTAKES = {
    "guidance_scale is nan": ["--guidance-scale", "nan"],
    "seed is 4294967296; it goes from 0": ["--seed", 2**32],
    "unknown class 'cat'; choose from 0 to 9: 0, 1": ["--labels", "cat"],
    "unknown class '10'": ["--labels", 10],
    "cannot make the folder pyproject.toml (File exists); give another place": ["--out", "pyproject.toml/grid.png"],
    "guidance_interval is 800.0 to 200.0; give two rising times": ["--guidance-interval", 800, 200],
    "steps is -1": ["--steps", -1],
    "guidance_channels is 3; the network has 1": ["--guidance-channels", 3],
    "num_samples is -1; it must not be negative": ["--num-samples", -1],
    "give a name that ends in .png": ["--out", "grid.jpg"],
    "kernels is fused, which needs GPUs": ["--kernels", "fused"],
    "attention is cudnn, which needs GPUs": ["--attention", "cudnn"],
}


@pytest.mark.parametrize("sentence", SAMPLE_MISTAKES)
def test_a_mistake_in_sampling_gets_one_sentence(sentence, finished, run):
    before = set(finished[0].iterdir())
    code, said = run.sample(finished[0], *SAMPLE_MISTAKES[sentence])
    assert code == 2 and sentence in said and "Traceback" not in said, said
    assert set(finished[0].iterdir()) == before


def test_a_run_that_is_not_there_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run.sample()
    assert code == 2 and "there is no run under runs/" in said
    code, said = run.sample("nowhere")
    assert code == 2 and "nowhere: there is no such file or folder" in said
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    code, said = run.sample("runs/digit")
    assert code == 2 and "there is no such file or folder; did you mean 'runs/digits'?" in said, said


def test_guidance_needs_a_null_label(copy, run):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["label_dropout"] = 0.0
    (copy / "config.json").write_text(json.dumps(config))
    code, said = run.sample(copy, "--guidance-scale", 2)
    assert code == 2 and "no null label" in said
