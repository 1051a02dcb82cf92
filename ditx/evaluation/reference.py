"""What samples are compared with: statistics of a data set's features, in files of our own or of the ADM suite."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

from ditx.evaluation.classifier import Classifier
from ditx.evaluation.features import FeatureName, FeatureNetwork, FeatureStore
from ditx.evaluation.metrics import Moments
from ditx.files import read_npz
from ditx.nn.inception import Resize

FORMAT = 1
POOL_ROWS = 10_000  # as many images as the ADM suite has for precision and recall


class Gaussian(NamedTuple):
    """Mean and covariance of features."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, moments: Moments) -> "Gaussian":
        """That of features gathered. Raises ValueError for fewer than 2 samples."""
        return cls(moments.mean, moments.covariance)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a data set."""

    pool: Gaussian | None
    """for FID; None until those of `images` are computed, where a file has nothing but images"""
    spatial: Gaussian | None
    """for sFID"""
    rows: Float32[np.ndarray, "n d"] | None
    """pool features of some of its images, for precision and recall"""
    images: UInt8[np.ndarray, "n h w c"] | None
    """of an ADM file: those whose `rows` are yet to be computed"""
    name: str
    """what it was made from"""
    count: int | None
    """of how many images"""
    image_shape: tuple[int, ...] | None
    features: FeatureName
    checksum: str | None
    """CRC-32 of the network's weights, where that is known"""
    resize: Resize
    classifier: Classifier | None = None

    @classmethod
    def of(
        cls, gathered: FeatureStore, features: FeatureNetwork, name: str, image_shape: tuple[int, ...]
    ) -> "Reference":
        """That of the images gathered. Raises ValueError for fewer than 2."""
        pool, spatial = gathered.moments()
        return cls(
            pool=Gaussian.of(pool),
            spatial=spatial and Gaussian.of(spatial),
            rows=gathered.pool,
            images=None,
            name=name,
            count=gathered.count,
            image_shape=image_shape,
            features=features.name,
            checksum=features.checksum,
            resize=features.resize,
            classifier=features.network if isinstance(features.network, Classifier) else None,
        )

    def with_images(self, gathered: FeatureStore) -> "Reference":
        """With what was gathered of its `images`, whose moments are taken only where the file has none."""
        pool, spatial = (self.pool, self.spatial) if self.pool else [m and Gaussian.of(m) for m in gathered.moments()]
        return replace(self, pool=pool, spatial=spatial, rows=gathered.pool, images=None)

    def check(self, features: FeatureNetwork, image_shape: tuple[int, ...]) -> None:
        """Raise ValueError where features of such images by such a network cannot be compared with it."""
        if self.checksum is not None and self.checksum != features.checksum:
            raise ValueError(
                f"the reference was made with other weights of {self.features} (CRC-32 {self.checksum}) than these"
                f" ({features.checksum}); give the same weights, or make it anew"
            )
        if self.resize != features.resize:
            raise ValueError(
                f"the reference was made with --resize {self.resize}, not {features.resize}; give the same, or make it"
                " anew"
            )
        if self.image_shape is not None and self.image_shape[:2] != image_shape[:2]:
            h, w = self.image_shape[:2]
            raise ValueError(
                f"the images are {image_shape[0]}x{image_shape[1]}, those of the reference {h}x{w}; make one of the"
                " same size, with --make-stats and --size"
            )

    def write(self, path: Path) -> None:
        """Write it as an `.npz`, whole or not at all."""
        described = {
            "format": FORMAT,
            "name": self.name,
            "count": self.count,
            "image_shape": self.image_shape,
            "features": self.features,
            "checksum": self.checksum,
            "resize": self.resize,
            "versions": {name: version(name) for name in ("ditx", "jax")},
        }
        arrays: dict[str, Any] = {"about": np.array(json.dumps(described)), "rows": self.rows}
        for name, part in (("", self.pool), ("_s", self.spatial)):
            if part is not None:
                arrays |= {f"mu{name}": part.mean, f"sigma{name}": part.covariance}
        for number, leaf in enumerate(jax.tree.leaves(self.classifier)):
            arrays[f"classifier_{number}"] = np.asarray(leaf)
        unfinished = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                np.savez(file, **arrays)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def read_reference(path: Path) -> Reference:
    """Read statistics of `--make-stats`, or an ADM reference: `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`, or a part.

    Raises ValueError, with the path, for a file that is neither, is damaged, or has numbers that are not finite or
    shapes that do not fit.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; make it with: ditx evaluate --make-stats {path} DATA")
    statistics = ("mu", "sigma", "mu_s", "sigma_s", "rows")
    arrays = read_npz(path, ("about", "arr_0", *statistics, *(f"classifier_{n}" for n in range(7))))
    for name in statistics:
        if name in arrays and not (arrays[name].dtype.kind == "f" and np.isfinite(arrays[name]).all()):
            raise ValueError(f"{path} has a {name} of numbers that are not finite; make or fetch it anew")
    pool, spatial = (
        Gaussian(arrays[f"mu{part}"], arrays[f"sigma{part}"])
        if f"mu{part}" in arrays and f"sigma{part}" in arrays
        else None
        for part in ("", "_s")
    )
    for part in filter(None, (pool, spatial)):
        if part.covariance.shape != 2 * part.mean.shape:
            raise ValueError(
                f"{path} has a mean of shape {part.mean.shape} and a covariance of shape {part.covariance.shape}; make"
                " or fetch it anew"
            )
    if "about" in arrays:
        return _read_ours(path, arrays, pool, spatial)
    images = arrays.get("arr_0")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3)):
        raise ValueError(
            f"{path} has an arr_0 of {images.dtype} and shape {images.shape}; images are uint8 (n, h, w, 3)"
        )
    if pool is None and images is None:
        raise ValueError(
            f"{path} has neither images (arr_0) nor statistics (mu, sigma); give a file of --make-stats, or an ADM"
            " reference"
        )
    if pool is not None and (pool.mean.shape != (2048,) or pool.covariance.shape != (2048, 2048)):
        raise ValueError(f"{path} has a mu of shape {pool.mean.shape}; Inception's pool features are 2048")
    shape = None if images is None else images.shape[1:]
    count = None if images is None or pool is not None else len(images)
    return Reference(pool, spatial, None, images, str(path), count, shape, "inception", None, "adm")


def _read_ours(path: Path, arrays: dict[str, np.ndarray], pool: Gaussian | None, spatial: Gaussian | None) -> Reference:
    try:
        about = json.loads(str(arrays["about"]))
        if about.pop("format") != FORMAT or pool is None:
            raise ValueError("its format is another")
        del about["versions"]
        about["image_shape"] = tuple(about["image_shape"])
        classifier = None
        if about["features"] == "classifier":
            leaves = [arrays[f"classifier_{number}"] for number in range(7)]
            channels, classes = leaves[0].shape[2], leaves[-1].shape[1]
            skeleton = jax.eval_shape(lambda key: Classifier(channels, classes, key=key), jax.random.key(0))
            classifier = jax.tree.unflatten(jax.tree.structure(skeleton), leaves)
            if FeatureNetwork(classifier).checksum != about["checksum"]:
                raise ValueError("its classifier was altered")
        return Reference(pool, spatial, arrays["rows"], None, **about, classifier=classifier)
    except Exception as error:  # Of checked types, too, which raise their own kind.
        line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{path} was written by another version of ditx, or is damaged ({type(error).__name__}: {line}); make it"
            " anew"
        ) from error
