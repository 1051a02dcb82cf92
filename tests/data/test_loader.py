import errno
import itertools
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from batches import assert_same, save, take

from ditx.data import folders, image_files, loader, sources
from ditx.sampling import to_uint8
from tests import reading_rates


def numbered(count, side=2):
    """Images of their index in every pixel; the last column is brighter, which shows a flip."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, side, side, 1), np.uint8)
    pixels[:, :, -1] += 100
    return sources.ArraySource(pixels, np.arange(count) % 10, tuple("0123456789"))


def indices(batch):
    """Indices of the images in a batch of `numbered`, mirrored or not."""
    return to_uint8(batch["x"])[:, 0, :, 0].min(axis=1)


# batches


def test_a_batch_has_images_in_unit_range_and_labels():
    source = sources.digits()
    (batch,) = take(loader.batches(source, batch_size=7, seed=0, flip=True), 1)
    assert batch["x"].shape == (7, 28, 28, 1) and batch["x"].dtype == np.float32
    assert batch["y"].shape == (7,) and batch["y"].dtype == np.int32
    assert batch["x"].min() == -1 and batch["x"].max() <= 1


def test_images_keep_their_labels():
    for batch in take(loader.batches(numbered(30), batch_size=8, seed=0, flip=True), 8):
        np.testing.assert_array_equal(batch["y"], indices(batch) % 10)


@pytest.mark.parametrize("batch_size", [1, 5, 10, 23, 60])
def test_each_epoch_sees_each_image_once_in_a_new_order(batch_size):
    batches = take(loader.batches(numbered(30), batch_size=batch_size, seed=3, flip=False), -(-120 // batch_size))
    epochs = np.concatenate([indices(batch) for batch in batches])[:120].reshape(4, 30)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
    for a, b in itertools.combinations([*epochs, np.arange(30)], 2):
        assert np.mean(a == b) < 0.3  # Two random orders of 30 agree in 1 place on average.


def test_a_data_set_of_one_image():
    (batch,) = take(loader.batches(numbered(1), batch_size=3, seed=0, flip=False), 1)
    np.testing.assert_array_equal(indices(batch), [0, 0, 0])


def test_seeds_differ_and_one_seed_repeats():
    first, again, other = (take(loader.batches(numbered(30), batch_size=30, seed=s, flip=True), 2) for s in (0, 0, 1))
    assert_same(first, again)
    assert np.mean(indices(first[0]) == indices(other[0])) < 0.3
    # Grain's epoch e + 1 of a seed must not be epoch e of the next seed.
    assert np.mean(indices(first[1]) == indices(other[0])) < 0.3


def test_half_of_the_images_are_mirrored():
    source = numbered(100)
    batches = take(loader.batches(source, batch_size=50, seed=0, flip=True), 40)
    plain = take(loader.batches(source, batch_size=50, seed=0, flip=False), 40)
    flips = []
    for a, b in zip(batches, plain, strict=True):
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
        take(loader.batches(numbered(50), start=start, **options), 6),
        take(loader.batches(numbered(50), **options), start + 6)[start:],
    )


def test_a_far_start_costs_nothing():
    far = 10**12
    first, second = take(loader.batches(numbered(50), batch_size=12, seed=5, flip=True, start=far), 2)
    assert_same([second], take(loader.batches(numbered(50), batch_size=12, seed=5, flip=True, start=far + 1), 1))
    assert not np.array_equal(first["x"], second["x"])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_together_see_the_batch_of_one(count):
    options = {"batch_size": 12, "seed": 5, "flip": True, "start": 3}
    rows = np.split(np.arange(12), count)
    parts = [take(loader.batches(numbered(50), rows=part, **options), 6) for part in rows]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in "xy"} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(loader.batches(numbered(50), **options), 6))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    options = {"batch_size": 12, "seed": 5, "flip": True, "start": 3}
    assert_same(
        take(loader.batches(numbered(50), workers=2, **options), 7), take(loader.batches(numbered(50), **options), 7)
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
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_batches_refuses_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        loader.batches(numbered(10), **({"batch_size": 4, "seed": 0, "flip": False} | options))


def test_batches_refuses_an_empty_source():
    with pytest.raises(ValueError, match="0 images"):
        loader.batches(numbered(0), batch_size=4, seed=0, flip=False)


@pytest.mark.slow
def test_worker_processes_end_with_their_parent():
    code = (
        "import os, signal\n"
        "from ditx.data import loader, sources\n"
        "if __name__ == '__main__':\n"
        "    iterator = loader.batches(sources.digits(), batch_size=4, seed=0, flip=False, workers=1)\n"
        "    next(iterator)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    # `run` waits until all processes have closed the pipes, workers too.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


# decoded


@pytest.fixture
def folder(tmp_path):
    """Nine images; number 4 is damaged, and number 7 is a broken link."""
    rng = np.random.default_rng(0)
    for number in range(9):
        save(tmp_path / "cat" / f"{number}.png", rng.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8))
    (tmp_path / "cat" / "4.png").write_bytes(b"no image")
    (tmp_path / "cat" / "7.png").rename(tmp_path / ".elsewhere")
    (tmp_path / "cat" / "7.png").symlink_to(tmp_path / ".elsewhere")
    files = folders.find_images(tmp_path).files
    (tmp_path / ".elsewhere").unlink()
    return files


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (20, 0), (4, 2)])
def test_images_are_decoded_in_order_with_an_error_for_damaged_ones(folder, batch_size, workers):
    batches = list(loader.decode(folder, 8, batch_size=batch_size, workers=workers))
    assert all(len(pixels) == len(errors) == batch_size for pixels, errors in batches[:-1])
    pixels, errors = np.concatenate([p for p, _ in batches]), [error for _, e in batches for error in e]
    assert [bool(error) for error in errors] == [number in (4, 7) for number in range(9)]
    assert "cannot identify image file" in errors[4] and "No such file" in errors[7]
    for number, file in enumerate(folder):
        expected = np.zeros((8, 8, 3)) if errors[number] else image_files.read(file, 8)
        np.testing.assert_array_equal(pixels[number], expected)


@pytest.mark.parametrize(
    "cause", [OSError(errno.EIO, "Input/output error"), MemoryError(), FileNotFoundError(2, "gone")]
)
def test_a_failing_disk_does_not_count_as_a_damaged_image(folder, cause, monkeypatch):
    def fail(path, formats):
        raise cause

    monkeypatch.setattr(PIL.Image, "open", fail)
    with pytest.raises(OSError, match=r"cannot read image .*0\.png"):
        list(loader.decode(folder[:1], 8, batch_size=4))


# Reading rates


def test_reading_rates_are_of_batches_that_were_not_read_ahead(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(reading_rates.time, "perf_counter", lambda: clock[0])

    def batches(burst=1):
        for number in range(10**6):
            # Batches that were read ahead take no time; processes deliver several together.
            clock[0] += 0 if number < 8 or number % burst else 0.25 * burst
            yield number

    assert reading_rates.batch_seconds(batches(), 3, workers=0) == pytest.approx([0.25] * 3)
    assert reading_rates.batch_seconds(batches(burst=4), 3, workers=4) == pytest.approx([0.25] * 3)


def test_reading_rates_of_each_kind_of_data(capsys):
    reading_rates.main("--count 20 --size 8 --batch-size 4 --repeats 3".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["latents", "png", "jpeg"] and all(line[2] == "images/s" for line in lines)
