import dataclasses
import json
import pickle
from contextlib import closing

import numpy as np
import pytest
from batches import assert_same, take
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditx.data import loader
from ditx.data.latents import LatentSource, ShardWriter, pack, read_shard, shard_path, unpack

SHAPE = (2, 3, 4)
OPTIONS = {"batch_size": 12, "seed": 5, "flip": True}


def halves(number):
    """Latents of the image's number, in four arrays that differ by a fraction."""
    return (number + np.arange(4).reshape(2, 2, 1, 1, 1) / 4 + np.zeros(SHAPE)).astype(np.float16)


def write(folder, counts, **changes):
    """A folder as `ditx extract` writes it, with `counts` images in its shards."""
    (folder / "shards").mkdir(parents=True)
    shards, number = [], 0
    for index, count in enumerate(counts):
        with closing(ShardWriter(shard_path(folder, index, len(counts)))) as writer:
            for _ in range(count):
                writer.write(halves(number), number % 10, f"{number % 10}/{number}.png")
                number += 1
            shard = writer.finish(0)
        shards.append({name: getattr(shard, name) for name in ("count", "size", "checksum")})
    metadata = {"format": 1, "shape": SHAPE, "class_names": list("0123456789"), "shards": shards}
    (folder / "metadata.json").write_text(json.dumps(metadata | {"vae": "a", "scale": 0.5, "image_size": 16} | changes))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return LatentSource(write(tmp_path_factory.mktemp("latents") / "fifty", (20, 0, 17, 13)))


# The record


def shapes():
    return st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))


@given(shapes().flatmap(lambda s: hnp.arrays(np.float16, (2, *s))), st.integers(0, 2**31 - 1), st.text())
def test_unpack_inverts_pack(latent, label, name):
    name = name.encode("utf-8", "replace").decode()
    record = pack(latent, label, name)
    assert len(record) == 2 * latent.size + 4 + len(name.encode())
    unpacked, *rest = unpack(record, latent.shape[1:])
    np.testing.assert_array_equal(unpacked, latent)
    assert rest == [label, name]


def test_names_that_are_not_unicode_survive():
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert unpack(pack(halves(0)[0], 0, name), SHAPE)[2] == name


def test_a_short_record_is_refused():
    with pytest.raises(ValueError, match="buffer is smaller"):
        unpack(pack(halves(0)[0], 0, "")[:-5], SHAPE)


def test_imagenet_fits(tmp_path):
    latents = np.random.default_rng(0).standard_normal((2, 2, 32, 32, 4)).astype(np.float16)
    with closing(ShardWriter(tmp_path / "a.array_record")) as writer:
        for _ in range(200):
            writer.write(latents, 999, "n01440764/n01440764_10026.JPEG")
        size = writer.finish(0).size
    assert 1_281_167 / 200 * size < 45e9


# Shards


def test_a_shard_counts_when_it_is_finished(tmp_path):
    path = shard_path(tmp_path, 3, 8)
    path.parent.mkdir()
    with closing(ShardWriter(path)) as writer:
        writer.write(halves(1), 1, "a")
        assert read_shard(path) is None and not path.exists()
        with pytest.raises(ValueError, match=r"another process is writing .*00003-of-00008"):
            ShardWriter(path)
    assert not list(path.parent.iterdir())
    with closing(ShardWriter(path)) as writer:
        writer.write(halves(1), 1, "a")
        writer.skip("b", "no image")
        shard = writer.finish(7)
    assert read_shard(path) == shard and (shard.count, shard.files_checksum, shard.skipped) == (1, 7, {"b": "no image"})
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.stem}.json"]
    path.write_bytes(path.read_bytes()[:-1])
    assert read_shard(path) is None


def test_shards_are_reproducible_to_the_byte(tmp_path):
    a, b = (shard_path(write(tmp_path / name, (9,)), 0, 1).read_bytes() for name in "ab")
    assert a == b


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="shards"):
        ShardWriter(shard_path(tmp_path, 0, 1))


# The source


def test_every_image_has_its_label_and_name(source):
    assert (len(source), source.image_shape, source.class_names) == (50, SHAPE, tuple("0123456789"))
    assert source.latents == {"vae": "a", "scale": 0.5, "image_size": 16}
    for number in (0, 19, 20, 36, 37, 49, -1):
        example = source[number]
        np.testing.assert_array_equal(example["latents"], halves(number % 50))
        assert (example["label"], example["name"]) == (number % 10, f"{number % 10}/{number % 50}.png")
    with pytest.raises(IndexError):
        source[50]


def test_take_gives_means_and_deviations_of_image_or_mirror_image(source):
    indices, mirrored = np.array([49, 0, 20, 20, 36]), np.array([True, False, True, False, True])
    batch = source.take(indices, mirrored)
    assert batch["x"].dtype == batch["std"].dtype == np.float16 and batch["y"].dtype == np.int32
    expected = np.stack([halves(index)[int(mirror)] for index, mirror in zip(indices, mirrored, strict=True)])
    np.testing.assert_array_equal(batch["x"], expected[:, 0])
    np.testing.assert_array_equal(batch["std"], expected[:, 1])
    np.testing.assert_array_equal(batch["y"], indices % 10)


def test_a_pickled_source_reads_the_same(source):
    source[3]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[49]["latents"], source[49]["latents"])
    assert copy.checksum == source.checksum


def test_checksum_depends_on_latents_and_classes(source, tmp_path):
    assert LatentSource(write(tmp_path / "same", (20, 0, 17, 13))).checksum == source.checksum
    others = write(tmp_path / "fewer", (20, 17, 12)), write(tmp_path / "named", (20, 0, 17, 13), class_names=["a"] * 10)
    assert len({source.checksum, *(LatentSource(other).checksum for other in others)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_resume_exactly(source, workers):
    batches = take(loader.batches(source, **OPTIONS), 9)
    assert_same(take(loader.batches(source, start=4, workers=workers, **OPTIONS), 5), batches[4:])
    for batch in batches:
        number = np.floor(batch["x"][:, 0, 0, 0]).astype(int)
        np.testing.assert_array_equal(batch["y"], number % 10)
        np.testing.assert_array_equal(batch["std"] - batch["x"], np.full_like(batch["x"], 0.25))


def test_batches_see_every_latent_once_an_epoch_and_half_of_them_mirrored(source):
    batches = take(loader.batches(source, batch_size=50, seed=0, flip=True), 40)
    values = np.stack([batch["x"][:, 0, 0, 0] for batch in batches])
    for epoch in np.floor(values):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    # 2,000 fair coins: standard deviation 0.011.
    assert abs(np.mean(values % 1 == 0.5) - 0.5) < 0.05
    plain = take(loader.batches(source, batch_size=50, seed=0, flip=False), 3)
    assert all(not (batch["x"] % 1).any() for batch in plain)


def test_processes_together_see_the_batch_of_one(source):
    rows = np.split(np.arange(OPTIONS["batch_size"]), 2)
    parts = [take(loader.batches(source, rows=part, **OPTIONS), 4) for part in rows]
    joined = [{n: np.concatenate([part[n] for part in step]) for n in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, take(loader.batches(source, **OPTIONS), 4))


# Damage


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents", (20, 20))


def test_a_missing_shard_is_named(folder):
    shard_path(folder, 1, 2).unlink()
    with pytest.raises(
        ValueError, match=r"00001-of-00002.* is missing\); delete it and run the same `ditx extract` again"
    ):
        LatentSource(folder)


def test_a_truncated_shard_is_named(folder):
    path = shard_path(folder, 0, 2)
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(ValueError, match=r"00000-of-00002.*has 70,000 bytes, not 131,072"):
        LatentSource(folder)


def test_a_shard_with_other_records_is_named(folder):
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["shards"][1]["count"] = 21
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"00001-of-00002.*has 40 records, not 42"):
        LatentSource(folder)


def test_an_altered_shard_is_named_when_read(folder):
    path = shard_path(folder, 1, 2)
    contents = bytearray(path.read_bytes())
    place = contents.index(pack(halves(30)[0], 0, "0/30.png"))
    contents[place + 5] ^= 1
    path.write_bytes(contents)
    source = LatentSource(folder)
    np.testing.assert_array_equal(source[29]["latents"], halves(29))
    with pytest.raises(ValueError, match=r"00001-of-00002.*Corrupted"):
        source[30]
    with (
        closing(loader.batches(source, batch_size=40, seed=0, flip=False)) as iterator,
        pytest.raises(ValueError, match="00001-of-00002"),
    ):
        next(iterator)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (None, "contains no latents; give a folder that `ditx extract` wrote"),
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ('{"format": 2}', "its format is 2, and this ditx reads 1"),
    ],
)
def test_a_folder_without_sound_metadata_is_refused(folder, contents, says):
    file = folder / "metadata.json"
    file.unlink() if contents is None else file.write_text(contents)
    with pytest.raises(ValueError, match=says):
        LatentSource(folder)


def test_an_unfinished_extraction_is_refused(folder):
    (folder / "metadata.json").unlink()
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished; run the same `ditx extract` again to complete it"):
        LatentSource(folder)


def test_a_source_is_immutable(source):
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.path = "elsewhere"
