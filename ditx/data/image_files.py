"""Image files: finding them in folders, decoding them, and the centre crop."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32, UInt8

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_images(folder: str | os.PathLike) -> list[str]:
    """Paths of the images in a folder, at any depth, sorted; hidden files are skipped. Raises ValueError if none."""
    files = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    if not files:
        raise ValueError(f"folder {folder} contains no images ({' '.join(IMAGE_SUFFIXES)}); add some or remove it")
    return files


def find_classes(path: str | os.PathLike) -> tuple[list[str], Int32[np.ndarray, "n"], tuple[str, ...]]:
    """Image files, their labels and the class names: one subfolder a class, sorted. Raises ValueError if none."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give one with a subfolder of images for each class")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{path} has no class folders; put the images of each class into a subfolder of their own")
    files = [find_images(folder) for folder in folders]
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(names) for names in files])
    return list(chain.from_iterable(files)), labels, tuple(folder.name for folder in folders)


def centre_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The central square at `size` x `size` (Dhariwal and Nichol 2021): box halvings, one bicubic resize, a crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


@contextmanager
def open_image(path: str) -> Iterator[PIL.Image.Image]:
    """Open an image of 8 bits a channel. Raises ValueError with the path if opening it or using it fails."""
    try:
        with PIL.Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow's conversion to RGB would clip these to white.
                raise ValueError(f"its pixels are of mode {image.mode}, not 8 bits")
            yield image
    except Exception as error:  # Pillow raises many kinds of errors for damaged files.
        raise ValueError(f"cannot read image {path}: {error}; replace or remove it") from error


def read(path: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image as RGB, centre-cropped. Raises ValueError with the path if it cannot be read."""
    with open_image(path) as image:
        if "transparency" in image.info:  # Pillow would drop it with a warning.
            image = image.convert("RGBA")
        return np.asarray(centre_crop(image.convert("RGB"), size))


def to_unit(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
