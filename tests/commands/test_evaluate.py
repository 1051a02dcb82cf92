"""`ditx evaluate` as a user runs it: on weights, folders and .npz files, stopped half-way, and with wrong files."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import PIL.Image
import pytest
import scripts

from ditx import pictures
from ditx.data.sources import digits
from ditx.diffusion.objective import ObjectiveConfig
from ditx.evaluation import metrics
from ditx.evaluation.classifier import train_classifier
from ditx.evaluation.features import FeatureNetwork, FeatureStore
from ditx.evaluation.reference import read_reference
from ditx.nn.dit import DiT, DiTConfig
from ditx.nn.inception import Inception
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.sampling import SamplingConfig
from ditx.weights import pretrained

IMAGES = digits().images[::10, 2:26:3, 2:26:3]  # 500, of 8 x 8
LABELS = digits().labels[::10].astype(int)


def write_folder(folder, images, labels=None):
    for number, image in enumerate(images):
        parent = folder if labels is None else folder / str(labels[number])
        parent.mkdir(parents=True, exist_ok=True)
        pictures.to_picture(image).save(parent / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set, its reference, and weights."""
    place = tmp_path_factory.mktemp("evaluate")
    np.savez(place / "data.npz", arr_0=IMAGES, labels=LABELS)
    model = DiTConfig(8, 4, 1, 16, 1, 2, num_classes=10, learn_sigma=False)
    leaves, structure = jax.tree.flatten(DiT(model, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    network = jax.tree.unflatten(
        structure, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    )
    sampling = SamplingConfig(steps=2, sampler="euler", guidance_scale=3.0)
    described = pretrained.Description(model, ObjectiveConfig("flow", "velocity"), sampling, tuple("0123456789"))
    pretrained.write(place / "weights.safetensors", network, described)
    return place


@pytest.fixture(scope="module")
def reference(place):
    """Statistics of the data set, by a classifier trained for 20 steps."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("ditx.commands.evaluate.train_classifier", lambda *args: train_classifier(*args, steps=20))
    with monkeypatch.context():
        from ditx.commands import evaluate

        path = place / "reference.npz"
        assert evaluate.main(["--make-stats", str(path), str(place / "data.npz"), "--features", "classifier"]) == 0
    monkeypatch.undo()
    return path


def found(run, *arguments):
    code, said = run.ditx("evaluate", *arguments, "--json")
    assert code == 0, said
    return json.loads(said[said.index("{") : said.rindex("}") + 1])


def test_folders_and_arrays_are_evaluated_alike_and_as_by_the_library(reference, place, run, tmp_path):
    images = IMAGES[::7]
    np.savez(tmp_path / "samples.npz", arr_0=images)
    write_folder(tmp_path / "folder", images)
    by_array, by_folder = (found(run, tmp_path / name, reference) for name in ("samples.npz", "folder"))
    assert by_array["metrics"] == pytest.approx(by_folder["metrics"], rel=1e-12) and by_array["count"] == 72

    read = read_reference(reference)
    network = FeatureNetwork(read.classifier)
    data, pool = (np.asarray(jax.vmap(network.network)(x).pool, np.float64) for x in (IMAGES, images))
    np.testing.assert_allclose(read.pool.covariance, np.cov(data.T), rtol=1e-4, atol=1e-8)
    expected = {
        "fid": metrics.frechet_distance(pool.mean(0), np.cov(pool.T), data.mean(0), np.cov(data.T)),
        "inception_score": metrics.inception_score(network.logits(pool.astype(np.float32))),
        **metrics.precision_recall(data.astype(np.float32), pool.astype(np.float32))._asdict(),
    }
    assert by_array["metrics"] == pytest.approx(expected, rel=1e-4)
    assert by_array["metrics"]["precision"] == 1  # they are among the data

    code, said = run.ditx("evaluate", tmp_path / "samples.npz", reference, "--metrics", "fid", "sfid")
    assert code == 0 and f"FID {expected['fid']:.4f}" in said and "sFID none: the network has no spatial" in said, said
    assert "recall" not in said and "FID and sFID of 72 samples, fewer than 10,000, are too high" in said
    assert "not comparable with Inception's FID" in said and "500 images, from" in said


def test_folders_that_differ_in_pixels_only_are_judged_apart(reference, run, tmp_path):
    for name, images in (("one", IMAGES[:60]), ("two", IMAGES[60:120]), ("same", IMAGES[:60])):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            PIL.Image.fromarray(image[..., 0]).save(tmp_path / name / f"{number:02}.bmp")
    one, two, same = (found(run, tmp_path / n, reference, "--out", tmp_path / "out") for n in ("one", "two", "same"))
    assert one["metrics"]["fid"] != two["metrics"]["fid"] and same == one
    assert len((tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()) == 2


def test_a_stopped_evaluation_resumes_with_the_same_result(reference, place, run, tmp_path, monkeypatch):
    flags = [place / "weights.safetensors", reference, "--num-samples", 40, "--batch", 8]
    expected = found(run, *flags, "--out", tmp_path / "whole")
    assert expected["samples"]["guidance_scale"] == 1.0 and expected["samples"]["steps"] == 2

    add, told = FeatureStore.add, []
    with monkeypatch.context() as patch:

        def stop(self, rows):
            if len(told) == 3:
                raise KeyboardInterrupt
            told.append(self.count)
            add(self, rows)

        patch.setattr(FeatureStore, "add", stop)
        assert run.ditx("evaluate", *flags, "--out", tmp_path / "parts")[0] == 130
    (partial,) = (tmp_path / "parts").iterdir()
    # Other seeds and samplers start their own evaluation beside it.
    other = found(run, *flags, "--out", tmp_path / "parts", "--seed", 1)
    assert partial.exists() and other["metrics"] != expected["metrics"]
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "add", lambda self, rows: (told.append(self.count), add(self, rows)))
        assert found(run, *flags, "--out", tmp_path / "parts") == expected
    assert told == [0, 8, 16, 24, 32] and [file.name for file in (tmp_path / "parts").iterdir()] == [
        "evaluations.jsonl"
    ]

    # Stored results are not computed again.
    monkeypatch.setattr(FeatureStore, "add", None)
    assert found(run, *flags, "--out", tmp_path / "parts") == expected
    lines = [json.loads(line) for line in (tmp_path / "parts" / "evaluations.jsonl").read_text().splitlines()]
    assert lines == [other, expected]


@pytest.mark.slow
def test_one_device_two_processes_and_the_images_that_sample_py_writes(reference, place, run, tmp_path):
    flags = [place / "weights.safetensors", reference, "--num-samples", 20, "--balanced", "--batch", 16, "--seed", 5]
    eight = found(run, *flags, "--out", tmp_path / "8")
    command = [scripts.ROOT / "ditx" / "__main__.py", "evaluate", *flags, "--json"]
    one = scripts.start(*command, "--out", tmp_path / "1")
    two = scripts.start_together(*command, "--out", tmp_path / "2", devices=2)
    for process in (one, *two):
        code, said = scripts.finish(process)
        assert code == 0, said
    for folder in "12":
        (line,) = (tmp_path / folder / "evaluations.jsonl").read_text().splitlines()
        assert json.loads(line)["metrics"] == pytest.approx(eight["metrics"], rel=1e-3)

    grid = tmp_path / "grid.png"
    flags = ["--num-samples", 20, "--npz", "--guidance-scale", 1, "--batch", 16, "--seed", 5, "--out", grid]
    assert run.sample(place / "weights.safetensors", *flags)[0] == 0
    assert found(run, grid.with_suffix(".npz"), reference)["metrics"] == pytest.approx(eight["metrics"], rel=1e-12)


@pytest.mark.slow
def test_inception_and_a_reference_of_the_adm_suite(run, tmp_path, monkeypatch):
    """The network's features are held to the suite's in tests/nn; here, that each comes to its metric."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: Inception(key=key), jax.random.key(0))
    network = jax.tree.map(lambda x: 0.05 * rng.random(x.shape, np.float32) ** 2, shapes)
    grey, images = rng.integers(0, 256, (2, 5, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    statistics = {"mu": rng.random(2048), "sigma": np.eye(2048), "mu_s": rng.random(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", arr_0=images, **statistics)
    add, rows, mesh = FeatureStore.add, [], make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(FeatureStore, "add", lambda self, each: (rows.append(each), add(self, each)))
    monkeypatch.setattr("ditx.commands.evaluate.make_mesh", lambda config: mesh)  # compiled for one device, and soon
    monkeypatch.setattr("ditx.evaluation.reference.load_inception", lambda path: (network, f"{path} (CRC-32 0)"))
    code, said = run.ditx("evaluate", tmp_path / "grey.npz", tmp_path / "adm.npz", "--json", "--feature-batch", 5)
    assert code == 0 and "note: grey images are repeated to 3 channels" in said, said
    (reference, _), (pool, spatial) = rows
    assert reference.shape == pool.shape == (5, 2048) and spatial.shape == (5, 2023) and np.unique(pool).size > 1000
    mu, sigma, mu_s, sigma_s = statistics.values()
    expected = {
        "fid": metrics.frechet_distance(pool.mean(0), np.cov(pool.T), mu, sigma),
        "sfid": metrics.frechet_distance(spatial.mean(0), np.cov(spatial.T), mu_s, sigma_s),
        "inception_score": metrics.inception_score(pool @ network.logits),
        **metrics.precision_recall(reference, pool)._asdict(),
    }
    values = json.loads(said[said.index("{") : said.rindex("}") + 1])["metrics"]
    assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_images_have_fid_0_against_their_own_statistics_of_pytorch_fid(run, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: Inception(key=key, logits=False), jax.random.key(0))
    network = jax.tree.map(lambda x: 0.05 * rng.random(x.shape, np.float32) ** 2, shapes)
    images = rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    pool = np.asarray(jax.jit(jax.vmap(partial(network, resize="pytorch-fid")))(images).pool, np.float64)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "statistics.npz", mu=pool.mean(0), sigma=np.cov(pool.T))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr("ditx.commands.evaluate.make_mesh", lambda config: mesh)
    monkeypatch.setattr("ditx.evaluation.reference.load_inception", lambda path: (network, "weights"))
    arguments = [tmp_path / "images.npz", tmp_path / "statistics.npz", "--metrics", "fid", "--feature-batch", 5]
    assert "does not record how images were resized; give --resize pytorch-fid" in refused(run, *arguments)
    code, said = run.ditx("evaluate", *arguments, "--resize", "pytorch-fid")
    assert code == 0 and "resize pytorch-fid as given, which the reference does not record" in said, said
    assert float(said.split("FID ")[1].split()[0]) < 1e-3 * np.trace(np.cov(pool.T))


def refused(run, *arguments):
    code, said = run.ditx("evaluate", *arguments)
    assert code == 2 and "Traceback" not in said, said
    return said


def test_mistakes_end_in_a_sentence(reference, place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = place / "weights.safetensors"
    for arguments, sentence in [
        ([weights], "there is no reference; make statistics with: ditx evaluate --make-stats OUT DATA"),
        ([], "there is no run under runs/"),
        (
            [weights, reference, "--num-samples", 1],
            "num_samples is 1; it must be at least 2, since a covariance needs 2",
        ),
        ([weights, reference, "--step", 5], "is not a run, so it has no steps and no live weights; leave --step"),
        ([weights, reference, "--weights", "live"], "is not a run, so it has no steps and no live weights"),
        ([weights, reference, "--vae", "ft-mse"], "but the network makes images of 1 channels; leave it out"),
        ([weights, reference, "--guidance-interval", 5, 2], "guidance_interval is 5.0 to 2.0; give two rising times"),
        ([tmp_path / "nowhere", reference], "there is no such file or folder; give a folder of images"),
        ([place / "data.npz", tmp_path / "nowhere.npz"], "there is no such file; make it with"),
        (
            [place / "data.npz", reference, "--num-samples", 9],
            "has images, all of which are evaluated; leave out the flags of",
        ),
        (["--make-stats", "out.npz"], "--make-stats out.npz needs a source; give a folder"),
        (["--make-stats", "out.txt", "digits"], "give the name of a new file that ends in .npz"),
        (["--make-stats", reference, "digits"], "give the name of a new file that ends in .npz"),
        (["--make-stats", "out.npz", weights], "is a network, not a data set"),
        (["--make-stats", "out.npz", reference], "already has statistics; give it as the REFERENCE"),
        (["--make-stats", "out.npz", "digits", "--inception", "nowhere.pth"], "nowhere.pth: there is no such file"),
    ]:
        assert sentence in refused(run, *arguments)
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_evaluated_are_refused(reference, run, tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    for name, arrays, sentence in [
        ("float", {"arr_0": colour / 255}, "cannot be used: images are float64 of shape (6, 8, 8, 3); give uint8"),
        ("five", {"arr_0": np.zeros((6, 8, 8, 5), np.uint8)}, "has images of 5 channels; give 1 (grey) or 3 (RGB)"),
        ("other", {"x": colour}, "it has neither arr_0 nor images and labels"),
        ("one", {"arr_0": IMAGES[:1]}, "has 1 images; a covariance needs at least 2"),
        ("colour", {"arr_0": colour}, "the images are in colour but the reference is grey"),
        ("large", {"arr_0": colour.repeat(2, 1).repeat(2, 2)}, "the images are 16x16, but those of the reference 8x8"),
    ]:
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert sentence in refused(run, tmp_path / f"{name}.npz", reference)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "one.npz").read_bytes()[:300])
    assert "as an .npz of plain arrays" in refused(run, tmp_path / "cut.npz", reference)

    folder = write_folder(tmp_path / "folder", IMAGES[::25], LABELS[::25])
    whole = (folder / str(LABELS[75]) / "0003.png").read_bytes()
    (folder / str(LABELS[75]) / "0003.png").write_bytes(whole[:60])
    assert f"cannot read image {folder / str(LABELS[75]) / '0003.png'}: " in refused(run, folder, reference)
    (folder / str(LABELS[75]) / "0003.png").write_bytes(b"")
    assert "0003.png" in refused(run, folder, reference)
    PIL.Image.new("L", (9, 8)).save(folder / str(LABELS[75]) / "0003.png")
    said = refused(run, folder, reference)
    assert "has images of 2 sizes: 19 of 8x8, but not " in said and "0003.png" in said
    shutil.rmtree(folder)
    folder.mkdir()
    assert "contains no images" in refused(run, folder, reference)
    PIL.Image.new("L", (9, 8)).save(folder / "a.png")
    assert "are 9x8, which is not square" in refused(run, folder, reference)


def test_a_folder_of_classes_makes_a_reference(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ditx.commands.evaluate.train_classifier", lambda *args: train_classifier(*args, steps=2))
    folder = write_folder(tmp_path / "folder", IMAGES[::16], LABELS[::16])
    PIL.Image.new("RGB", (20, 30)).save(folder / "0" / "other.png")
    flags = ["--features", "classifier", "--make-stats", tmp_path / "reference.npz", "--size", 8]
    code, said = run.ditx("evaluate", folder, *flags)
    assert code == 0 and "33 of 8x8x3" in said and "on a held-out tenth" in said, said
    read = read_reference(tmp_path / "reference.npz")
    assert (read.count, read.image_shape, len(read.rows)) == (33, (8, 8, 3), 33)
    flat = write_folder(tmp_path / "flat", IMAGES[:30])
    said = refused(run, flat, "--features", "classifier", "--make-stats", tmp_path / "flat.npz")
    assert "30 images of 0 classes cannot train a classifier" in said
