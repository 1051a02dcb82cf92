"""Data sets: digits, CIFAR-10, folders of images, and latents, each a `Source` of labelled examples."""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Integer, UInt8

from ditx.data.folders import ImageFolder, find_images, report_skipped
from ditx.data.image_files import read, reason, to_unit
from ditx.data.latents import LatentBatch, LatentSource
from ditx.files import checksum_arrays, read_npz
from ditx.pickles import read_pickle

MAX_BYTES_KEPT = 2**28  # Images of smaller data sets are decoded once.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ImageBatch(TypedDict):
    """Images in [-1, 1] and their class indices."""

    x: Float32[np.ndarray, "b h w c"]
    y: Int32[np.ndarray, "b"]


Batch: TypeAlias = ImageBatch | LatentBatch


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Labelled images in memory, in [0, 255]. Raises ValueError for arrays of other types, shapes or labels.

    Without class names, all labels are 0.
    """

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
        if len(labels) and not 0 <= labels.min() <= labels.max() < max(num_classes, 1):
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
        return int(checksum_arrays((self.images, self.labels)), 16)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "h w c"] | int]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> ImageBatch:
        """The images at `indices`, flipped left to right where `mirrored`."""
        return _batch(self.images[indices], self.labels[indices], mirrored)


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Labelled image files, decoded to RGB and centre-cropped to `size` when read."""

    files: list[str] = field(repr=False)
    labels: Integer[np.ndarray, "n"] = field(repr=False)
    class_names: tuple[str, ...]
    size: int
    checksum: int
    """CRC-32 of the files' contents and labels"""
    skipped: dict[str, str] = field(default_factory=dict)
    """damaged images that were left out, with the reasons"""
    strict: bool = False
    """raise ValueError for an image that cannot be read in training, instead of taking the next one"""
    latents = None
    _reported: set[str] = field(default_factory=set, init=False, repr=False)
    _decoded: dict[int, UInt8[np.ndarray, "h w 3"]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, folder: ImageFolder, size: int, *, strict: bool) -> "FolderSource":
        """The undamaged images of a folder. Raises ValueError if there are none or, if `strict`, for a damaged one."""
        images = folder.undamaged(strict=strict)
        return cls(images.files, images.labels, images.class_names, size, images.checksum, folder.damaged, strict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "h w c"] | int]:
        return {"image": read(self.files[index], self.size), "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> ImageBatch:
        """The images at `indices`, decoded in parallel threads, flipped left to right where `mirrored`.

        The next readable image stands in for one that cannot be read, which is reported.
        """
        # Threads within a batch, not across batches: only the batches in the prefetch buffer are ever in memory.
        with ThreadPoolExecutor(min(len(indices), os.cpu_count() or 1)) as pool:
            images, numbers = zip(*pool.map(self._read, indices.tolist()), strict=True)
        return _batch(np.stack(images), self.labels[list(numbers)], mirrored)

    def _read(self, index: int) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
        number = index
        while True:
            file = self.files[number]
            if number in self._decoded:
                return self._decoded[number], number
            try:
                image = read(file, self.size)
                if len(self) * image.nbytes <= MAX_BYTES_KEPT:
                    self._decoded[number] = image
                return image, number
            except ValueError as error:
                number = (number + 1) % len(self)
                if self.strict or number == index:
                    raise
                if file not in self._reported:
                    self._reported.add(file)
                    print(f"skipped  {file}: {reason(error)}", file=sys.stderr, flush=True)


if TYPE_CHECKING:

    class Source(Protocol):
        """Labelled examples to train on: any object with these members."""

        @property
        def image_shape(self) -> tuple[int, int, int]: ...
        @property
        def class_names(self) -> tuple[str, ...]: ...
        @property
        def checksum(self) -> int: ...
        @property
        def latents(self) -> dict[str, Any] | None: ...
        def __len__(self) -> int: ...
        def take(self, indices: Int[np.ndarray, "b"], mirrored: Bool[np.ndarray, "b"]) -> Batch: ...
else:
    Source = Any  # A check at runtime would compute the checksum at each call.


def check_source(source: Source) -> Source:
    """A source of one's own. Raises ValueError if it has no examples, or lacks a member that training needs."""
    members = ("image_shape", "class_names", "checksum", "latents", "__len__", "take")
    missing = [name for name in members if not hasattr(source, name)]
    if missing:
        raise ValueError(f"source {type(source).__name__} has no {' and no '.join(missing)}; see ditx/data/README.md")
    if len(source) == 0:
        raise ValueError(f"source {type(source).__name__} has 0 examples; give at least 1")
    return source


def open_dataset(name: str, path: str, size: int, *, strict: bool = False) -> Source:
    """The data set of a run: `digits`, or the `cifar10`, `images` or `latents` at `path`.

    Images of a folder are centre-cropped to `size`; `strict` refuses damaged ones. Raises ValueError if the data is
    absent, damaged or empty.
    """
    if name == "digits":
        return digits()
    if not path:
        raise ValueError(f"dataset {name} needs --data-path, the folder or file of the {name}")
    if name == "latents":
        source = LatentSource(path)
    else:
        source = cifar10(path, strict=strict) if name == "cifar10" else images(path, size, strict=strict)
    if len(source) == 0:
        raise ValueError(f"{path} has 0 images; give at least 1")
    return source


def digits() -> ArraySource:
    """The 5,000 embedded digits, 500 of each class, 28 x 28 x 1 (MNIST; see assets/LICENSE-digits.txt)."""
    with np.load(Path(__file__).parents[1] / "assets" / "digits.npz") as arrays:
        return ArraySource(arrays["images"][..., None], arrays["labels"], tuple("0123456789"))


def cifar10(path: str | os.PathLike, *, strict: bool = False) -> ArraySource | FolderSource:
    """The CIFAR-10 training images (Krizhevsky 2009) in any of their usual forms.

    `path` is the folder of the official Python batches or its parent; or an `.npz` of `images` (uint8, n h w c),
    `labels` (n) and, optionally, `classes` (names); or a folder as in `images`. The official batches are pickles: they
    are read without running any code that they name.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of CIFAR-10 or an .npz of images and labels")
    if batches := _cifar10_batches(path):
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*map(_read_cifar_batch, batches), strict=True))
        return ArraySource(pixels, labels, CIFAR10_CLASSES)
    return images(path, 32, strict=strict) if path.is_dir() else _open_npz(path)


def images(path: str | os.PathLike, size: int, *, strict: bool = False) -> FolderSource:
    """Images in a folder with one subfolder a class, or without classes if it has no subfolders of images.

    Damaged images are left out, counted and listed on stderr or, if `strict`, raise a ValueError.
    """
    if size < 1:
        raise ValueError(f"image size is {size}; give a side of at least 1 pixel")
    source = FolderSource.of(find_images(path), size, strict=strict)
    report_skipped(source.skipped)
    return source


def open_images(path: str, size: int = 0) -> ArraySource | FolderSource:
    """Images to evaluate, or to make a reference of, in their order.

    `path` is `digits`; CIFAR-10 in any form; an .npz of `arr_0`, as sample.py and the ADM suite write it; or a folder.
    A folder's subfolders are its classes, unless some images are in none. Its images must be squares of one size, or
    are centre-cropped to `size`. Raises ValueError, with the path, if there are none or if one cannot be read.
    """
    place = Path(path)
    if path == "digits" and not place.exists():
        return digits()
    if not place.exists():
        raise ValueError(f"{path}: there is no such file or folder; give a folder of images, an .npz, or digits")
    if _cifar10_batches(place):
        return cifar10(place)
    source = _open_folder(place, size) if place.is_dir() else _open_npz(place)
    if len(source) == 0:
        raise ValueError(f"{path} has 0 images; give at least 2")
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
            try:
                labels = arrays.get("labels", np.zeros(0))
                return ArraySource(arrays["arr_0"], labels, tuple(map(str, range(int(labels.max(initial=0)) + 1))))
            except (ValueError, TypeError):  # No evaluation needs labels.
                return ArraySource(arrays["arr_0"], np.zeros(arrays["arr_0"].shape[:1], np.int32), ())
        if not arrays.keys() >= {"images", "labels"}:
            raise ValueError("it has neither arr_0 nor images and labels")
        names = arrays.get("classes", np.array(CIFAR10_CLASSES)).tolist()
        names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names]
        return ArraySource(arrays["images"], arrays["labels"], tuple(names))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _open_folder(path: Path, size: int) -> FolderSource:
    folder = find_images(path, by_class=False)
    source = FolderSource.of(folder, size or folder.contents[0].width, strict=True)
    if not size:
        shapes = [(content.width, content.height) for content in folder.contents]
        ((width, height), count), *others = Counter(shapes).most_common()
        if others:
            other = next(file for file, shape in zip(folder.files, shapes, strict=True) if shape != (width, height))
            raise ValueError(
                f"{path} has images of {len(others) + 1} sizes: {count:,} of {width}x{height}, but not {other};"
                " give images of one size or, for a reference, --size to crop them"
            )
        if width != height:
            raise ValueError(f"the images of {path} are {width}x{height}, which is not square; crop them")
    return source


def _cifar10_batches(path: Path) -> list[Path]:
    """The official Python batches in a folder or its subfolder, if they are there.

    Raises ValueError for CIFAR in its other official forms.
    """
    folders = [path, *(path / name for name in ("cifar-10-batches-py", "cifar-10-batches-bin"))]
    for folder in folders:
        if (folder / "data_batch_1").exists():
            return [folder / f"data_batch_{number}" for number in range(1, 6)]
        if (folder / "data_batch_1.bin").exists():
            raise ValueError(f"{folder} is CIFAR-10 in binary; give the folder of its Python version instead")
    for folder in (path, *(path / name for name in ("cifar-100-python", "cifar-100-binary"))):
        if any((folder / f"train{ending}").is_file() for ending in ("", ".bin")):
            raise ValueError(
                f"{folder} is CIFAR-100, which is not read; save its images, labels and classes by numpy.savez, and"
                " give this .npz"
            )
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
