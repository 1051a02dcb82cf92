"""Latents on disk: records, shards of records in ArrayRecord files, and the data set that reads them."""

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Float16, Int, Int32

from ditx.files import lock, write_atomically

FORMAT, METADATA, PLAN = 1, "metadata.json", "plan.json"
# One record a chunk, so that a read fetches no other record; half precision hardly compresses.
WRITER_OPTIONS = "group_size:1,uncompressed"
# No reading ahead, since records are read in random order.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def pack(latent: Float16[np.ndarray, "2 h w c"], label: int, name: str) -> bytes:
    """One record: [mean | standard deviation] in float16, the label in 4 bytes, the name of the image's file.

    Numbers are little-endian; the name, up to the end of the record, is UTF-8. The record of an image is followed by
    the record of its mirror image. They are two because a batch needs only one of them.
    """
    return latent.astype("<f2").tobytes() + label.to_bytes(4, "little") + os.fsencode(name)


def unpack(record: bytes, shape: tuple[int, int, int]) -> tuple[Float16[np.ndarray, "2 h w c"], int, str]:
    """The arguments of `pack`, for latents of `shape`. Raises ValueError for a record that is too short."""
    count = 2 * int(np.prod(shape))
    latent = np.frombuffer(record, "<f2", count).reshape(2, *shape).astype(np.float16)
    label = int(np.frombuffer(record, "<i4", 1, 2 * count)[0])
    return latent, label, os.fsdecode(record[2 * count + 4 :])


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the JSON file beside it describes it."""

    count: int
    """images, each with two records"""
    size: int
    """bytes of the file"""
    checksum: int
    """CRC-32 of the records"""
    files_checksum: int
    """CRC-32 of the names and sizes of the image files"""
    skipped: dict[str, str]
    """image files left out, with the reason"""


def shard_path(folder: Path, index: int, total: int) -> Path:
    """Path of shard number `index` of `total`."""
    return folder / "shards" / f"{index:05d}-of-{total:05d}.array_record"


def read_shard(path: Path) -> Shard | None:
    """The description of a shard, or None if the shard is unfinished or its size has changed since."""
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text()))
        return shard if path.stat().st_size == shard.size else None
    except (OSError, ValueError, TypeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or, if killed, not at all. The caller holds a lock."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):  # left by a process that was killed
        partial.unlink()
    with write_atomically(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


class ShardWriter:
    """Writes a shard: locked, and under a temporary name until `finish`, whose description makes the shard count.

    A kill therefore leaves nothing that could be taken for a shard. Raises ValueError if another process is writing
    the shard, and OSError if it cannot be written. Close the writer in any case.
    """

    def __init__(self, path: Path):
        self.path, self._partial = path, path.with_suffix(".partial")
        self._lock = lock(self._partial, f"another process is writing {path}; give each its --process-index")
        self._count, self._checksum = 0, 0
        self._skipped: dict[str, str] = {}
        self._writer = ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)

    def write(self, latents: Float16[np.ndarray, "2 2 h w c"], label: int, name: str) -> None:
        """Append the records of [image | mirror image]."""
        self._count += 1
        for latent in latents:
            record = pack(latent, label, name)
            self._checksum = zlib.crc32(record, self._checksum)
            try:
                self._writer.write(record)
            except RuntimeError as error:
                raise OSError(f"cannot write {self._partial}: {error}") from error

    def skip(self, name: str, reason: str) -> None:
        """Note an image file that is left out."""
        self._skipped[name] = reason

    def finish(self, files_checksum: int) -> Shard:
        """Rename the shard to its final name, then write its description."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {self._partial}: {error}") from error
        os.fsync(self._lock.fileno())  # The records must reach the disk before their description.
        size = self._partial.stat().st_size
        shard = Shard(self._count, size, self._checksum, files_checksum, self._skipped)
        self._partial.replace(self.path)
        write_json(self.path.with_suffix(".json"), asdict(shard))
        return shard

    def close(self) -> None:
        """Release the lock; delete the shard if it is unfinished."""
        if self._writer.is_open():
            with suppress(RuntimeError):
                self._writer.close()
            self._partial.unlink(missing_ok=True)
        self._lock.close()


class LatentBatch(TypedDict):
    """Latents, each a normal distribution of mean `x` and standard deviation `std`, and their class indices."""

    x: Float16[np.ndarray, "b h w c"]
    std: Float16[np.ndarray, "b h w c"]
    y: Int32[np.ndarray, "b"]


@dataclass(frozen=True, eq=False)
class LatentSource:
    """Latents of labelled images and of their mirror images, from a folder that `ditx extract` wrote.

    Missing, truncated and miscounted shards raise a `ValueError` here, other damage when a record is read.
    """

    path: str | os.PathLike
    image_shape: tuple[int, int, int] = field(init=False)
    """height, width and channels of every latent"""
    class_names: tuple[str, ...] = field(init=False, repr=False)
    checksum: int = field(init=False)
    """CRC-32 of the class names and the shards' checksums"""
    metadata: dict[str, Any] = field(init=False, repr=False)
    """contents of metadata.json: `vae`, `scale`, `image_size`, `skipped`, ..."""
    _starts: list[int] = field(init=False, repr=False)
    """number of the first image of each shard, and the number of all images"""

    def __post_init__(self):
        metadata = read_metadata(Path(self.path))
        shards = metadata["shards"]
        identity = (metadata["class_names"], [shard["checksum"] for shard in shards])
        values = {
            "metadata": metadata,
            "image_shape": tuple(metadata["shape"]),
            "class_names": tuple(metadata["class_names"]),
            "checksum": zlib.crc32(json.dumps(identity).encode()),
            "_starts": list(accumulate((shard["count"] for shard in shards), initial=0)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for index, shard in enumerate(shards):
            try:
                with self._file(index).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
            except FileNotFoundError as error:
                raise self._damaged(index, "it is missing") from error
            if size != shard["size"]:
                raise self._damaged(index, f"it has {size:,} bytes, not {shard['size']:,}")
        for index, (shard, reader) in enumerate(zip(shards, self._readers, strict=True)):
            if reader.num_records() != 2 * shard["count"]:
                raise self._damaged(index, f"it has {reader.num_records():,} records, not {2 * shard['count']:,}")

    @cached_property
    def _readers(self) -> list[Any]:
        # A reader holds the index of its shard, and every process opens its own readers.
        return [ArrayRecordReader(str(self._file(k)), READER_OPTIONS) for k in range(len(self.metadata["shards"]))]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    @property
    def latents(self) -> dict[str, Any]:
        """The autoencoder `vae`, its `scale`, and the side `image_size` of the images, in pixels."""
        return {name: self.metadata[name] for name in ("vae", "scale", "image_size")}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The `latents` [image | mirror image][mean | standard deviation] of one image, its `label` and `name`."""
        image = range(len(self))[index]
        pair = [unpack(record, self.image_shape) for record in self._records([(image, False), (image, True)])]
        return {"latents": np.stack([latent for latent, _, _ in pair]), "label": pair[0][1], "name": pair[0][2]}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> LatentBatch:
        """The latents at `indices`, of the mirror image where `mirrored`."""
        x, y = np.empty((2, len(indices), *self.image_shape), np.float16), np.empty(len(indices), np.int32)
        size = x[:, 0].nbytes

        def fill(rows):
            keys = zip(indices[rows].tolist(), mirrored[rows].tolist(), strict=True)
            for row, record in zip(rows.tolist(), self._records(keys), strict=True):
                x[:, row] = np.ndarray((2, *self.image_shape), "<f2", record)
                y[row] = int.from_bytes(record[size : size + 4], "little")

        # More threads are slower from memory and hardly faster from a disk.
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, np.array_split(np.arange(len(indices)), threads)))
        return {"x": x[0], "std": x[1], "y": y}

    def _records(self, keys: Iterable[tuple[int, bool]]) -> Iterator[bytes]:
        for index, mirrored in keys:
            shard = bisect_right(self._starts, index) - 1
            try:
                # One a call: for several, ArrayRecord wakes threads of its own, at twice the cost of reading.
                yield self._readers[shard].read([2 * (index - self._starts[shard]) + mirrored])[0]
            except RuntimeError as error:
                raise self._damaged(shard, str(error)) from error

    def _file(self, shard: int) -> Path:
        return shard_path(Path(self.path), shard, len(self.metadata["shards"]))

    def _damaged(self, shard: int, reason: str) -> ValueError:
        remedy = "delete it and run the same `ditx extract` again, which replaces it"
        return ValueError(f"shard {self._file(shard)} cannot be used ({reason}); {remedy}")


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata.json of a finished extraction. Raises ValueError if it is absent or damaged."""
    try:
        metadata = json.loads((folder / METADATA).read_text())
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']}, and this ditx reads {FORMAT}")
        kinds = {"shape": list, "class_names": list, "shards": list, "vae": str, "scale": float, "image_size": int}
        for name, kind in kinds.items():
            if not isinstance(metadata[name], kind):
                raise ValueError(f"its {name} is {metadata[name]!r}")
        for shard in metadata["shards"]:
            if not all(isinstance(shard[name], int) for name in ("count", "size", "checksum")):
                raise ValueError(f"it describes a shard as {shard}")
    except FileNotFoundError as error:
        if (folder / PLAN).exists():
            raise ValueError(f"{folder} is unfinished; run the same `ditx extract` again to complete it") from error
        raise ValueError(f"{folder} contains no latents; give a folder that `ditx extract` wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {folder / METADATA}: {error!r}; run `ditx extract` again") from error
    return metadata
