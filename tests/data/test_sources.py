import io
import os
import pickle
import tracemalloc
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest
from batches import save

from ditx.data import image_files, loader, sources


def test_digits():
    source = sources.digits()
    assert len(source) == 5000 and source.image_shape == (28, 28, 1) and source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(np.bincount(source.labels), [500] * 10)
    assert source.images.min() == 0 and source.images.max() == 255
    assert len(np.unique(source.images.reshape(5000, -1), axis=0)) == 5000
    # MNIST's ink covers about 13 % of a digit's mean grey, and a "1" has the least of it.
    ink = [source.images[source.labels == label].mean() / 255 for label in range(10)]
    assert 0.12 < np.mean(ink) < 0.14 and np.argmin(ink) == 1
    example = source[4999]
    assert example["image"].shape == (28, 28, 1) and example["image"].dtype == np.uint8 and example["label"] == 9


def official_batch(path, pixels, labels):
    """Writes a batch as Python 2 did: protocol 2, byte strings as str opcodes, NumPy's old module name."""

    class Python2Pickler(pickle._Pickler):
        dispatch: ClassVar = dict(pickle._Pickler.dispatch)

        def save_bytes(self, value):
            self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
            self.memoize(value)

        dispatch[bytes] = save_bytes

    file = io.BytesIO()
    contents = {b"batch_label": b"training batch", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"]}
    Python2Pickler(file, protocol=2).dump(contents)
    stored = file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")
    assert b"cnumpy.core.multiarray\n_reconstruct" in stored and b"_codecs" not in stored
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stored)


@pytest.fixture
def official(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 32, 32), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(0, 10, (5, 4))
    for number in range(5):
        official_batch(
            tmp_path / "cifar-10-batches-py" / f"data_batch_{number + 1}",
            pixels[number].reshape(4, 3072),
            labels[number].tolist(),
        )
    return tmp_path, pixels.reshape(20, 3, 32, 32), labels.ravel()


def test_cifar10_official_batches(official):
    path, pixels, labels = official
    for folder in (path, str(path / "cifar-10-batches-py")):
        source = sources.cifar10(folder)
        assert source.image_shape == (32, 32, 3) and source.class_names[3] == "cat" and len(source.class_names) == 10
        np.testing.assert_array_equal(source.images, np.moveaxis(pixels, 1, -1))
        np.testing.assert_array_equal(source.labels, labels)


class Hostile:
    ran = False

    def __reduce__(self):
        return os.mkdir, ("ran-hostile-code",)


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_runs_no_code_of_a_hostile_pickle(official, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = official[0] / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps({b"data": Hostile(), b"labels": [0]}, protocol))
    with pytest.raises(ValueError, match=r"data_batch_3.*nothing that a pickle names is run"):
        sources.cifar10(official[0])
    assert not (tmp_path / "ran-hostile-code").exists()
    pickle.loads(path.read_bytes())  # The pickle is live: an ordinary reader runs it.
    assert (tmp_path / "ran-hostile-code").exists()


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "data_batch_2"),
        (b"not a pickle", "data_batch_2"),
        (pickle.dumps([1, 2], 2), "no dictionary"),
        (pickle.dumps({"data": 1}, 2), "no dictionary"),
        (None, "data_batch_2"),
    ],
)
def test_cifar10_names_a_damaged_batch(official, contents, says):
    path = official[0] / "cifar-10-batches-py" / "data_batch_2"
    path.unlink() if contents is None else path.write_bytes(contents)
    with pytest.raises(ValueError, match=says):
        sources.cifar10(official[0])


def test_cifar10_refuses_a_label_out_of_range(official):
    official_batch(official[0] / "cifar-10-batches-py" / "data_batch_5", np.zeros((1, 3072), np.uint8), [10])
    with pytest.raises(ValueError, match=r"data_batch_5.*labels span 10 to 10"):
        sources.cifar10(official[0])


def test_cifar10_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(6))
    source = sources.cifar10(tmp_path / "a.npz")
    np.testing.assert_array_equal(source.images, pixels)
    assert source.class_names[:2] == ("airplane", "automobile") and source[5]["label"] == 5
    np.savez(tmp_path / "b.npz", images=pixels, labels=np.arange(6) % 2, classes=np.array(["left", "right"]))
    assert sources.cifar10(tmp_path / "b.npz").class_names == ("left", "right")


def arrays(**changes):
    return {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)} | changes


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (arrays(images=np.zeros((3, 4, 4), np.uint8)), r"\(3, 4, 4\)"),
        (arrays(images=np.zeros((3, 4, 4, 3))), "float64"),
        (arrays(labels=np.zeros(2, int)), "each of 3 images"),
        (arrays(labels=np.zeros(3)), "one integer"),
        (arrays(labels=np.array([0, -1, 3])), "labels span -1 to 3; 10 classes"),
        (arrays(labels=np.array([0, 1, 2]), classes=np.array(["a", "b"])), "2 classes need 0 to 1"),
        (arrays(images=np.array([{}] * 3, object)), "bad.npz"),
        ({"pixels": np.zeros(3)}, "images"),
        (b"not a zip", "bad.npz"),
    ],
)
def test_cifar10_refuses_a_bad_npz(tmp_path, stored, says):
    path = tmp_path / "bad.npz"
    path.write_bytes(stored) if isinstance(stored, bytes) else np.savez(path, **stored)
    with pytest.raises(ValueError, match=says):
        sources.cifar10(path)


def test_cifar10_other_paths(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist"):
        sources.cifar10(tmp_path / "absent")
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(ValueError, match="extract"):
        sources.cifar10(tmp_path / "cifar-10-python.tar.gz")
    save(tmp_path / "folder" / "cat" / "a.png", np.zeros((40, 40, 3), np.uint8))
    source = sources.cifar10(tmp_path / "folder")
    assert source.image_shape == (32, 32, 3) and source.class_names == ("cat",)


def cropped(array, size=8):
    return np.asarray(image_files.centre_crop(PIL.Image.fromarray(array), size))


def test_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 11, 17, 3), dtype=np.uint8)
    save(tmp_path / "b" / "1.png", pixels[0])
    save(tmp_path / "b" / "deep" / "er" / "2.PNG", pixels[1])
    save(tmp_path / "a" / "x.bmp", pixels[2])
    save(tmp_path / "c" / "grey.png", pixels[3, :, :, 0])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._x.png").write_text("a file that macOS writes")
    (tmp_path / ".cache").mkdir()
    source = sources.images(tmp_path, 8)
    assert source.class_names == ("a", "b", "c") and source.image_shape == (8, 8, 3) and len(source) == 4
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 2])
    grey = np.repeat(pixels[3, :, :, :1], 3, axis=-1)
    read = source.take(np.array([3, 0, 1, 2]), np.array([False, True, False, True]))
    np.testing.assert_array_equal(read["y"], [2, 0, 1, 1])
    expected = [cropped(array) for array in (grey, pixels[2], pixels[0], pixels[1])]
    for array, got in zip(
        [expected[0], expected[1][:, ::-1], expected[2], expected[3][:, ::-1]], read["x"], strict=True
    ):
        np.testing.assert_array_equal(got, image_files.to_unit(array))
    example = source[2]
    assert example["label"] == 1
    np.testing.assert_array_equal(example["image"], cropped(pixels[1]))


def test_images_refuses_a_bad_folder(tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        sources.images(tmp_path / "absent", 8)
    with pytest.raises(ValueError, match="contains no images; add some"):
        sources.images(tmp_path, 8)
    save(tmp_path / "cat" / "a.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog contains no images"):
        sources.images(tmp_path, 8)
    with pytest.raises(ValueError, match="size is 0"):
        sources.images(tmp_path, 0)


def test_damaged_images_are_skipped_counted_and_listed_or_refused_if_strict(tmp_path, capsys):
    save(tmp_path / "cat" / "fine.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 nothing more")
    save(tmp_path / "dog" / "deep.png", np.full((9, 9), 40_000, np.uint16))
    save(tmp_path / "eel" / "last.png", np.zeros((9, 9, 3), np.uint8))
    source = sources.images(tmp_path, 8)
    assert [os.path.basename(file) for file in source.files] == ["fine.png", "last.png"]
    assert source.class_names == ("cat", "dog", "eel") and source.labels.tolist() == [0, 2]
    assert list(source.skipped) == ["cat/broken.jpg", "dog/deep.png"] and "not 8 bits" in source.skipped["dog/deep.png"]
    said = capsys.readouterr().err
    assert "skipped  cat/broken.jpg: " in said and "skipped  2 images in all" in said
    with pytest.raises(ValueError, match=r"cannot read image .*cat/broken\.jpg: .*; replace or remove it"):
        sources.images(tmp_path, 8, strict=True)
    for name in ("cat/fine.png", "eel/last.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read image .*broken\.jpg: .*; nor any other of the 4 images"):
        sources.images(tmp_path, 8)


def test_the_next_image_stands_in_for_one_that_is_damaged_later(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for number in range(3):
        save(tmp_path / str(number) / "a.png", pixels[number])
    source, strict = (sources.images(tmp_path, 8, strict=strict) for strict in (False, True))
    (tmp_path / "2" / "a.png").write_bytes(b"")
    for _ in range(2):
        batch = source.take(np.array([2, 1]), np.zeros(2, bool))
        np.testing.assert_array_equal(batch["x"], image_files.to_unit(pixels[:2]))
        assert batch["y"].tolist() == [0, 1]
    assert capsys.readouterr().err.count(f"skipped  {tmp_path}/2/a.png: cannot identify") == 1
    with pytest.raises(ValueError, match=r"cannot read image .*2/a\.png"):
        strict.take(np.array([2, 1]), np.zeros(2, bool))


def test_images_of_a_small_folder_are_decoded_once(tmp_path, monkeypatch):
    for name in ("a", "b"):
        save(tmp_path / "cat" / f"{name}.png", np.full((9, 9, 3), 7, np.uint8))
    for most, reads in ((2**28, 1), (8 * 8 * 3, 3)):
        monkeypatch.setattr(sources, "MAX_BYTES_KEPT", most)
        source, count = sources.images(tmp_path, 8), []
        monkeypatch.setattr(
            sources, "read", lambda *arguments, count=count: (count.append(1), image_files.read(*arguments))[1]
        )
        batches = [source.take(np.array([1]), np.zeros(1, bool))["x"] for _ in range(3)]
        assert len(count) == reads and all(np.array_equal(batch, batches[0]) for batch in batches)


def test_a_folder_without_subfolders_has_no_classes(tmp_path, capsys):
    for number in range(3):
        save(tmp_path / f"{number}.png", np.full((9, 9, 3), number, np.uint8))
    source = sources.images(tmp_path, 8)
    assert (len(source), source.class_names, source.labels.tolist()) == (3, (), [0, 0, 0])
    assert source.take(np.array([2]), np.zeros(1, bool))["y"].tolist() == [0]
    save(tmp_path / "cat" / "a.png", np.zeros((9, 9, 3), np.uint8))
    capsys.readouterr()
    assert (len(sources.images(tmp_path, 8)), sources.images(tmp_path, 8).class_names) == (1, ("cat",))
    assert f"passed over 3 images beside the class folders of {tmp_path}" in capsys.readouterr().err
    assert (len(sources.open_images(str(tmp_path))), sources.open_images(str(tmp_path)).class_names) == (4, ())


def test_images_of_a_file_are_held_once(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    assert sources.open_images(str(tmp_path / "a.npz")).checksum
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 1000 * 64 * 64 * 3


def test_files_of_images_to_evaluate(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "onehot.npz", arr_0=pixels, labels=np.eye(3))
    source = sources.open_images(str(tmp_path / "onehot.npz"))
    np.testing.assert_array_equal(source.images, pixels)
    assert source.class_names == ()
    np.savez(tmp_path / "bytes.npz", images=pixels, labels=np.arange(3), classes=np.array([b"cat", b"dog", b"ship"]))
    assert sources.open_images(str(tmp_path / "bytes.npz")).class_names == ("cat", "dog", "ship")
    np.savez(tmp_path / "none.npz", arr_0=pixels[:0])
    np.save(tmp_path / "one.npy", pixels)
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "data_batch_1.bin").write_bytes(b"")
    (tmp_path / "hundred").mkdir()
    (tmp_path / "hundred" / "train").write_bytes(b"")
    for name, sentence in {
        "none.npz": "has 0 images; give at least 2",
        "one.npy": "save arrays by numpy.savez",
        "a.tar.gz": "extract other archives",
        "binary": "is CIFAR-10 in binary; give the folder of its Python version",
        "hundred": "is CIFAR-100, which is not read; save its images, labels and classes by numpy.savez",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            sources.open_images(str(tmp_path / name))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_names_a_truncated_file_when_read(tmp_path, workers):
    save(tmp_path / "cat" / "cut.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = (tmp_path / "cat" / "cut.png").read_bytes()
    source = sources.images(tmp_path, 8)
    (tmp_path / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.png"):
        sources.images(tmp_path, 8)
    iterator = loader.batches(source, batch_size=2, seed=0, flip=False, workers=workers)
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.png"):
        next(iterator)
    iterator.close()


# open_dataset


def test_a_data_set_is_opened_by_name(tmp_path):
    save(tmp_path / "photos" / "a" / "0.png", np.zeros((9, 9, 3), np.uint8))
    np.savez(tmp_path / "few.npz", images=np.zeros((4, 8, 6, 1), np.uint8), labels=np.zeros(4, int))
    for name, path, shape, count in (
        ("digits", "", (28, 28, 1), 5000),
        ("images", "photos", (8, 8, 3), 1),
        ("cifar10", "photos", (32, 32, 3), 1),
        ("cifar10", "few.npz", (8, 6, 1), 4),
    ):
        source = sources.open_dataset(name, path and str(tmp_path / path), 8)
        assert (source.image_shape, len(source), source.latents) == (shape, count, None)
    with pytest.raises(ValueError, match="dataset images needs --data-path"):
        sources.open_dataset("images", "", 8)
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 8, 8, 3), np.uint8), labels=np.zeros(0, int))
    with pytest.raises(ValueError, match=r"none.npz has 0 images; give at least 1"):
        sources.open_dataset("cifar10", str(tmp_path / "none.npz"), 8)
