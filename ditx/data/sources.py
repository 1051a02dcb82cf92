"""Data sets: digits, CIFAR-10, folders of images, and latents, each a `Source` of labelled examples."""

import os
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Integer, UInt8

from ditx.data.image_files import find_classes, find_images, open_image, read, to_unit
from ditx.data.latents import LatentBatch, LatentSource
from ditx.files import read_npz
from ditx.pickles import read_pickle

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# One core decodes this many bytes in about 10 s and reads a header in about 0.2 ms. Up to these limits, a folder is
# checked within seconds when it is opened: every image whole, or every header.
MAX_BYTES_DECODED, MAX_HEADERS_READ = 100_000_000, 20_000


class ImageBatch(TypedDict):
    """Images in [-1, 1] and their class indices."""

    x: Float32[np.ndarray, "b h w c"]
    y: Int32[np.ndarray, "b"]


Batch: TypeAlias = ImageBatch | LatentBatch


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Labelled images in memory, in [0, 255]. Raises ValueError for arrays of other types, shapes or labels."""

    # Unchecked annotations, since a user's file decides on shapes and types; they are checked below.
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: tuple[str, ...]
    latents = None

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
        _, h, w, c = self.images.shape
        return h, w, c

    @property
    def checksum(self) -> int:
        """CRC-32 of images and labels."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(self.images.tobytes()))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "h w c"] | int]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> ImageBatch:
        """The images at `indices`, flipped left to right where `mirrored`."""
        return _batch(self.images[indices], self.labels[indices], mirrored)


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Labelled image files, decoded to RGB and centre-cropped to `size` when read.

    Reading an image that cannot be decoded raises a `ValueError` with its path.
    """

    files: list[str] = field(repr=False)
    labels: Integer[np.ndarray, "n"] = field(repr=False)
    class_names: tuple[str, ...]
    size: int
    latents = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def checksum(self) -> int:
        """CRC-32 of the files' names, sizes and labels."""
        files = [(Path(file).name, os.path.getsize(file)) for file in self.files]
        return zlib.crc32(repr((files, self.labels.tolist())).encode())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "h w c"] | int]:
        return {"image": read(self.files[index], self.size), "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> ImageBatch:
        """The images at `indices`, decoded in parallel threads, flipped left to right where `mirrored`."""
        # Threads within a batch, not across batches: only the batches in the prefetch buffer are ever in memory.
        with ThreadPoolExecutor(min(len(indices), os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda index: read(self.files[index], self.size), indices))
        return _batch(np.stack(images), self.labels[indices], mirrored)


# All have `image_shape` (h, w, c), `class_names`, `checksum`, `latents` (metadata or None), `len` and `take`.
Source: TypeAlias = ArraySource | FolderSource | LatentSource


def open_dataset(name: str, path: str, size: int) -> Source:
    """The data set of a run: `digits`, or the `cifar10`, `images` or `latents` at `path`.

    Images of a folder are centre-cropped to `size`. Raises ValueError if the data is absent, damaged or empty.
    """
    if name == "digits":
        return digits()
    if not path:
        raise ValueError(f"dataset {name} needs --data-path, the folder or file of the {name}")
    source = cifar10(path) if name == "cifar10" else LatentSource(path) if name == "latents" else images(path, size)
    if len(source) == 0:
        raise ValueError(f"{path} has 0 images; give at least 1")
    return source


def digits() -> ArraySource:
    """The 5,000 embedded digits, 500 of each class, 28 x 28 x 1 (MNIST; see assets/LICENSE-digits.txt)."""
    with np.load(Path(__file__).parents[1] / "assets" / "digits.npz") as arrays:
        return ArraySource(arrays["images"][..., None], arrays["labels"], tuple("0123456789"))


def cifar10(path: str | os.PathLike) -> ArraySource | FolderSource:
    """The CIFAR-10 training images (Krizhevsky 2009) in any of their usual forms.

    `path` is the folder of the official Python batches or its parent; or an `.npz` of `images` (uint8, n h w c),
    `labels` (n) and, optionally, `classes` (names); or a folder with one subfolder of images a class. The official
    batches are pickles: they are read without running any code that they name.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of CIFAR-10 or an .npz of images and labels")
    if batches := _cifar10_batches(path):
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*map(_read_cifar_batch, batches), strict=True))
        return ArraySource(pixels, labels, CIFAR10_CLASSES)
    if path.is_dir():
        return images(path, 32)
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz; extract an archive first and give its folder")
    return _open_npz(path)


def images(path: str | os.PathLike, size: int) -> FolderSource:
    """Images in a folder with one subfolder a class.

    Damaged images raise a ValueError: at once if the files are up to 100 MB; at once, by their headers, if they are up
    to 20,000; else when they are read.
    """
    if size < 1:
        raise ValueError(f"image size is {size}; give a side of at least 1 pixel")
    files, labels, class_names = find_classes(path)
    whole = sum(map(os.path.getsize, files)) <= MAX_BYTES_DECODED

    def check(file):
        with open_image(file) as image:
            if whole:
                image.load()

    if whole or len(files) <= MAX_HEADERS_READ:
        with ThreadPoolExecutor() as pool:
            list(pool.map(check, files))
    return FolderSource(files, labels, class_names, size)


def open_images(path: str, size: int = 0) -> ArraySource | FolderSource:
    """Images to evaluate, or to make a reference of, in their order.

    `path` is `digits`; CIFAR-10 in any form; an .npz of `arr_0`, as sample.py and the ADM suite write it; or a folder.
    A folder's subfolders are its classes, unless some images are in none. Its images must be squares of one size, or
    are centre-cropped to `size`. Raises ValueError, with the path, if the images cannot be read.
    """
    place = Path(path)
    if path == "digits" and not place.exists():
        return digits()
    if not place.exists():
        raise ValueError(f"{path}: there is no such file or folder; give a folder of images, an .npz, or digits")
    if _cifar10_batches(place):
        return cifar10(place)
    source = _open_folder(place, size) if place.is_dir() else _open_npz(place)
    if source.image_shape[-1] not in (1, 3):
        raise ValueError(f"{path} has images of {source.image_shape[-1]} channels; give 1 (grey) or 3 (RGB)")
    return source


def _batch(
    images: UInt8[np.ndarray, "b h w c"], labels: Integer[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]
) -> ImageBatch:
    if mirrored.any():
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return {"x": to_unit(images), "y": labels.astype(np.int32)}


def _open_npz(path: Path) -> ArraySource:
    arrays = read_npz(path, ("arr_0", "images", "labels", "classes"))
    try:
        if "arr_0" in arrays:  # Files of sample.py have labels but no class names; files of the ADM suite have neither.
            pixels = arrays["arr_0"]
            labels = arrays.get("labels", np.zeros(len(pixels), np.int32))
            names = range(int(labels.max(initial=0)) + 1)
        elif arrays.keys() >= {"images", "labels"}:
            pixels, labels, names = arrays["images"], arrays["labels"], arrays.get("classes", CIFAR10_CLASSES)
        else:
            raise ValueError("it has neither arr_0 nor images and labels")
        return ArraySource(pixels, labels, tuple(map(str, names)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _open_folder(folder: Path, size: int) -> FolderSource:
    files = find_images(folder)  # By name, which is the order in which sample.py drew them.

    def shape(file):
        with open_image(file) as image:
            return image.size

    with ThreadPoolExecutor() as pool:
        shapes = list(pool.map(shape, files))
    if not size:
        counts = Counter(shapes).most_common()
        (width, height), count = counts[0]
        if len(counts) > 1:
            other = next(file for file, shape in zip(files, shapes, strict=True) if shape != (width, height))
            raise ValueError(
                f"{folder} has images of {len(counts)} sizes: {count:,} of {width}x{height}, but not {other};"
                " give images of one size or, for a reference, --size to crop them"
            )
        if width != height:
            raise ValueError(f"the images of {folder} are {width}x{height}, which is not square; crop them")
    parts = [Path(file).relative_to(folder).parts for file in files]
    classes = sorted({part[0] for part in parts}) if all(len(part) > 1 for part in parts) else ["images"]
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(part[0], 0) for part in parts], np.int32)
    return FolderSource(files, labels, tuple(classes), size or shapes[0][0])


def _cifar10_batches(path: Path) -> list[Path]:
    """The official Python batches in a folder or its subfolder, if they are there."""
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").exists():
            return [folder / f"data_batch_{number}" for number in range(1, 6)]
    return []


def _read_cifar_batch(path: Path) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, "n"]]:
    try:
        contents = read_pickle(path)
        if not contents.keys() >= {b"data", b"labels"}:
            raise ValueError("it is no dictionary of `data` and `labels`")
        images = contents[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.asarray(contents[b"labels"])
        ArraySource(images, labels, CIFAR10_CLASSES)  # The checks, for an error that names the damaged file.
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise ValueError(f"cannot read CIFAR-10 batch {path}: {error}; fetch it again") from error
    return images, labels
