"""Features of images by a network, on all devices, and what is gathered of them on the way to the metrics."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, UInt8

from ditx.evaluation.classifier import Classifier
from ditx.evaluation.metrics import Moments
from ditx.nn.inception import Inception, Resize
from ditx.parallel.mesh import batch_sharding, data_parallel_size, replicated, shard_host_array

FeatureName = Literal["inception", "classifier"]

_ROWS = 4096  # whose scatter is computed at a time, since each is a matrix of the features' size squared


class Features(NamedTuple):
    """Features of some images."""

    pool: Float32[np.ndarray, "n d"]
    spatial: Float32[np.ndarray, "n s"] | None
    """for sFID, which not every network has"""


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network of features, and what tells them from those of another."""

    network: Inception | Classifier
    resize: Resize = "adm"
    """how Inception has images of any size become its own"""

    @property
    def name(self) -> FeatureName:
        return "inception" if isinstance(self.network, Inception) else "classifier"

    @property
    def channels(self) -> int:
        """Channels of the images that it takes."""
        return 3 if isinstance(self.network, Inception) else self.network.kernels[0].shape[2]

    @cached_property
    def checksum(self) -> str:
        """CRC-32 of the weights."""
        return (
            f"{reduce(lambda crc, leaf: zlib.crc32(np.asarray(leaf).data, crc), jax.tree.leaves(self.network), 0):08x}"
        )

    def logits(self, pool: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n classes"] | None:
        """Those of images of such features, or None for a network without that layer."""
        return None if self.network.logits is None else pool @ np.asarray(self.network.logits)


Extract = Callable[[UInt8[np.ndarray, "n h w c"]], Features]


def make_feature_extractor(features: FeatureNetwork, mesh: Mesh, batch_size: int = 32) -> Extract:
    """The function from any number of images to their features, `batch_size` images on each device at a time.

    Every process gives all of the images, and gets the features of all.
    """
    count, rows = batch_size * data_parallel_size(mesh), batch_sharding(mesh)
    weights = jax.tree.map(lambda leaf: shard_host_array(leaf, replicated(mesh)), features.network)
    how = {"resize": features.resize} if isinstance(features.network, Inception) else {}

    def run(network, images):
        found = jax.vmap(lambda image: network(image, **how))(images)
        return found.pool, found.spatial

    compiled = jax.jit(run, out_shardings=replicated(mesh))

    def extract(images):
        pool, spatial = [], []
        for first in range(0, len(images), count):
            part = images[first : first + count]
            # The last batch is filled up, so that one program serves all.
            padded = np.concatenate([part, np.zeros((count - len(part), *part.shape[1:]), np.uint8)])
            found = compiled(weights, shard_host_array(padded, rows))
            pool.append(np.asarray(found[0], np.float32)[: len(part)])
            spatial += [] if found[1] is None else [np.asarray(found[1], np.float32)[: len(part)]]
        return Features(np.concatenate(pool), np.concatenate(spatial) if spatial else None)

    return extract


class FeatureStore:
    """Moments of features that come in batches, and the pool features themselves, of all or of those `kept`.

    With a folder, each batch is also a file there, and those that are there already are read, up to as many images as
    `most`: what was killed goes on.
    """

    def __init__(self, folder: Path | None = None, most: int = 0, *, kept: Bool[np.ndarray, " n"] | None = None):
        self.count, self._kept, self._folder = 0, kept, folder
        self._pool, self._moments, self._pending = [], (None, None), []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            while self.count < most and (rows := _read(folder / f"{self.count:09d}.npz")) is not None:
                left = most - self.count
                self._add(Features(rows.pool[:left], None if rows.spatial is None else rows.spatial[:left]))

    def add(self, rows: Features) -> None:
        """Add the features of the images that come next."""
        if self._folder:
            file = self._folder / f"{self.count:09d}.npz"
            with file.with_suffix(".partial").open("wb") as unfinished:
                np.savez(unfinished, **{name: x for name, x in rows._asdict().items() if x is not None})
            file.with_suffix(".partial").replace(file)
        self._add(rows)

    def _add(self, rows: Features) -> None:
        last = self.count + len(rows.pool)
        self._pool.append(rows.pool if self._kept is None else rows.pool[self._kept[self.count : last]])
        self._pending.append(rows)
        self.count = last
        if sum(len(rows.pool) for rows in self._pending) >= _ROWS:
            self._fold()

    def _fold(self) -> None:
        kinds = [[x for x in kind if x is not None] for kind in zip(*self._pending, strict=True)]
        found = [Moments.of(np.concatenate(kind)) if kind else None for kind in kinds]
        before, self._pending = self._moments, []
        self._moments = tuple(b if a is None else a if b is None else a + b for a, b in zip(before, found, strict=True))

    @property
    def pool(self) -> Float32[np.ndarray, "n d"]:
        """The pool features that were kept."""
        return np.concatenate(self._pool)

    def moments(self) -> tuple[Moments, Moments | None]:
        """Those of all pool features and, where there are any, of all spatial ones."""
        if self._pending:
            self._fold()
        pool, spatial = self._moments
        if pool is None:
            raise ValueError("there are no images; give at least 2")
        return pool, spatial


def _read(file: Path) -> Features | None:
    """What `Gathered` has written, or None where a kill or a full disk prevented it."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            return Features(arrays["pool"], arrays.get("spatial"))
    except Exception:  # of any kind, for a damaged archive: it is written anew
        return None


def with_channels(images: UInt8[np.ndarray, "n h w c"], channels: int) -> UInt8[np.ndarray, "n h w d"]:
    """Grey images repeated or reduced to `channels`; colour images as they are. ValueError for colour in 1 channel."""
    if images.shape[-1] == 1 or images.shape[-1] == channels:
        return np.repeat(images, channels // images.shape[-1], axis=-1)
    if (images != images[..., :1]).any():
        raise ValueError("the images are in colour but the reference is grey; give images of the same kind")
    return images[..., :1]
