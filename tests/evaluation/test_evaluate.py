"""The library behind `ditx evaluate`: classifier, features on devices, stores of features, references, samples."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from ditx.data.sources import digits
from ditx.evaluation import metrics
from ditx.evaluation.classifier import Classifier, train_classifier
from ditx.evaluation.evaluate import compute_metrics, draw_labels
from ditx.evaluation.features import FeatureNetwork, Features, FeatureStore, make_feature_extractor
from ditx.evaluation.metrics import FeatureStats
from ditx.evaluation.reference import Reference, read_reference
from ditx.nn.inception import Inception
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import checkpoint
from ditx.training import run as runs

MESH = make_mesh(MeshConfig(data=1), jax.devices()[:1])
IMAGES = digits().images[::10, ::4, ::4]  # 500, of 7 x 7
LABELS = digits().labels[::10].astype(int)


@pytest.fixture(scope="module")
def features():
    return FeatureNetwork(Classifier(1, 10, key=jax.random.key(0)))


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return Features(*(rng.standard_normal((count, size)).astype(np.float32) for size in (4, 3)))


def test_labels_are_uniform_or_balanced_and_the_first_are_the_same_for_any_number():
    many = draw_labels(10, 20_000, 1)
    np.testing.assert_array_equal(draw_labels(10, 77, 1), many[:77])
    counts = np.bincount(many, minlength=10)
    assert 2 < counts.std() < 90 and counts.sum() == 20_000 and (draw_labels(10, 77, 2) != many[:77]).any()
    np.testing.assert_array_equal(np.bincount(draw_labels(10, 30, 1, balanced=True)), np.full(10, 3))
    np.testing.assert_array_equal(draw_labels(0, 5, 1), np.zeros(5))


@pytest.mark.slow
def test_the_classifier_learns_and_depends_on_the_seed_only(optimized):
    model, accuracy = train_classifier(IMAGES, LABELS, 10)
    assert accuracy > 0.6 and model.logits.shape == (128, 10)  # 0.1 by chance
    one, two, other = (train_classifier(IMAGES, LABELS, 10, seed, steps=3)[0].logits for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    for images, labels, classes, sentence in [
        (IMAGES, LABELS, 1, "500 images of 1 classes cannot train a classifier; give at least 20, with a"),
        (IMAGES[:19], LABELS[:19], 10, "19 images"),
        (np.zeros((20, 65, 65, 3), np.uint8), LABELS[:20], 10, "65x65 are too large .* use --features inception"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            train_classifier(images, labels, classes)


def test_features_are_the_network_s_on_one_device_and_on_eight(features):
    expected = np.asarray(jax.vmap(features.network)(IMAGES[:21]).pool)
    for mesh in (MESH, make_mesh(MeshConfig(data=4, fsdp=2))):
        found = make_feature_extractor(features, mesh, batch_size=2)(IMAGES[:21])
        assert found.spatial is None
        np.testing.assert_allclose(found.pool, expected, atol=1e-6)
    logits = features.logits(expected)
    np.testing.assert_allclose(logits, jax.vmap(features.network)(IMAGES[:21]).logits, atol=1e-6)


def test_a_store_has_the_moments_of_all_features_and_resumes_from_its_files(tmp_path):
    parts, whole = [rows(n, n) for n in (5, 1, 3000, 2000)], FeatureStore()
    pool, spatial = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    for part in parts:
        whole.add(part)
    for moments, expected in zip(whole.moments(), (pool, spatial), strict=True):
        assert moments.count == 5006
        np.testing.assert_allclose(moments.covariance, np.cov(expected.T, dtype=np.float64), atol=1e-12)
    np.testing.assert_array_equal(whole.pool, pool)

    killed = FeatureStore(tmp_path, 5006)
    for part in parts[:3]:
        killed.add(part)
    resumed = FeatureStore(tmp_path, 5006)
    assert resumed.count == 3006
    resumed.add(parts[3])
    for a, b in zip(resumed.moments(), whole.moments(), strict=True):
        np.testing.assert_array_equal(a.scatter, b.scatter)
    np.testing.assert_array_equal(FeatureStore(tmp_path, 7).pool, pool[:7])  # of a smaller evaluation
    (tmp_path / "000000006.npz").write_bytes(b"cut off")
    assert FeatureStore(tmp_path, 5006).count == 6

    kept = np.arange(5006) % 3 == 0
    some = FeatureStore(kept=kept)
    for part in parts:
        some.add(part)
    np.testing.assert_array_equal(some.pool, pool[kept])
    with pytest.raises(ValueError, match="there are no images"):
        FeatureStore().moments()


@pytest.fixture
def reference(features):
    gathered = FeatureStore()
    gathered.add(make_feature_extractor(features, MESH)(IMAGES[:200]))
    return Reference.of(gathered, features, "some digits", (7, 7, 1))


def test_a_reference_is_read_as_it_was_written(reference, features, tmp_path):
    path = tmp_path / "new" / "reference.npz"
    reference.write(path)
    assert [file.name for file in path.parent.iterdir()] == ["reference.npz"]
    read = read_reference(path)
    np.testing.assert_array_equal(read.pool.covariance, reference.pool.covariance)
    np.testing.assert_array_equal(read.rows, reference.rows)
    assert FeatureNetwork(read.classifier).checksum == features.checksum == read.checksum
    fields = ("spatial", "name", "count", "image_shape", "features", "resize")
    assert [getattr(read, name) for name in fields] == [None, "some digits", 200, (7, 7, 1), "classifier", "adm"]


def test_other_weights_sizes_and_resizes_are_refused(reference, features):
    reference.check(features, (7, 7, 3))
    for shape, changes, sentence in [
        ((8, 8, 1), {}, "the images are 8x8, but those of the reference 7x7; make one of the same size"),
        ((7, 7, 1), {"checksum": "00000000"}, r"with other weights of classifier \(CRC-32 00000000\) than these"),
        ((7, 7, 1), {"resize": "pytorch-fid"}, "with --resize pytorch-fid, not adm"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            dataclasses.replace(reference, **changes).check(features, shape)


def test_files_that_are_no_reference_are_refused(reference, tmp_path):
    reference.write(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        good = dict(file)
    mean, covariance = np.zeros(2048), np.eye(2048)
    for name, arrays, sentence in [
        ("a", good | {"mu": good["mu"] * np.nan}, "has values in mu that are not finite; make or fetch it again"),
        (
            "g",
            good | {"sigma": good["sigma"][:5]},
            r"a mean of shape \(128,\) but a covariance of shape \(5, 128\); make",
        ),
        (
            "b",
            good | {"classifier_0": good["classifier_0"] + 1},
            "damaged .*its classifier was altered.*; make it again",
        ),
        ("c", good | {"about": np.array("{")}, "another version of ditx, or is damaged"),
        ("d", {"images": np.zeros(3)}, r"neither images \(arr_0\) nor statistics \(mu, sigma\)"),
        (
            "e",
            {"mu": mean[:64], "sigma": covariance[:64, :64]},
            r"a mu of shape \(64,\); Inception's .* have shape \(2048,\)",
        ),
        ("f", {"arr_0": np.zeros((4, 8, 8, 3))}, r"an arr_0 of float64 and shape \(4, 8, 8, 3\); images are uint8"),
    ]:
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=f"{path} .*{sentence}"):
            read_reference(path)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.npz as an \.npz of plain arrays"):
        read_reference(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match="there is no such file; make it with: ditx evaluate --make-stats"):
        read_reference(tmp_path / "nowhere.npz")


def test_metrics_are_those_of_the_features_and_missing_ones_have_reasons(reference, features):
    gathered, part = FeatureStore(), make_feature_extractor(features, MESH)(IMAGES[200:])
    gathered.add(part)
    found, absent = compute_metrics(gathered, features, reference)
    pool, near = part.pool, metrics.precision_recall(reference.rows, part.pool)
    fid = metrics.frechet_distance(pool.mean(0), np.cov(pool.T), *reference.pool)
    expected = {"fid": fid, "inception_score": metrics.inception_score(features.logits(pool)), **near._asdict()}
    assert found == pytest.approx(expected, rel=1e-5) and absent == {"sfid": "the network has no spatial features"}

    # With spatial features, and an ADM reference of statistics alone.
    both, identity = FeatureStore(), (np.zeros(3), np.eye(3))
    both.add(Features(pool, part.pool[:, :3]))
    adm = dataclasses.replace(reference, rows=None, spatial=FeatureStats(*identity))
    found, absent = compute_metrics(both, features, adm, ("sfid", "precision-recall"))
    expected = metrics.frechet_distance(pool[:, :3].mean(0), np.cov(pool[:, :3].T), *identity)
    assert found == {"sfid": pytest.approx(expected, rel=1e-5)}
    assert absent == dict.fromkeys(("precision", "recall"), "the reference has no images (arr_0)")
    few = FeatureStore()
    few.add(Features(pool[:3], None))
    assert compute_metrics(few, features, reference)[1]["recall"] == "3 images have no 3 neighbours each"
    one = FeatureStore()
    one.add(Features(pool[:1], None))
    with pytest.raises(ValueError, match="at least 2 samples, and there are 1"):
        compute_metrics(one, features, reference)


def test_the_inception_score_of_samples_sorted_by_class_is_that_of_shuffled_samples(reference, features):
    sure = eqx.tree_at(lambda network: network.logits, features.network, 50 * jnp.eye(128, 10))
    store = FeatureStore()
    store.add(Features(np.repeat(np.eye(10, 128, dtype=np.float32), 1000, axis=0), None))
    values, _ = compute_metrics(store, FeatureNetwork(sure), reference, ("inception-score",))
    assert values["inception_score"] == pytest.approx(10, rel=0.01)  # in order, each split of 5,000 has 5 classes


def test_the_resize_of_statistics_is_that_on_record_or_has_to_be_given(tmp_path, monkeypatch):
    network = jax.eval_shape(lambda key: Inception(key=key), jax.random.key(0))
    monkeypatch.setattr("ditx.evaluation.reference.load_inception", lambda path: (network, path))
    pool = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "pytorch-fid.npz", **pool)
    np.savez(tmp_path / "adm.npz", **pool, **spatial)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    by_pytorch, by_adm, images = (read_reference(tmp_path / f"{name}.npz") for name in ("pytorch-fid", "adm", "images"))
    with pytest.raises(ValueError, match="does not record how images were resized; give --resize pytorch-fid"):
        by_pytorch.load_features()
    for reference, given, expected in [
        (by_pytorch, "pytorch-fid", "pytorch-fid"),
        (by_pytorch, "adm", "adm"),
        (by_adm, None, "adm"),
        (images, None, "adm"),
        (images, "pytorch-fid", "pytorch-fid"),
    ]:
        features, _ = reference.load_features("", given)
        assert features.resize == expected
    with pytest.raises(ValueError, match="the reference was made with --resize adm, not pytorch-fid"):
        by_adm.check(FeatureNetwork(Classifier(1, 2, key=jax.random.key(0)), "pytorch-fid"), (8, 8, 3))


@pytest.mark.slow
def test_training_logs_the_fid_that_evaluate_finds_and_keeps_the_best(run, tmp_path, monkeypatch):
    path, folder = scripts.write_reference(tmp_path / "reference.npz", digits().images[::125]), tmp_path / "run"
    flags = (
        "digits --model.hidden-size 16 --model.depth 1 --model.num-heads 2 --model.patch-size 14 --batch-size 8"
        " --sampling.steps 2 --log-every 2 --sample-every 0 --keep 1 --steps 5 --eval-every 2 --eval-samples 10"
    ).split()
    # The FIDs are made to rise, so that the first is the best.
    found = iter([1.0, 2.0])

    def fid(*args):
        return {"fid": next(found, None) or compute_metrics(*args)[0]["fid"]}, {}

    with monkeypatch.context() as patch:
        patch.setattr("ditx.evaluation.hooks.compute_metrics", fid)
        code, said = run.train(*flags, "--eval-stats", path, "--run", folder)
    assert code == 0 and "step 5 FID" in said, said
    assert checkpoint.steps(folder / "checkpoints") == [2, 5] and (folder / "loss.png").exists()
    fids = {line["step"]: line["fid"] for line in runs.read_metrics(folder) if "fid" in line}
    assert fids.pop(2) == 1 and fids.pop(4) == 2 and list(fids) == [5]
    code, said = run.ditx("evaluate", folder, path, "--num-samples", 10, "--metrics", "fid")
    assert code == 0 and f"FID {fids[5]:.4f}" in said, (said, fids)

    for wrong, sentence in [
        ([], "eval_every needs --eval-stats; make them with: ditx evaluate --make-stats OUT DATA"),
        (["--eval-stats", path, "--eval-samples", 1], "eval_samples is 1; it must be at least 2"),
        (["--eval-stats", tmp_path / "nowhere.npz"], "there is no such file; make it with"),
    ]:
        code, said = run.train(*flags, "--run", tmp_path / "other", *wrong)
        assert code == 2 and sentence in said and not (tmp_path / "other").exists(), said
