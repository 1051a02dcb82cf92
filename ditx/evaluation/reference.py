"""Reference statistics: the features of a data set, in files of our own or of the ADM suite."""

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
from ditx.files import first_line, read_npz, write_atomically
from ditx.nn.inception import Resize

FORMAT = 1
POOL_ROWS = 10_000  # images for precision and recall, as in the ADM suite


class FeatureStats(NamedTuple):
    """Mean and covariance of features."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, moments: Moments) -> "FeatureStats":
        """From moments. Raises ValueError for fewer than 2 samples."""
        return cls(moments.mean, moments.covariance)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a data set."""

    pool: FeatureStats | None
    """for FID; None if a file has images only, until their features are computed"""
    spatial: FeatureStats | None
    """for sFID"""
    rows: Float32[np.ndarray, "n d"] | None
    """pool features of some images, for precision and recall"""
    images: UInt8[np.ndarray, "n h w c"] | None
    """images of an ADM file, whose `rows` are yet to be computed"""
    name: str
    """source of the images"""
    count: int | None
    """number of images"""
    image_shape: tuple[int, ...] | None
    features: FeatureName
    checksum: str | None
    """CRC-32 of the feature network's weights, if known"""
    resize: Resize
    classifier: Classifier | None = None

    @classmethod
    def of(cls, store: FeatureStore, features: FeatureNetwork, name: str, image_shape: tuple[int, ...]) -> "Reference":
        """From the features of a data set. Raises ValueError for fewer than 2 images."""
        pool, spatial = store.moments()
        return cls(
            pool=FeatureStats.of(pool),
            spatial=spatial and FeatureStats.of(spatial),
            rows=store.pool,
            images=None,
            name=name,
            count=store.count,
            image_shape=image_shape,
            features=features.name,
            checksum=features.checksum,
            resize=features.resize,
            classifier=features.network if isinstance(features.network, Classifier) else None,
        )

    def with_images(self, store: FeatureStore) -> "Reference":
        """Add the features of its `images`; statistics that the file has are kept."""
        pool, spatial = self.pool, self.spatial
        if pool is None:
            pool, spatial = (moments and FeatureStats.of(moments) for moments in store.moments())
        return replace(self, pool=pool, spatial=spatial, rows=store.pool, images=None)

    def check(self, features: FeatureNetwork, image_shape: tuple[int, ...]) -> None:
        """Raise ValueError if features of such images by this network cannot be compared with the reference."""
        if self.checksum is not None and self.checksum != features.checksum:
            raise ValueError(
                f"the reference was made with other weights of {self.features} (CRC-32 {self.checksum}) than these"
                f" ({features.checksum}); give the same weights, or make it again"
            )
        if self.resize != features.resize:
            raise ValueError(
                f"the reference was made with --resize {self.resize}, not {features.resize}; give the same, or make it"
                " again"
            )
        if self.image_shape is not None and self.image_shape[:2] != image_shape[:2]:
            h, w = self.image_shape[:2]
            raise ValueError(
                f"the images are {image_shape[0]}x{image_shape[1]}, but those of the reference {h}x{w}; make one of"
                " the same size, with --make-stats and --size"
            )

    def write(self, path: Path) -> None:
        """Write an `.npz`, whole or not at all."""
        names = ("name", "count", "image_shape", "features", "checksum", "resize")
        described = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        described["versions"] = {name: version(name) for name in ("ditx", "jax")}
        arrays: dict[str, Any] = {"about": np.array(json.dumps(described)), "rows": self.rows}
        for suffix, part in (("", self.pool), ("_s", self.spatial)):
            if part is not None:
                arrays |= {f"mu{suffix}": part.mean, f"sigma{suffix}": part.covariance}
        for number, leaf in enumerate(jax.tree.leaves(self.classifier)):
            arrays[f"classifier_{number}"] = np.asarray(leaf)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            np.savez(file, **arrays)


def read_reference(path: Path) -> Reference:
    """Read statistics of `--make-stats`, or an ADM reference: some of `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`.

    Raises ValueError with the path for a file that is neither or is damaged, and for values that are not finite or
    shapes that do not fit.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; make it with: ditx evaluate --make-stats {path} DATA")
    statistics = ("mu", "sigma", "mu_s", "sigma_s", "rows")
    arrays = read_npz(path, ("about", "arr_0", *statistics, *(f"classifier_{n}" for n in range(7))))
    for name in statistics:
        if name in arrays and not (arrays[name].dtype.kind == "f" and np.isfinite(arrays[name]).all()):
            raise ValueError(f"{path} has values in {name} that are not finite; make or fetch it again")
    pool, spatial = (
        FeatureStats(arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"])
        if f"mu{suffix}" in arrays and f"sigma{suffix}" in arrays
        else None
        for suffix in ("", "_s")
    )
    for part in filter(None, (pool, spatial)):
        if part.covariance.shape != 2 * part.mean.shape:
            raise ValueError(
                f"{path} has a mean of shape {part.mean.shape} but a covariance of shape {part.covariance.shape}; make"
                " or fetch it again"
            )
    return _read_ours(path, arrays, pool, spatial) if "about" in arrays else _read_adm(path, arrays, pool, spatial)


def _read_adm(
    path: Path, arrays: dict[str, np.ndarray], pool: FeatureStats | None, spatial: FeatureStats | None
) -> Reference:
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
        raise ValueError(f"{path} has a mu of shape {pool.mean.shape}; Inception's pool features have shape (2048,)")
    shape = None if images is None else images.shape[1:]
    count = None if images is None or pool is not None else len(images)
    return Reference(pool, spatial, None, images, str(path), count, shape, "inception", None, "adm")


def _read_ours(
    path: Path, arrays: dict[str, np.ndarray], pool: FeatureStats | None, spatial: FeatureStats | None
) -> Reference:
    try:
        described = json.loads(str(arrays["about"]))
        if described.pop("format") != FORMAT or pool is None:
            raise ValueError("its format is not supported")
        del described["versions"]
        described["image_shape"] = tuple(described["image_shape"])
        classifier = None
        if described["features"] == "classifier":
            leaves = [arrays[f"classifier_{number}"] for number in range(7)]
            channels, classes = leaves[0].shape[2], leaves[-1].shape[1]
            skeleton = jax.eval_shape(lambda key: Classifier(channels, classes, key=key), jax.random.key(0))
            classifier = jax.tree.unflatten(jax.tree.structure(skeleton), leaves)
            if FeatureNetwork(classifier).checksum != described["checksum"]:
                raise ValueError("its classifier was altered")
        return Reference(pool, spatial, arrays["rows"], None, **described, classifier=classifier)
    except Exception as error:  # beartype's errors included
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{path} was written by another version of ditx, or is damaged ({cause}); make it again"
        ) from error
