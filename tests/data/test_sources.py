import errno
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest

from ditx.data import image_files, sources


def numbered(count, side=2):
    """Images whose every pixel tells their index, apart from a column gradient that shows a flip."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, side, side, 1), np.uint8)
    pixels[:, :, -1] += 100
    return sources.ArraySource(pixels, np.arange(count) % 10, tuple("0123456789"))


def take(iterator, count):
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


def indices(found):
    """Which images of `numbered` a batch holds, mirrored or not."""
    return sources.to_uint8(found["x"])[:, 0, :, 0].min(axis=1)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)


# Pixels


def test_every_pixel_value_survives_the_round_trip():
    u = np.arange(256, dtype=np.uint8)
    x = sources.to_unit(u)
    assert x.dtype == np.float32 and x[0] == -1 and x[-1] == 1
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(sources.to_uint8(x), u)


def test_to_uint8_truncates_and_clamps():
    x = np.array([-5, -1, 0, 0.0039, 0.0079, 1, 5], np.float32)
    np.testing.assert_array_equal(sources.to_uint8(x), [0, 0, 128, 128, 129, 255, 255])


# Sources


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
    with pytest.raises(ValueError, match=r"data_batch_3.*it names .* nothing that a pickle names is run"):
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
    (tmp_path / "a" / "._x.png").write_text("what macOS leaves behind")
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
        np.testing.assert_array_equal(got, sources.to_unit(array))
    example = source[2]
    assert example["label"] == 1
    np.testing.assert_array_equal(example["image"], cropped(pixels[1]))


def test_images_refuses_a_bad_folder(tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        sources.images(tmp_path / "absent", 8)
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="no class folders"):
        sources.images(tmp_path, 8)
    save(tmp_path / "cat" / "a.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog holds no images"):
        sources.images(tmp_path, 8)
    with pytest.raises(ValueError, match="size is 0"):
        sources.images(tmp_path, 0)


def test_images_names_an_unreadable_file_when_opened(tmp_path):
    save(tmp_path / "cat" / "fine.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 nothing more")
    with pytest.raises(ValueError, match=r"cannot read image .*broken\.jpg"):
        sources.images(tmp_path, 8)
    (tmp_path / "cat" / "broken.jpg").unlink()
    save(tmp_path / "cat" / "deep.png", np.full((9, 9), 40_000, np.uint16))
    with pytest.raises(ValueError, match=r"deep\.png.*not 8 bits"):
        sources.images(tmp_path, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_names_a_truncated_file_when_read(tmp_path, workers):
    save(tmp_path / "cat" / "cut.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = (tmp_path / "cat" / "cut.png").read_bytes()
    source = sources.images(tmp_path, 8)
    (tmp_path / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.png"):
        sources.images(tmp_path, 8)
    iterator = sources.batches(source, batch_size=2, seed=0, flip=False, workers=workers)
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.png"):
        next(iterator)
    iterator.close()


# batches


def test_a_batch_is_what_the_network_takes():
    source = sources.digits()
    (batch,) = take(sources.batches(source, batch_size=7, seed=0, flip=True), 1)
    assert batch["x"].shape == (7, 28, 28, 1) and batch["x"].dtype == np.float32
    assert batch["y"].shape == (7,) and batch["y"].dtype == np.int32
    assert batch["x"].min() == -1 and batch["x"].max() <= 1


def test_images_keep_their_labels():
    for batch in take(sources.batches(numbered(30), batch_size=8, seed=0, flip=True), 8):
        np.testing.assert_array_equal(batch["y"], indices(batch) % 10)


@pytest.mark.parametrize("batch_size", [1, 5, 10, 23, 60])
def test_each_epoch_sees_each_image_once_in_a_new_order(batch_size):
    found = take(sources.batches(numbered(30), batch_size=batch_size, seed=3, flip=False), -(-120 // batch_size))
    epochs = np.concatenate([indices(batch) for batch in found])[:120].reshape(4, 30)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
    for a, b in itertools.combinations([*epochs, np.arange(30)], 2):
        assert np.mean(a == b) < 0.3  # Two random orders of 30 agree in 1 place on average.


def test_a_data_set_of_one_image():
    (batch,) = take(sources.batches(numbered(1), batch_size=3, seed=0, flip=False), 1)
    np.testing.assert_array_equal(indices(batch), [0, 0, 0])


def test_seeds_differ_and_one_seed_repeats():
    first, again, other = (take(sources.batches(numbered(30), batch_size=30, seed=s, flip=True), 2) for s in (0, 0, 1))
    assert_same(first, again)
    assert np.mean(indices(first[0]) == indices(other[0])) < 0.3
    # Grain's epoch e + 1 of a seed must not be epoch e of the next seed.
    assert np.mean(indices(first[1]) == indices(other[0])) < 0.3


def test_half_of_the_images_are_mirrored():
    source = numbered(100)
    found = take(sources.batches(source, batch_size=50, seed=0, flip=True), 40)
    plain = take(sources.batches(source, batch_size=50, seed=0, flip=False), 40)
    flips = []
    for a, b in zip(found, plain, strict=True):
        flipped = np.all(a["x"] == b["x"][:, :, ::-1], axis=(1, 2, 3))
        kept = np.all(a["x"] == b["x"], axis=(1, 2, 3))
        assert np.all(flipped ^ kept)
        flips.append(flipped)
    # 2,000 fair coins: standard deviation 0.011. Neither a place in the batch nor an image may always flip.
    assert abs(np.mean(flips) - 0.5) < 0.05
    assert np.all(np.abs(np.mean(flips, axis=0) - 0.5) < 0.4)
    assert len(np.unique(flips, axis=0)) == 40


@pytest.mark.parametrize("start", [0, 1, 7, 50])
def test_resuming_equals_skipping(start):
    options = {"batch_size": 12, "seed": 5, "flip": True}
    assert_same(
        take(sources.batches(numbered(50), start=start, **options), 6),
        take(sources.batches(numbered(50), **options), start + 6)[start:],
    )


def test_a_far_start_costs_nothing():
    far = 10**12
    first, second = take(sources.batches(numbered(50), batch_size=12, seed=5, flip=True, start=far), 2)
    assert_same([second], take(sources.batches(numbered(50), batch_size=12, seed=5, flip=True, start=far + 1), 1))
    assert not np.array_equal(first["x"], second["x"])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_together_see_the_batch_of_one(count):
    options = {"batch_size": 12, "seed": 5, "flip": True, "start": 3}
    rows = np.split(np.arange(12), count)
    parts = [take(sources.batches(numbered(50), rows=part, **options), 6) for part in rows]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in "xy"} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(sources.batches(numbered(50), **options), 6))


def test_worker_processes_give_the_same_batches():
    options = {"batch_size": 12, "seed": 5, "flip": True, "start": 3}
    assert_same(
        take(sources.batches(numbered(50), workers=2, **options), 7), take(sources.batches(numbered(50), **options), 7)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rows": np.array([3, 8])}, r"rows are \[3, 8\]; give at least one, from 0 to 3"),
        ({"rows": np.array([], int)}, r"rows are \[\]; give at least one"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"start": -1}, "start is -1"),
        ({"workers": -1}, "workers -1"),
    ],
)
def test_batches_refuses_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        sources.batches(numbered(10), **({"batch_size": 4, "seed": 0, "flip": False} | options))


def test_batches_refuses_an_empty_source():
    with pytest.raises(ValueError, match="0 images"):
        sources.batches(numbered(0), batch_size=4, seed=0, flip=False)


def test_worker_processes_end_with_the_one_that_reads():
    code = (
        "import os, signal\n"
        "from ditx import data\n"
        "if __name__ == '__main__':\n"
        "    iterator = data.batches(data.digits(), batch_size=4, seed=0, flip=False, workers=1)\n"
        "    next(iterator)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    # It waits for all who hold the pipes, and so for the workers.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


# decoded


@pytest.fixture
def folder(tmp_path):
    """Nine images, of which number 4 is damaged and number 7 a link to nowhere."""
    rng = np.random.default_rng(0)
    for number in range(9):
        save(tmp_path / "cat" / f"{number}.png", rng.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8))
    (tmp_path / "cat" / "4.png").write_bytes(b"no image")
    (tmp_path / "cat" / "7.png").unlink()
    (tmp_path / "cat" / "7.png").symlink_to(tmp_path / "nowhere")
    return image_files.listing(tmp_path)[0]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (20, 0), (4, 2)])
def test_images_are_decoded_in_order_and_damaged_ones_told(folder, batch_size, workers):
    found = list(sources.decoded(folder, 8, batch_size=batch_size, workers=workers))
    assert all(len(pixels) == len(wrong) == batch_size for pixels, wrong in found[:-1])
    pixels, wrong = np.concatenate([p for p, _ in found]), [reason for _, w in found for reason in w]
    assert [bool(reason) for reason in wrong] == [number in (4, 7) for number in range(9)]
    assert "cannot identify image file" in wrong[4] and "No such file" in wrong[7]
    for number, file in enumerate(folder):
        expected = np.zeros((8, 8, 3)) if wrong[number] else image_files.read(file, 8)
        np.testing.assert_array_equal(pixels[number], expected)


@pytest.mark.parametrize(
    "cause", [OSError(errno.EIO, "Input/output error"), MemoryError(), FileNotFoundError(2, "gone")]
)
def test_a_failing_disk_does_not_count_as_a_damaged_image(folder, cause, monkeypatch):
    def fail(path, mode="rb"):
        raise cause

    monkeypatch.setattr(PIL.Image, "open", fail)
    with pytest.raises(OSError, match=r"cannot read image .*0\.png"):
        list(sources.decoded(folder[:1], 8, batch_size=4))
