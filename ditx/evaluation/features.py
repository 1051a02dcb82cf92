"""Features of images, computed on all devices and stored batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, UInt8

from ditx.evaluation.classifier import Classifier
from ditx.evaluation.metrics import Moments
from ditx.files import checksum_arrays, read_npz, write_atomically
from ditx.nn.inception import Inception, Resize
from ditx.parallel.mesh import batch_sharding, data_parallel_size, replicated, shard_host_array

FeatureName = Literal["inception", "classifier"]

_ROWS = 4096  # rows per scatter matrix, which has the square of the features' size


class Features(NamedTuple):
    """Features of some images."""

    pool: Float32[np.ndarray, "n d"]
    spatial: Float32[np.ndarray, "n s"] | None
    """for sFID; a classifier has none"""


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network of features, with the facts that identify it."""

    network: Inception | Classifier
    resize: Resize = "adm"
    """how Inception resizes images to its own size"""

    @property
    def name(self) -> FeatureName:
        return "inception" if isinstance(self.network, Inception) else "classifier"

    @property
    def channels(self) -> int:
        """Channels of its input images."""
        return 3 if isinstance(self.network, Inception) else self.network.kernels[0].shape[2]

    @cached_property
    def checksum(self) -> str:
        """CRC-32 of the weights."""
        return checksum_arrays(jax.tree.leaves(self.network))

    def logits(self, pool: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n classes"] | None:
        """Logits of images with these pool features, or None for a network without a logits layer."""
        return None if self.network.logits is None else pool @ np.asarray(self.network.logits)


Extract: TypeAlias = Callable[[UInt8[np.ndarray, "n h w c"]], Features]


def make_feature_extractor(features: FeatureNetwork, mesh: Mesh, batch_size: int = 32) -> Extract:
    """Compile `extract(images) -> features` for any number of images, `batch_size` on each device at a time.

    Every process passes all images and gets the features of all. Grey images are repeated to the network's channels;
    `extract` raises ValueError for colour images if the network is for grey ones.
    """
    count, rows = batch_size * data_parallel_size(mesh), batch_sharding(mesh)
    weights = jax.tree.map(lambda leaf: shard_host_array(leaf, replicated(mesh)), features.network)
    options = {"resize": features.resize} if isinstance(features.network, Inception) else {}

    def run(network, images):
        result = jax.vmap(lambda image: network(image, **options))(images)
        return Features(result.pool, result.spatial)

    program = jax.jit(run, out_shardings=replicated(mesh))

    def extract(images):
        images, parts = with_channels(images, features.channels), []
        for first in range(0, len(images), count):
            part = images[first : first + count]
            padded = np.resize(part, (count, *part.shape[1:]))  # so that one program serves the last batch, too
            result = program(weights, shard_host_array(padded, rows))
            size = len(part)
            parts.append(jax.tree.map(lambda x, size=size: np.asarray(x, np.float32)[:size], result))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    return extract


class FeatureStore:
    """Moments of features that arrive in batches, and the pool features of all images or of the images in `kept`.

    With a folder, each batch is also written to a file. A new store first reads the files that are there, up to
    `limit` images, so a killed evaluation resumes.
    """

    def __init__(self, folder: Path | None = None, limit: int = 0, *, kept: Bool[np.ndarray, " n"] | None = None):
        self.count, self._kept, self._folder = 0, kept, folder
        self._pool, self._moments, self._pending = [], (), []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            while self.count < limit and (batch := _read(folder / f"{self.count:09d}.npz")) is not None:
                self._add(jax.tree.map(lambda x: x[: limit - self.count], batch))

    def add(self, batch: Features) -> None:
        """Add the features of the next images."""
        if self._folder:
            with write_atomically(self._folder / f"{self.count:09d}.npz") as file:
                np.savez(file, **{name: kind for name, kind in batch._asdict().items() if kind is not None})
        self._add(batch)

    def _add(self, batch: Features) -> None:
        end = self.count + len(batch.pool)
        self._pool.append(batch.pool if self._kept is None else batch.pool[self._kept[self.count : end]])
        self._pending.append(batch)
        self.count = end
        if sum(len(batch.pool) for batch in self._pending) >= _ROWS:
            self._fold()

    def _fold(self) -> None:
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *self._pending)
        new = [Moments.of(kind) for kind in whole if kind is not None]
        self._moments = [a + b for a, b in zip(self._moments, new, strict=True)] if self._moments else new
        self._pending = []

    @property
    def pool(self) -> Float32[np.ndarray, "n d"]:
        """The kept pool features."""
        return np.concatenate(self._pool)

    def moments(self) -> tuple[Moments, Moments | None]:
        """Moments of all pool features and of all spatial features, if there are any."""
        if self._pending:
            self._fold()
        if not self._moments:
            raise ValueError("there are no images; give at least 2")
        pool, *spatial = self._moments
        return pool, spatial[0] if spatial else None


def _read(file: Path) -> Features | None:
    """A batch that a store wrote, or None if it is absent or damaged and must be computed again."""
    try:
        arrays = read_npz(file)
        return Features(arrays["pool"], arrays.get("spatial"))
    except (ValueError, KeyError):
        return None


def with_channels(images: UInt8[np.ndarray, "n h w c"], channels: int) -> UInt8[np.ndarray, "n h w d"]:
    """Grey images with `channels` channels; colour images unchanged. Raises ValueError for colour in 1 channel."""
    if images.shape[-1] == 1 or images.shape[-1] == channels:
        return np.repeat(images, channels // images.shape[-1], axis=-1)
    if (images != images[..., :1]).any():
        raise ValueError("the images are in colour but the reference is grey; give images of the same kind")
    return images[..., :1]
