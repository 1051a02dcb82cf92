"""Image sources and the grain pipeline that turns one into training batches."""

import os
import pickle
import signal
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import grain
import numpy as np
import PIL.Image
from absl import flags
from jaxtyping import Float, Float32, Int, Int32, Integer, UInt8

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Decoding takes about 10 s for so many bytes on one core, and reading a header about 0.2 ms: up to here, a damaged
# image is found within seconds of opening the folder, whole or by its header.
MAX_BYTES_DECODED, MAX_HEADERS_READ = 100_000_000, 20_000


class Batch(TypedDict):
    """Images in [-1, 1] and their class indices."""

    x: Float32[np.ndarray, "b h w c"]
    y: Int32[np.ndarray, "b"]


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

    def take(self, indices: Int[np.ndarray, "b"]) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, "b"]]:
        """The images and labels at `indices`, by one indexing of the arrays."""
        return self.images[indices], self.labels[indices].astype(np.int32)


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
        return {"image": _read_image(self.files[index], self.size), "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"]) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, "b"]]:
        """The images and labels at `indices`, decoded in parallel threads."""
        # Threads inside a batch rather than across batches: only the batches in the prefetch buffer are ever in memory.
        with ThreadPoolExecutor(min(len(indices), os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda index: _read_image(self.files[index], self.size), indices))
        return np.stack(images), self.labels[indices].astype(np.int32)


Source = ArraySource | FolderSource


def digits() -> ArraySource:
    """The 5,000 embedded digits, 500 of each class, 28 x 28 x 1 (MNIST; see assets/LICENSE-digits.txt)."""
    with np.load(Path(__file__).parent / "assets" / "digits.npz") as arrays:
        return ArraySource(arrays["images"][..., None], arrays["labels"], tuple("0123456789"))


def cifar10(path: str | os.PathLike) -> Source:
    """The CIFAR-10 training images (Krizhevsky 2009) in any of the forms in which people keep them.

    `path` is the folder of the official Python batches or the one above it; or an `.npz` of `images` (uint8, n h w c),
    `labels` (n) and, optionally, `classes` (names); or a folder with one subfolder of images a class. The official
    batches are pickles: they are read without running anything that they name.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the CIFAR-10 folder or an .npz of images and labels")
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").exists():
            parts = [_read_cifar_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
            pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            return ArraySource(pixels, labels, CIFAR10_CLASSES)
    if path.is_dir():
        return images(path, 32)
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz; extract an archive first and give its folder")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else CIFAR10_CLASSES
            return ArraySource(arrays["images"], arrays["labels"], names)
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged archive.
        raise ValueError(f"cannot read {path} as arrays `images` and `labels`: {error}") from error


def images(path: str | os.PathLike, size: int) -> FolderSource:
    """One class a subfolder, in sorted order, its images sought at any depth.

    Damaged images are found here in up to 100 MB of files, and by their headers in up to 20,000; others when read.
    """
    if size < 1:
        raise ValueError(f"image size is {size}; give a side of at least 1 pixel")
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give one that holds a subfolder of images for each class")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{path} has no class folders; put the images of each class into a subfolder of their own")
    files: list[str] = []
    counts = []
    for folder in folders:
        found = sorted(
            os.path.join(parent, name)
            for parent, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )
        if not found:
            raise ValueError(f"class folder {folder} holds no images ({' '.join(IMAGE_SUFFIXES)}); fill or remove it")
        files += found
        counts.append(len(found))
    small = sum(map(os.path.getsize, files)) <= MAX_BYTES_DECODED
    if small or len(files) <= MAX_HEADERS_READ:
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(_check, whole=small), files))
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return FolderSource(files, labels, tuple(folder.name for folder in folders), size)


def centre_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The central square at `size` x `size` (Dhariwal and Nichol 2021): box halvings, one bicubic resize, a crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_unit(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels 0..255 of values in [-1, 1] by truncation, as the ADM evaluation has it; undoes `to_unit` exactly."""
    return np.clip(127.5 * x.astype(np.float32) + 128, 0, 255).astype(np.uint8)


def _leave_interrupts(worker: int, count: int) -> None:
    """Ctrl-C reaches a terminal's every process; ending is for the first of them to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read(
    indices: Int[np.ndarray, "global_batch"], rng: np.random.Generator, *, source: Source, flip: bool, rows: slice
) -> Batch:
    # Flips are drawn for the global batch, so that they do not depend on how many processes share it.
    flipped = (rng.random(len(indices)) < 0.5)[rows, None, None, None]
    images, labels = source.take(indices[rows])
    return {"x": to_unit(np.where(flipped, images[:, :, ::-1], images) if flip else images), "y": labels}


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, shuffled anew each epoch, batch number s depending on the arguments and s alone.

    So `start=s` goes on as an uninterrupted run would, and the data position is the training step. `batch_size` is that
    of all processes together, and may exceed the data set; each process is given its own rows, in process order. `flip`
    mirrors images left to right with probability one half. One thread reads ahead; `workers` > 0 reads in that many
    processes instead, for which a script needs the usual `if __name__ == "__main__"`. Close the iterator to end them.
    """
    if len(source) == 0:
        raise ValueError("the data set has 0 images; give one with at least 1")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index} of {process_count} processes; give 0 to process_count - 1")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size is {batch_size}; give a positive multiple of the {process_count} processes")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; give 0 to {2**32 - 1}")
    if start < 0 or workers < 0:
        raise ValueError(f"start is {start} and workers {workers}; give neither below 0")
    share = batch_size // process_count
    # Not a function within this one: worker processes are sent it.
    read = partial(_read, source=source, flip=flip, rows=slice(process_index * share, (process_index + 1) * share))

    # Grain shuffles and batches bare indices; images are read a batch at a time, at 40 % of the cost of one at a time.
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=np.asarray).random_map(read)[start:]
    reading = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read a flag of absl, which nobody parses here.
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        reading = reading.mp_prefetch(options, worker_init_fn=_leave_interrupts)
    return iter(reading)


@contextmanager
def _opened(path: str) -> Iterator[PIL.Image.Image]:
    try:
        with PIL.Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow's conversion to RGB would clip these to white.
                raise ValueError(f"its pixels are of mode {image.mode}, not 8 bits")
            yield image
    except Exception as error:  # Pillow's readers raise many kinds for damaged files.
        raise ValueError(f"cannot read image {path}: {error}; replace or remove it") from error


def _check(path: str, whole: bool) -> None:
    with _opened(path) as image:
        if whole:
            image.load()


def _read_image(path: str, size: int) -> UInt8[np.ndarray, "h w c"]:
    with _opened(path) as image:
        if "transparency" in image.info:  # which Pillow drops with a warning otherwise
            image = image.convert("RGBA")
        return np.asarray(centre_crop(image.convert("RGB"), size))


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
