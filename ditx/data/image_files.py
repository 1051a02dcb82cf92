"""Image files: finding those of a folder, in order and in shards, reading them, and the crop of the paper."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Int32, UInt8

MAX_SHARDS = 500  # A reader holds all of them open, and often no more than 1,024 files may be.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def listing(path: str | os.PathLike) -> tuple[list[str], Int32[np.ndarray, "n"], tuple[str, ...]]:
    """Image files, their labels, and the names of the classes: a subfolder each, sorted, with images at any depth."""
    folders, files = class_folders(path), list[str]()
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
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return files, labels, tuple(folder.name for folder in folders)


def class_folders(path: str | os.PathLike) -> list[Path]:
    """The subfolder of each class, sorted, not looked into. Raises ValueError where there are none."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give one that holds a subfolder of images for each class")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{path} has no class folders; put the images of each class into a subfolder of their own")
    return folders


def cifar10_form(path: Path) -> tuple[Literal["batches", "images", "npz"], Path]:
    """In which form CIFAR-10 is kept, and where. Raises ValueError where `path` is none of them."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the CIFAR-10 folder or an .npz of images and labels")
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").exists():
            return "batches", folder
    if not path.is_dir() and path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz; extract an archive first and give its folder")
    return "images" if path.is_dir() else "npz", path


def centre_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The central square at `size` x `size` (Dhariwal and Nichol 2021): box halvings, one bicubic resize, a crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


@contextmanager
def opened(path: str) -> Iterator[PIL.Image.Image]:
    """Open an image. Raises ValueError, here or where it is used, with the path, if it cannot be read."""
    try:
        with PIL.Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow's conversion to RGB would clip these to white.
                raise ValueError(f"its pixels are of mode {image.mode}, not 8 bits")
            yield image
    except Exception as error:  # Pillow's readers raise many kinds for damaged files.
        raise ValueError(f"cannot read image {path}: {error}; replace or remove it") from error


def check(path: str, whole: bool) -> None:
    """Raise ValueError if the header, or the whole, of an image cannot be read."""
    with opened(path) as image:
        if whole:
            image.load()


def read(path: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image as RGB, cropped to its centre. Raises ValueError, with the path, if it cannot be read."""
    with opened(path) as image:
        if "transparency" in image.info:  # which Pillow drops with a warning otherwise
            image = image.convert("RGBA")
        return np.asarray(centre_crop(image.convert("RGB"), size))


@dataclass(frozen=True)
class Images:
    """The images of a folder in the order of their names, as many as `shard_size` in a row to a shard."""

    files: list[str]
    names: list[str]
    """the files' paths within the folder"""
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]
    shard_size: int

    @classmethod
    def find(cls, folder: str, shard_size: int) -> "Images":
        """List a folder. Raises ValueError if it does not hold a subfolder of images for each class."""
        root = Path(folder).absolute()
        files, labels, class_names = listing(root)
        names = [file[len(str(root)) + 1 :] for file in files]
        size = shard_size or max(64, -(-len(files) // 200))
        if len(files) > MAX_SHARDS * size:
            least = -(-len(files) // MAX_SHARDS)
            raise ValueError(f"shard_size {size} makes more than {MAX_SHARDS} shards; give {least} or more")
        return cls(files, names, labels, class_names, size)

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-len(self.files) // self.shard_size))

    def numbers(self, shard: int) -> range:
        """The numbers of the images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.files)))

    def checksum(self, shard: int) -> int:
        """CRC-32 of the names and sizes of the files of a shard."""
        told = [(self.names[n], _size(self.files[n])) for n in self.numbers(shard)]
        return zlib.crc32(json.dumps(told).encode())


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1
