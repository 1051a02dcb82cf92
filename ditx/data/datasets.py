"""The data set of a run: what is told of it at a glance, and its opening, which looks at all of it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from ditx.data import image_files, sources
from ditx.data.latents import LatentSource, read_metadata


@dataclass(frozen=True)
class Glance:
    """What a network must fit: known from names and headers before any image is looked at."""

    image_shape: tuple[int, ...]
    """height, width and channels"""
    class_names: tuple[str, ...]
    latents: dict[str, Any] | None = None
    """of latents, the autoencoder `vae`, its `scale`, and the side `image_size` of the images"""

    @classmethod
    def of(cls, source: sources.Source) -> "Glance":
        """The same of what is open."""
        latents = _origin(source.metadata) if isinstance(source, LatentSource) else None
        return cls(source.image_shape, source.class_names, latents)


def glance(name: str, path: str, size: int) -> Glance:
    """What is told of a data set in no time; images of a folder are to be cropped to `size`.

    Raises ValueError, with the sentence of `open_data`, where it is not there or cannot be what it should be.
    """
    if name == "digits":
        return Glance.of(sources.digits())
    if not path:
        raise ValueError(f"dataset {name} needs --data-path, the place where the {name} lie")
    if name == "latents":
        metadata = read_metadata(Path(path))
        return Glance(tuple(metadata["shape"]), tuple(metadata["class_names"]), _origin(metadata))
    form, place = image_files.cifar10_form(Path(path)) if name == "cifar10" else ("images", Path(path))
    if form == "batches":
        return Glance((32, 32, 3), sources.CIFAR10_CLASSES)
    if form == "images":
        side = 32 if name == "cifar10" else size
        return Glance((side, side, 3), tuple(folder.name for folder in image_files.class_folders(place)))
    with suppress(Exception):  # Opening it says what is wrong, if anything is.
        with ZipFile(path) as arrays, arrays.open("images.npy") as file:
            np.lib.format.read_magic(file)
            (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(file)
            named = "classes.npy" in arrays.namelist()
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(map(str, arrays["classes"])) if named else sources.CIFAR10_CLASSES
        if count > 0 and len(shape) == 3 and dtype == np.uint8:
            return Glance(tuple(shape), names)
    return Glance.of(open_data(name, path, size))


def open_data(name: str, path: str, size: int, seen: Glance | None = None) -> sources.Source:
    """The images, checked as far as that is done before training. Raises ValueError where they are not those `seen`."""
    if name == "digits":
        source = sources.digits()
    elif name == "cifar10":
        source = sources.cifar10(path)
    elif name == "latents":
        source = LatentSource(path)
    else:
        source = sources.images(path, size)
    if len(source) == 0:
        raise ValueError(f"{path} holds 0 images; give at least 1")
    if seen is not None and Glance.of(source) != seen:
        raise ValueError(f"{path} has changed while this was starting; start again")
    return source


def _origin(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in ("vae", "scale", "image_size")}
