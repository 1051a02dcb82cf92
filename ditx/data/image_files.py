"""Image files: decoding by content, upright and on white, and the centre crop."""

import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float32, Float64, UInt8

T = TypeVar("T")

# Formats that Pillow recognises but cannot decode, and EPS, a program that it hands to Ghostscript.
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, the most common first."""
    PIL.Image.preinit()
    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name not in NO_IMAGES)


def is_image_name(path: str) -> bool:
    """Whether a file's name has the extension of an image format that is read."""
    known = formats()
    return PIL.Image.EXTENSION.get(os.path.splitext(path)[1].lower()) in known


def with_image(path: str, use: Callable[[PIL.Image.Image], T]) -> T:
    """`use(image)` of the image that a file holds, whatever the file's name.

    Raises ValueError with the path if the image is at fault, OSError if the disk or the machine is.
    """

    def apply(file: str | io.BytesIO) -> T:
        with PIL.Image.open(file, formats=formats()) as image:
            if image.mode[0] in "IF":  # Pillow's conversion to RGB would clip these to white.
                raise ValueError(f"its pixels are of mode {image.mode}, not 8 bits")
            return use(image)

    try:
        try:
            return apply(path)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            return apply(io.BytesIO(_without_text(Path(path).read_bytes())))
    except Exception as error:  # Pillow raises many kinds of errors for damaged files.
        sentence = f"cannot read image {path}: {error}; replace or remove it"
        absent = isinstance(error, PermissionError) or os.path.islink(path)
        if isinstance(error, MemoryError) or (getattr(error, "errno", None) and not absent):
            raise OSError(sentence) from error
        raise ValueError(sentence) from error


def reason(error: ValueError) -> str:
    """The reason for an error of `with_image`, in one line."""
    return " ".join(str(error.__cause__ or error).split()) or repr(error.__cause__)


def read(path: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image as RGB: upright by its EXIF orientation, transparent parts white, centre-cropped.

    Raises ValueError with the path if it cannot be read, and OSError if the disk or the machine is at fault.
    """
    return with_image(path, lambda image: np.asarray(centre_crop(to_rgb(upright(image)), size)))


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image turned and mirrored as its EXIF or XMP orientation says; damaged metadata says nothing."""
    image.load()
    if not image.info:  # which saves a search
        return image
    try:
        turned = image.getexif().get(0x112, 1) != 1
    except Exception:  # of many types, as above
        return image
    return PIL.ImageOps.exif_transpose(image) if turned else image


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB, its transparent parts on white, the background of most viewers."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The central square at `size` x `size` (Dhariwal and Nichol 2021): box halvings, one bicubic resize, a crop."""
    if image.size == (size, size):
        return image
    bicubic = PIL.Image.Resampling.BICUBIC
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    # Enlarging all of a long strip would take gigabytes, so only its centre is enlarged; the pixels are the same.
    if height > max(8 * size, image.height):
        rows, weights = bicubic_weights(image.height, height, top, size)
        part = image.crop((0, rows.start, image.width, rows.stop)).resize((size, len(rows)), bicubic)
        return PIL.Image.fromarray(_weighted(weights, np.asarray(part)))
    if width > max(8 * size, image.width):
        columns, weights = bicubic_weights(image.width, width, left, size)
        part = np.asarray(image.crop((columns.start, 0, columns.stop, image.height)))
        return PIL.Image.fromarray(_weighted(weights, part.swapaxes(0, 1)).swapaxes(0, 1)).resize((size, size), bicubic)
    return image.resize((width, height), bicubic).crop((left, top, left + size, top + size))


def bicubic_weights(count: int, total: int, first: int, size: int) -> tuple[range, Float64[np.ndarray, "size n"]]:
    """Which of `count` input rows give output rows `first` to `first + size - 1`, and with which weights.

    For Pillow's bicubic enlargement from `count` to `total` rows. Weights are Pillow's fixed-point integers (2**22 is
    1), so that results are equal to the last bit.
    """
    centre = (np.arange(first, first + size) + 0.5)[:, None] * (count / total)
    low, high = np.maximum((centre - 1.5).astype(int), 0), np.minimum((centre + 2.5).astype(int), count)
    rows = range(low.min(), high.max())
    index = np.arange(rows.start, rows.stop)
    x = np.abs(index - centre + 0.5)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0)) * ((low <= index) & (index < high))
    weights /= weights.sum(1, keepdims=True)
    return rows, np.trunc(weights * 2**22 + np.copysign(0.5, weights))


def _weighted(
    weights: Float64[np.ndarray, "size n"], rows: UInt8[np.ndarray, "n m 3"]
) -> UInt8[np.ndarray, "size m 3"]:
    """Weighted sums of rows, rounded as Pillow rounds them."""
    sums = np.tensordot(weights, rows.astype(np.float64), 1)  # of integers below 2**53
    return np.clip((sums + 2**21) // 2**22, 0, 255).astype(np.uint8)


def to_unit(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _without_text(png: bytes) -> bytes:
    """A PNG without its text and colour profile chunks, which Pillow refuses when they are large."""
    kept, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[start:end])
        start = end
    return b"".join(kept)
