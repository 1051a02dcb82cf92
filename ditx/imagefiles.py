"""Image files: finding those of a folder, reading them, and the crop of the paper."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Int32, UInt8

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def listing(path: str | os.PathLike) -> tuple[list[str], Int32[np.ndarray, "n"], tuple[str, ...]]:
    """Image files, their labels, and the names of the classes: a subfolder each, sorted, with images at any depth."""
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
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return files, labels, tuple(folder.name for folder in folders)


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
