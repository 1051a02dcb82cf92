"""Images to be judged, or to judge by: a data set, a folder, or an npz, read in order as uint8."""

import os
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ditx.data import image_files, sources
from ditx.data.sources import ArraySource, FolderSource

_HEADERS_AT_A_TIME = 256


def open_images(path: str, size: int = 0) -> ArraySource | FolderSource:
    """`digits`; CIFAR-10 in any form; an npz of `arr_0`, as sample.py and the ADM suite have it; or a folder of images.

    A folder's images lie in subfolders, which are its classes, or in none; they are all square and of one size, or
    are cropped to `size`. Raises ValueError, with the path, for what cannot be read.
    """
    place = Path(path)
    if path == "digits" and not place.exists():
        return sources.digits()
    if not place.exists():
        raise ValueError(f"{path}: there is no such file or folder; give a folder of images, an .npz, or digits")
    if any((folder / "data_batch_1").exists() for folder in (place, place / "cifar-10-batches-py")):
        return sources.cifar10(place)
    if place.is_dir():
        return _open_folder(place, size)
    arrays = read_npz(place, ("arr_0", "images", "labels"))
    if "arr_0" not in arrays and "images" in arrays:
        return sources.cifar10(place)
    if "arr_0" not in arrays:
        raise ValueError(
            f"{path} has no images, of the name arr_0 or images; give an .npz as sample.py --npz writes it"
        )
    # Those of sample.py have labels, too, but no names of classes; nor does the ADM suite.
    images = arrays["arr_0"]
    labels = arrays.get("labels", np.zeros(len(images), np.int32))
    try:
        names = tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
        source = ArraySource(images, labels, names)
    except ValueError as error:
        raise ValueError(f"{path} cannot be judged: {error}") from error
    if source.image_shape[-1] not in (1, 3):
        raise ValueError(f"{path} has images of {source.image_shape[-1]} channels; give 1 (grey) or 3 (RGB)")
    return source


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that a file has. Raises ValueError, with the path, if it cannot be read."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged archive.
        raise ValueError(
            f"{path} cannot be read as an .npz ({type(error).__name__}: {error}); write it anew"
        ) from error


def image_batches(
    source: ArraySource | FolderSource, start: int, batch_size: int
) -> Generator[UInt8[np.ndarray, "b h w c"], None, None]:
    """All images from number `start` on, in order. Raises ValueError for one that cannot be read."""
    if isinstance(source, ArraySource):
        for first in range(start, len(source), batch_size):
            yield source.images[first : first + batch_size]
    else:
        files = source.files[start:]
        with closing(sources.decoded(files, source.size, batch_size=batch_size)) as batches:
            for number, (images, wrong) in enumerate(batches):
                for place, reason in enumerate(wrong):
                    if reason:
                        file = files[number * batch_size + place]
                        raise ValueError(f"cannot read image {file}: {reason}; replace or remove it")
                yield images


def with_channels(images: UInt8[np.ndarray, "n h w c"], channels: int) -> UInt8[np.ndarray, "n h w d"]:
    """Grey images repeated to 3 channels, or grey ones of 3 as they are with 1. Raises ValueError for others."""
    if images.shape[-1] == 1 or images.shape[-1] == channels:
        return np.repeat(images, channels // images.shape[-1], axis=-1)
    if (images != images[..., :1]).any():
        raise ValueError(
            "the images are of colour, but the reference is of grey ones; give one that is of the same kind"
        )
    return images[..., :1]


def _open_folder(folder: Path, size: int) -> FolderSource:
    # In the order of their names, which is that in which sample.py has drawn them.
    files = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(image_files.IMAGE_SUFFIXES) and not name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder} holds no images ({' '.join(image_files.IMAGE_SUFFIXES)}); give another folder")
    with ThreadPoolExecutor() as pool:
        shapes = list(pool.map(_shape, files, chunksize=_HEADERS_AT_A_TIME))
    if not size:
        counts = Counter(shapes).most_common()
        (width, height), count = counts[0]
        if len(counts) > 1:
            other = next(file for file, shape in zip(files, shapes, strict=True) if shape != (width, height))
            raise ValueError(
                f"{folder} has images of {len(counts)} sizes: {count:,} of {width}x{height}, but {other} is another;"
                " give images of one size or, for a reference, --size to crop them to"
            )
        if width != height:
            raise ValueError(f"the images of {folder} are {width}x{height}, which is no square; crop them to one")
    parts = [Path(file).relative_to(folder).parts for file in files]
    classes = sorted({part[0] for part in parts if len(part) > 1}) if all(len(part) > 1 for part in parts) else []
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number.get(part[0], 0) for part in parts], np.int32)
    return FolderSource(files, labels, tuple(classes) or ("images",), size or shapes[0][0])


def _shape(file: str) -> tuple[int, int]:
    with image_files.opened(file) as image:
        return image.size
