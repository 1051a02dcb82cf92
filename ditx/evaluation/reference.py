"""Reference statistics: the features of a data set, in files of our own, of the ADM suite or of pytorch-fid."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from ditx.evaluation.classifier import Classifier
from ditx.evaluation.features import FeatureName, FeatureNetwork, FeatureStore
from ditx.evaluation.metrics import FeatureStats
from ditx.files import first_line, read_npz, write_atomically
from ditx.nn.inception import Resize
from ditx.weights.frozen import load_inception

FORMAT = 1
POOL_ROWS = 10_000  # images for precision and recall, as in the ADM suite
_CLASSIFIER = [f"classifier_{number}" for number in range(7)]


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a data set. A field is None if the file does not have it."""

    pool: FeatureStats | None
    """for FID"""
    spatial: FeatureStats | None
    """for sFID"""
    rows: Float32[np.ndarray, "n d"] | None
    """pool features of some images, for precision and recall"""
    images: UInt8[np.ndarray, "n h w c"] | None
    """images of an ADM file, until `with_images` adds their features"""
    name: str
    """source of the images"""
    count: int | None
    """number of images"""
    image_shape: tuple[int, ...] | None
    checksum: str | None
    """CRC-32 of the feature network's weights"""
    resize: Resize | None
    """how images were resized for Inception"""
    classifier: Classifier | None = None
    """the feature network, if it is not Inception"""

    @property
    def features(self) -> FeatureName:
        return "classifier" if self.classifier else "inception"

    @classmethod
    def of(cls, store: FeatureStore, features: FeatureNetwork, name: str, image_shape: tuple[int, ...]) -> "Reference":
        """Statistics of the features of a data set. Raises ValueError for fewer than 2 images."""
        pool, spatial = store.moments()
        classifier = features.network if isinstance(features.network, Classifier) else None
        facts: Any = {"checksum": features.checksum, "resize": features.resize, "classifier": classifier}
        return cls(pool.stats, spatial and spatial.stats, store.pool, None, name, store.count, image_shape, **facts)

    def with_images(self, store: FeatureStore) -> "Reference":
        """Add the features of its `images`; statistics from the file are kept."""
        pool, spatial = self.pool, self.spatial
        if pool is None:
            pool, spatial = (moments and moments.stats for moments in store.moments())
        return replace(self, pool=pool, spatial=spatial, rows=store.pool, images=None)

    def load_features(self, inception: str = "", resize: Resize | None = None) -> tuple[FeatureNetwork, str]:
        """The feature network, and where it is from; `inception` is a file, or empty to download it.

        Raises ValueError if neither the statistics nor `resize` tells how images are resized for Inception.
        """
        if self.classifier:
            return FeatureNetwork(self.classifier), ""
        if self.pool is not None and not (resize or self.resize):
            raise ValueError(
                f"{self.name} does not record how images were resized; give --resize pytorch-fid for statistics of"
                " that program (mu and sigma only), or --resize adm"
            )
        network, note = load_inception(inception)
        return FeatureNetwork(network, resize or self.resize or "adm"), note

    def check(self, features: FeatureNetwork, image_shape: tuple[int, ...]) -> None:
        """Raise ValueError if features of such images by this network cannot be compared with the reference."""
        if self.checksum not in (None, features.checksum):
            raise ValueError(
                f"the reference was made with other weights of {features.name} (CRC-32 {self.checksum}) than these"
                f" ({features.checksum}); give the same weights, or make it again"
            )
        if self.resize not in (None, features.resize):
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
        arrays |= dict(zip(_CLASSIFIER, map(np.asarray, jax.tree.leaves(self.classifier)), strict=False))
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            np.savez(file, **arrays)


def read_reference(path: Path) -> Reference:
    """Read statistics of `--make-stats` or pytorch-fid, or an ADM reference: `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`.

    Raises ValueError with the path for other or damaged files, for values that are not finite, and for shapes that do
    not fit.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; make it with: ditx evaluate --make-stats {path} DATA")
    arrays = read_npz(path, ("about", "arr_0", "mu", "sigma", "mu_s", "sigma_s", "rows", *_CLASSIFIER))
    for name in ("mu", "sigma", "mu_s", "sigma_s", "rows"):
        if name in arrays and not (arrays[name].dtype.kind == "f" and np.isfinite(arrays[name]).all()):
            raise ValueError(f"{path} has values in {name} that are not finite; make or fetch it again")
    pool, spatial = (_statistics(path, arrays, suffix) for suffix in ("", "_s"))
    return _read_ours(path, arrays, pool, spatial) if "about" in arrays else _read_other(path, arrays, pool, spatial)


def _statistics(path: Path, arrays: dict[str, np.ndarray], suffix: str) -> FeatureStats | None:
    mean, covariance = arrays.get(f"mu{suffix}"), arrays.get(f"sigma{suffix}")
    if mean is None or covariance is None:
        return None
    if covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"{path} has a mean of shape {mean.shape} but a covariance of shape {covariance.shape}; make or fetch it"
            " again"
        )
    return FeatureStats(mean, covariance)


def _read_other(
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
    if pool is not None and pool.mean.shape != (2048,):
        raise ValueError(f"{path} has a mu of shape {pool.mean.shape}; Inception's pool features have shape (2048,)")
    shape = None if images is None else images.shape[1:]
    count = None if images is None or pool is not None else len(images)
    # Spatial features are the ADM suite's. Without them, statistics do not tell which program made them.
    resize: Resize | None = "adm" if spatial is not None else None
    return Reference(pool, spatial, None, images, str(path), count, shape, None, resize)


def _read_ours(
    path: Path, arrays: dict[str, np.ndarray], pool: FeatureStats | None, spatial: FeatureStats | None
) -> Reference:
    try:
        described = json.loads(str(arrays["about"]))
        if described["format"] != FORMAT or pool is None:
            raise ValueError("its format is not supported")
        classifier = None
        if described["features"] == "classifier":
            leaves = [arrays[name] for name in _CLASSIFIER]
            channels, classes = leaves[0].shape[2], leaves[-1].shape[1]
            skeleton = jax.eval_shape(lambda key: Classifier(channels, classes, key=key), jax.random.key(0))
            classifier = jax.tree.unflatten(jax.tree.structure(skeleton), leaves)
            if FeatureNetwork(classifier).checksum != described["checksum"]:
                raise ValueError("its classifier was altered")
        facts = {name: described[name] for name in ("name", "count", "checksum", "resize")}
        shape = tuple(described["image_shape"])
        return Reference(pool, spatial, arrays["rows"], None, image_shape=shape, classifier=classifier, **facts)
    except Exception as error:  # beartype's errors included
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{path} was written by another version of ditx, or is damaged ({cause}); make it again"
        ) from error
