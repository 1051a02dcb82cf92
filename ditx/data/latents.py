"""Latents on disk: the record of one image, shards of records in ArrayRecord files, and the source that reads them."""

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

from ditx.training import run as runs

FORMAT, METADATA, PLAN = 1, "metadata.json", "plan.json"
# A record is a chunk, so that it is read alone; the digits of half precision hardly compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
# Nothing is read that was not asked for: records are wanted in random order.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def pack(latent: Float16[np.ndarray, "2 h w c"], label: int, name: str) -> bytes:
    """One record: [mean | standard deviation] in float16, the label in 4 bytes, the name of the image's file.

    Numbers are little-endian; the name, behind them to the end, is UTF-8. An image's record is followed by that of its
    mirror image. They are two, since only one of them is wanted at a time.
    """
    return latent.astype("<f2").tobytes() + label.to_bytes(4, "little") + os.fsencode(name)


def unpack(record: bytes, shape: tuple[int, int, int]) -> tuple[Float16[np.ndarray, "2 h w c"], int, str]:
    """What `pack` was given, for latents of `shape`. Raises ValueError for a record that is too short."""
    count = 2 * int(np.prod(shape))
    latent = np.frombuffer(record, "<f2", count).reshape(2, *shape).astype(np.float16)
    label = int(np.frombuffer(record, "<i4", 1, 2 * count)[0])
    return latent, label, os.fsdecode(record[2 * count + 4 :])


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the JSON file beside it has it."""

    count: int
    """images in it, of which each has two records"""
    size: int
    """bytes of its file"""
    checksum: int
    """CRC-32 of its records"""
    files_checksum: int
    """CRC-32 of the names and sizes of the files it was made from"""
    skipped: dict[str, str]
    """files that it lacks, with the reason"""


def shard_path(folder: Path, index: int, total: int) -> Path:
    """Where shard number `index` of `total` lies."""
    return folder / "shards" / f"{index:05d}-of-{total:05d}.array_record"


def read_shard(path: Path) -> Shard | None:
    """The description of a shard, or None where it has not been finished, or is not as it was finished."""
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text()))
        return shard if path.stat().st_size == shard.size else None
    except (OSError, ValueError, TypeError):
        return None


class ShardWriter:
    """A shard in the making: locked, and under another name until `finish`, whose description makes it count.

    So a kill leaves nothing that could be taken for a shard. Raises ValueError if another process is writing it, and
    OSError if it cannot be written. Close it in any case.
    """

    def __init__(self, path: Path):
        self.path, self._partial = path, path.with_suffix(".partial")
        self._lock = runs.lock(self._partial, f"another process is writing {path}; give each its --process-index")
        self._count, self._checksum = 0, 0
        self._skipped: dict[str, str] = {}
        self._writer = ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)

    def write(self, latents: Float16[np.ndarray, "2 2 h w c"], label: int, name: str) -> None:
        """Append [image | mirror image] as `pack` takes each."""
        self._count += 1
        for latent in latents:
            record = pack(latent, label, name)
            self._checksum = zlib.crc32(record, self._checksum)
            try:
                self._writer.write(record)
            except RuntimeError as error:
                raise OSError(f"cannot write {self._partial}: {error}") from error

    def skip(self, name: str, reason: str) -> None:
        """Leave out a file."""
        self._skipped[name] = reason

    def finish(self, files_checksum: int) -> Shard:
        """Give the shard its name, and then its description."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {self._partial}: {error}") from error
        os.fsync(self._lock.fileno())  # not only in memory, where it counts as made
        size = self._partial.stat().st_size
        shard = Shard(self._count, size, self._checksum, files_checksum, self._skipped)
        self._partial.replace(self.path)
        runs.write(self.path.with_suffix(".json"), json.dumps(asdict(shard)) + "\n")
        return shard

    def close(self) -> None:
        """End the lock, and the shard unless it is finished."""
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
    """The latents of labelled images, and of their mirror images, that `ditx extract` wrote to a folder.

    Missing, truncated and miscounted shards raise a `ValueError` here, other damage when it is read.
    """

    path: str | os.PathLike
    image_shape: tuple[int, int, int] = field(init=False)
    """height, width and channels of every latent"""
    class_names: tuple[str, ...] = field(init=False, repr=False)
    checksum: int = field(init=False)
    """what tells this data from other data: CRC-32 of the checksums of the shards and the class names"""
    metadata: dict[str, Any] = field(init=False, repr=False)
    """all that is known of them: `vae`, `scale`, `image_size`, `skipped`, ..."""
    _starts: list[int] = field(init=False, repr=False)
    """number of the first record of each shard, and of all records"""

    def __post_init__(self):
        metadata = read_metadata(Path(self.path))
        shards = metadata["shards"]
        told = (metadata["class_names"], [shard["checksum"] for shard in shards])
        found = {
            "metadata": metadata,
            "image_shape": tuple(metadata["shape"]),
            "class_names": tuple(metadata["class_names"]),
            "checksum": zlib.crc32(json.dumps(told).encode()),
            "_starts": list(accumulate((shard["count"] for shard in shards), initial=0)),
        }
        for name, value in found.items():
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
        # Each holds the index of its records; every process opens its own.
        return [ArrayRecordReader(str(self._file(k)), READER_OPTIONS) for k in range(len(self.metadata["shards"]))]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The `latents` [image | mirror image][mean | standard deviation] of one image, its `label` and `name`."""
        image = range(len(self))[index]
        pair = [unpack(record, self.image_shape) for record in self._records([(image, False), (image, True)])]
        return {"latents": np.stack([latent for latent, _, _ in pair]), "label": pair[0][1], "name": pair[0][2]}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> LatentBatch:
        """The latents at `indices`, those of the mirror images where so said."""
        x, y = np.empty((2, len(indices), *self.image_shape), np.float16), np.empty(len(indices), np.int32)
        size = x[:, 0].nbytes

        def fill(rows):
            wanted = zip(indices[rows].tolist(), mirrored[rows].tolist(), strict=True)
            for row, record in zip(rows.tolist(), self._records(wanted), strict=True):
                x[:, row] = np.ndarray((2, *self.image_shape), "<f2", record)
                y[row] = int.from_bytes(record[size : size + 4], "little")

        # More threads than these take longer over what lies in memory, and little less over a disk.
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, np.array_split(np.arange(len(indices)), threads)))
        return {"x": x[0], "std": x[1], "y": y}

    def _records(self, wanted: Iterable[tuple[int, bool]]) -> Iterator[bytes]:
        for index, mirrored in wanted:
            shard = bisect_right(self._starts, index) - 1
            try:
                # Not many at a time: for them, ArrayRecord wakes threads of its own, at twice the cost of reading.
                yield self._readers[shard].read([2 * (index - self._starts[shard]) + mirrored])[0]
            except RuntimeError as error:
                raise self._damaged(shard, str(error)) from error

    def _file(self, shard: int) -> Path:
        return shard_path(Path(self.path), shard, len(self.metadata["shards"]))

    def _damaged(self, shard: int, what: str) -> ValueError:
        remedy = "without it, the same `ditx extract` makes it again"
        return ValueError(f"shard {self._file(shard)} cannot be used ({what}); {remedy}")


def read_metadata(folder: Path) -> dict[str, Any]:
    """The description of a finished extraction. Raises ValueError if there is none."""
    try:
        metadata = json.loads((folder / METADATA).read_text())
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']}, and this ditx reads {FORMAT}")
        for name, kind in {"shape": list, "class_names": list, "shards": list, "vae": str, "scale": float}.items():
            if not isinstance(metadata[name], kind):
                raise ValueError(f"its {name} is {metadata[name]!r}")
        for shard in metadata["shards"]:
            if not all(isinstance(shard[name], int) for name in ("count", "size", "checksum")):
                raise ValueError(f"it describes a shard as {shard}")
    except FileNotFoundError as error:
        if (folder / PLAN).exists():
            raise ValueError(f"{folder} is unfinished; run the same `ditx extract` again, which goes on") from error
        raise ValueError(f"{folder} holds no latents; give the folder that `ditx extract` wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {folder / METADATA}: {error!r}; run `ditx extract` again") from error
    return metadata
