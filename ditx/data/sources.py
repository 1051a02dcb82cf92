"""Image sources and the grain pipeline that turns one into training batches."""

import multiprocessing
import os
import pickle
import signal
import threading
import zlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Float32, Int, Int32, Integer, UInt8

from ditx.data import image_files
from ditx.data.latents import LatentBatch, LatentSource

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Decoding takes about 10 s for so many bytes on one core, and reading a header about 0.2 ms: up to here, a damaged
# image is found within seconds of opening the folder, whole or by its header.
MAX_BYTES_DECODED, MAX_HEADERS_READ = 100_000_000, 20_000


class ImageBatch(TypedDict):
    """Images in [-1, 1] and their class indices."""

    x: Float32[np.ndarray, "b h w c"]
    y: Int32[np.ndarray, "b"]


Batch: TypeAlias = ImageBatch | LatentBatch


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Labelled images held in memory, in [0, 255]."""

    # Plain arrays: their shapes and types come from a user's file, and are answered for below.
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: tuple[str, ...]

    def __post_init__(self):
        images, labels, num_classes = self.images, self.labels, len(self.class_names)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} of shape {images.shape}; give uint8 of shape (n, h, w, c)")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels are {labels.dtype} of shape {labels.shape}; give one integer for each of {len(images)} images"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"labels span {labels.min()} to {labels.max()}; {num_classes} classes need 0 to {num_classes - 1}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        _, h, w, c = self.images.shape
        return h, w, c

    @property
    def checksum(self) -> int:
        """What tells this data from other data: CRC-32 of images and labels."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(self.images.tobytes()))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "h w c"] | int]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> ImageBatch:
        """The images at `indices`, by one indexing of the arrays, mirrored left to right where so said."""
        return _batch(self.images[indices], self.labels[indices], mirrored)


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Labelled image files, decoded to RGB and centre-cropped to `size` when read.

    An image that cannot be decoded raises a `ValueError` that names its file.
    """

    files: list[str] = field(repr=False)
    labels: Integer[np.ndarray, "n"] = field(repr=False)
    class_names: tuple[str, ...]
    size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.size, self.size, 3

    @property
    def checksum(self) -> int:
        """What tells this data from other data: CRC-32 of the files' names, sizes and labels."""
        files = [(Path(file).name, os.path.getsize(file)) for file in self.files]
        return zlib.crc32(repr((files, self.labels.tolist())).encode())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "h w c"] | int]:
        return {"image": image_files.read(self.files[index], self.size), "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> ImageBatch:
        """The images at `indices`, decoded in parallel threads, mirrored left to right where so said."""
        # Threads inside a batch rather than across batches: only the batches in the prefetch buffer are ever in memory.
        with ThreadPoolExecutor(min(len(indices), os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda index: image_files.read(self.files[index], self.size), indices))
        return _batch(np.stack(images), self.labels[indices], mirrored)


Source = ArraySource | FolderSource | LatentSource


def digits() -> ArraySource:
    """The 5,000 embedded digits, 500 of each class, 28 x 28 x 1 (MNIST; see assets/LICENSE-digits.txt)."""
    with np.load(Path(__file__).parents[1] / "assets" / "digits.npz") as arrays:
        return ArraySource(arrays["images"][..., None], arrays["labels"], tuple("0123456789"))


def cifar10(path: str | os.PathLike) -> ArraySource | FolderSource:
    """The CIFAR-10 training images (Krizhevsky 2009) in any of the forms in which people keep them.

    `path` is the folder of the official Python batches or the one above it; or an `.npz` of `images` (uint8, n h w c),
    `labels` (n) and, optionally, `classes` (names); or a folder with one subfolder of images a class. The official
    batches are pickles: they are read without running anything that they name.
    """
    form, path = image_files.cifar10_form(Path(path))
    if form == "batches":
        parts = [_read_cifar_batch(path / f"data_batch_{number}") for number in range(1, 6)]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ArraySource(pixels, labels, CIFAR10_CLASSES)
    if form == "images":
        return images(path, 32)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else CIFAR10_CLASSES
            return ArraySource(arrays["images"], arrays["labels"], names)
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged archive.
        raise ValueError(f"cannot read {path} as arrays `images` and `labels`: {error}") from error


def images(path: str | os.PathLike, size: int) -> FolderSource:
    """The images that `imagefiles.listing` finds, of which damaged ones are not passed over.

    They are found here in up to 100 MB of files, and by their headers in up to 20,000; others when read.
    """
    if size < 1:
        raise ValueError(f"image size is {size}; give a side of at least 1 pixel")
    files, labels, class_names = image_files.listing(path)
    small = sum(map(os.path.getsize, files)) <= MAX_BYTES_DECODED
    if small or len(files) <= MAX_HEADERS_READ:
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(image_files.check, whole=small), files))
    return FolderSource(files, labels, class_names, size)


def to_unit(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels 0..255 of values in [-1, 1] by truncation, as the ADM evaluation has it; undoes `to_unit` exactly."""
    return np.clip(127.5 * x.astype(np.float32) + 128, 0, 255).astype(np.uint8)


def _follow(worker: int, count: int) -> None:
    """End with the process that reads, however it ends; and leave Ctrl-C, which reaches every process, to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _batch(
    images: UInt8[np.ndarray, "b h w c"], labels: Integer[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]
) -> ImageBatch:
    if mirrored.any():
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return {"x": to_unit(images), "y": labels.astype(np.int32)}


@lru_cache(maxsize=2)  # A batch may lie across two epochs.
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, "count"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _read(step: int, *, source: Source, batch_size: int, seed: int, flip: bool, rows: Int[np.ndarray, "rows"]) -> Batch:
    epochs, places = np.divmod(step * batch_size + rows, len(source))
    indices = np.empty_like(rows)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _order(len(source), seed, int(epoch))[places[here]]
    # Flips are drawn for the global batch, so that they do not depend on how many processes share it.
    mirrored = np.random.default_rng((seed, step, 1)).random(batch_size) < 0.5
    return source.take(indices, mirrored[rows] & flip)


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    start: int = 0,
    rows: Int[np.ndarray, "rows"] | None = None,
    workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, shuffled anew each epoch, batch number s depending on the arguments and s alone.

    So `start=s` goes on as an uninterrupted run would, and the data position is the training step. `batch_size` is that
    of all processes together, and may exceed the data set; a process is given `rows` of each batch, or all. `flip`
    mirrors images left to right with probability one half. One thread reads ahead; `workers` > 0 reads in that many
    processes instead, for which a script needs the usual `if __name__ == "__main__"`. Close the iterator to end them.
    """
    if len(source) == 0:
        raise ValueError("the data set has 0 images; give one with at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rows = np.arange(batch_size) if rows is None else rows
    if len(rows) == 0 or not 0 <= rows.min() <= rows.max() < batch_size:
        raise ValueError(f"rows are {rows.tolist()}; give at least one, from 0 to {batch_size - 1}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; give 0 to {2**32 - 1}")
    if start < 0 or workers < 0:
        raise ValueError(f"start is {start} and workers {workers}; give neither below 0")
    # Not a function within this one: worker processes are sent it.
    read = partial(_read, source=source, batch_size=batch_size, seed=seed, flip=flip, rows=rows)
    # Grain is given the numbers of batches, not of images, which it would shuffle one by one.
    dataset = grain.MapDataset.range(start, 2**62).map(read)
    reading = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return iter(_in_processes(reading, workers))


def decoded(
    files: list[str], size: int, *, batch_size: int, workers: int = 0
) -> Generator[tuple[UInt8[np.ndarray, "b h w 3"], list[str]], None, None]:
    """All images of `files` in their order, batch by batch, each with what is wrong with it, or nothing.

    Those with which something is wrong are black. Raises OSError where not the image is at fault, but the disk or the
    machine. Threads decode or, if there are any, `workers` processes; close the generator to end them.
    """
    # Two batches at a time, so that no core waits for the last image of one.
    threads = 1 if workers else os.cpu_count() or 1
    read = partial(_decode, files=files, size=size, threads=threads)
    dataset = grain.MapDataset.range(len(files)).batch(batch_size, batch_fn=np.asarray).map(read)
    # Endless, and left at its end: when grain's processes come to one, they leave shared memory behind.
    reading = dataset.repeat().to_iter_dataset(
        grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=4)
    )
    with closing(iter(_in_processes(reading, workers))) as batches:
        yield from islice(batches, len(dataset))


def _in_processes(reading: grain.IterDataset, workers: int) -> grain.IterDataset:
    if not workers:
        return reading
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read a flag of absl, which nobody parses here.
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return reading.mp_prefetch(options, worker_init_fn=_follow)


def _decode(
    indices: Int[np.ndarray, "b"], *, files: list[str], size: int, threads: int
) -> tuple[UInt8[np.ndarray, "b h w 3"], list[str]]:
    images, wrong = np.zeros((len(indices), size, size, 3), np.uint8), [""] * len(indices)

    def decode(row):
        file = files[indices[row]]
        try:
            images[row] = image_files.read(file, size)
        except ValueError as error:
            reason = error.__cause__
            absent = isinstance(reason, PermissionError) or os.path.islink(file)
            if isinstance(reason, MemoryError) or (getattr(reason, "errno", None) and not absent):
                raise OSError(f"{error}") from error
            wrong[row] = " ".join(str(reason or error).split()) or repr(reason)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, range(len(indices))))
    return images, wrong


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds containers, numbers and NumPy arrays, and refuses every other name that a pickle may call."""

    allowed = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise ValueError(f"it names {module}.{name}, and nothing that a pickle names is run")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_cifar_batch(path: Path) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, "n"]]:
    try:
        with path.open("rb") as file:
            contents = _ArrayUnpickler(file, encoding="bytes").load()
        if not isinstance(contents, dict) or not contents.keys() >= {b"data", b"labels"}:
            raise ValueError("it is no dictionary of `data` and `labels`")
        images = contents[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.asarray(contents[b"labels"])
        ArraySource(images, labels, CIFAR10_CLASSES)  # Checks them, so that the file at fault is named.
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise ValueError(f"cannot read CIFAR-10 batch {path}: {error}") from error
    return images, labels
