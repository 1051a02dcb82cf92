"""Metrics of generated images as functions of their features, equal to the ADM suite's (Dhariwal and Nichol 2021).

Features are arrays of NumPy or JAX with one row an image, as `ditx.nn.inception` returns them. Sums over images are
float64 in NumPy; distances between pairs are float32 in JAX, on its first device. Every function raises ValueError for
features that are not finite or have a wrong shape.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The functions check shapes themselves, so that their errors are sentences.
Numbers = Float[np.ndarray, "..."] | Float[Array, "..."]

_ROWS = 1024  # rows whose distances to all others are in memory at once: 200 MB for 50,000 in float32


class FeatureStats(NamedTuple):
    """Mean and covariance of features."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter matrix of features; the moments of parts of a data set add up to those of the whole.

    The parts may come in any order. The update is stable (Chan et al. 1983).
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]
    """sum over rows of the outer products of their deviations from the mean"""

    @classmethod
    def of(cls, features: Numbers) -> "Moments":
        """Moments of features (n, d); n may be 0."""
        x = _matrix("features", features)
        count, size = x.shape
        mean = x.mean(0, dtype=np.float64) if count else np.zeros(size)
        scatter = np.zeros((size, size))
        for start in range(0, count, _ROWS):  # never copies all rows to float64
            centred = x[start : start + _ROWS] - mean
            scatter += centred.T @ centred
        return cls(count, mean, scatter)

    def __add__(self, other: "Moments") -> "Moments":
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {self.mean.size} and of {other.mean.size} features cannot be added")
        count = self.count + other.count
        difference = other.mean - self.mean
        share = other.count / max(count, 1)
        between = self.count * share * np.outer(difference, difference)
        return Moments(count, self.mean + share * difference, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance. Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, and there are {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def stats(self) -> FeatureStats:
        """Mean and covariance. Raises ValueError for fewer than 2 samples."""
        return FeatureStats(self.mean, self.covariance)


def frechet_distance(mean_a: Numbers, cov_a: Numbers, mean_b: Numbers, cov_b: Numbers) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982), means (d,) and covariances (d, d).

    For pool features it is FID (Heusel et al. 2017), for spatial features sFID (Nash et al. 2021). Covariances may be
    singular: the trace of their product's root is the sum of the singular values of the product of their factors.
    """
    mean_a, factor_a = _gaussian("first", mean_a, cov_a)
    mean_b, factor_b = _gaussian("second", mean_b, cov_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"the first distribution is of {mean_a.size} features, the second of {mean_b.size}; both must have the same"
        )
    # Their squares are the eigenvalues of sqrt(A) B sqrt(A), but small ones are not lost to rounding.
    root = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum() if factor_a.size and factor_b.size else 0.0
    spread = np.square(factor_a).sum() + np.square(factor_b).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + spread - 2 * root))


def inception_score(logits: Numbers, split_size: int = 5000) -> float:
    """Inception Score (Salimans et al. 2016) of logits (n, classes): the mean over splits of exp of the mean KL.

    Splits are consecutive rows, so shuffle rows that are sorted. The last split, which may be shorter, has the same
    weight as the others, as in the ADM suite.
    """
    x = _matrix("logits", logits)
    if split_size < 1 or not x.size:
        raise ValueError(f"{len(x)} samples of {x.shape[1]} classes in splits of {split_size} give no Inception Score")
    scores = []
    for start in range(0, len(x), split_size):
        part = x[start : start + split_size].astype(np.float64)
        part -= part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        marginal = p.mean(0)
        log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))  # 0 log 0 is 0
        scores.append(np.exp((p * log_p).sum(1).mean() - marginal @ log_marginal))
    return float(np.mean(scores))


class PrecisionRecall(NamedTuple):
    """Fraction of the samples near the reference, and of the reference near the samples."""

    precision: float
    recall: float


def precision_recall(reference: Numbers, samples: Numbers, k: int = 3, *, half: bool = True) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features (n, d) and (m, d), of any n and m.

    A row is near a set if it is closer to some row of the set than this row's k-th nearest neighbour in the set. Like
    the ADM suite, this rounds features and distances to half precision unless they are too large; `half=False` keeps
    float32.
    """
    (x, y), half = _points({"reference": reference, "samples": samples}, k, half)
    precision = np.asarray(_is_near(y, x, _squared_radii(x, k, half), half)).mean()
    recall = np.asarray(_is_near(x, y, _squared_radii(y, k, half), half)).mean()
    return PrecisionRecall(float(precision), float(recall))


def squared_radii(features: Numbers, k: int = 3, *, half: bool = True) -> Float[np.ndarray, " n"]:
    """Squared distance of each row of features (n, d) to its k-th nearest other row, as in `precision_recall`."""
    (x,), half = _points({"features": features}, k, half)
    return np.asarray(_squared_radii(x, k, half))


def _matrix(name: str, array: Numbers) -> np.ndarray:
    x = np.asarray(array)
    if x.ndim != 2:
        raise ValueError(f"{name} have shape {x.shape}; give one row a sample, (n, d)")
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise ValueError(
            f"{name} are not finite in {(~finite).sum()} of {len(x)} rows, first in row {finite.argmin()}; leave these"
            " rows out"
        )
    return x


def _gaussian(name: str, mean: Numbers, cov: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """The mean and a factor F of the covariance F F^T, (d, rank), in float64."""
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != 2 * mean.shape or not mean.size:
        raise ValueError(
            f"the {name} mean and covariance have shapes {mean.shape} and {cov.shape}, not (d,) and (d, d)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"the {name} mean or covariance is not finite; compute it from finite features")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    # Both are 0 up to rounding, which is larger in files of float32.
    skewness, negative = np.abs(cov - cov.T).max(), -values[0]
    if max(skewness, negative) > 1e-3 * max(values[-1], 0):
        raise ValueError(
            f"the {name} covariance is not a covariance: its smallest eigenvalue is {values[0]:.3g}, its largest"
            f" {values[-1]:.3g}, and it differs by up to {skewness:.3g} from its transpose"
        )
    kept = values > values[-1] * mean.size * np.finfo(np.float64).eps  # the others are rounding errors
    return mean, vectors[:, kept] * np.sqrt(values[kept])


def _points(sets: dict[str, Numbers], k: int, half: bool) -> tuple[list[Float[Array, "n d"]], bool]:
    """Checked sets in float32, ready for distances, and whether to round distances to half precision."""
    arrays = [_matrix(name, array) for name, array in sets.items()]
    if len({x.shape[1] for x in arrays}) > 1:
        raise ValueError(
            f"the {' and the '.join(sets)} have {[x.shape[1] for x in arrays]} features; give equally many"
        )
    for name, x in zip(sets, arrays, strict=True):
        if not 1 <= k < len(x):
            raise ValueError(
                f"{name} have {len(x)} rows; neighbour {k} needs at least {max(k, 1) + 1}, and counts from 1"
            )
    with np.errstate(over="ignore"):
        largest = max(float(np.square(x, dtype=np.float32).sum(1).max()) for x in arrays)
    if half and 4 * largest < float(np.finfo(np.float16).max):  # a bound of all distances
        return [jnp.asarray(x.astype(np.float16), jnp.float32) for x in arrays], True
    # Centred, so that squares are small: distances are their differences.
    centre = arrays[0].mean(0, dtype=np.float64)
    return [jnp.asarray(x - centre, jnp.float32) for x in arrays], False


def _rounded(x: Float[Array, "..."], half: bool) -> Float[Array, "..."]:
    return jax.lax.reduce_precision(x, 5, 10) if half else x  # XLA may remove casts to half and back.


def _squared_distances(
    point: Float[Array, " d"], x: Float[Array, "n d"], squares: Float[Array, " n"], half: bool
) -> Float[Array, " n"]:
    """Squared distances from a point to rows with known sums of squares: mostly a matrix product."""
    products = _rounded(jnp.matmul(x, point, precision=jax.lax.Precision.HIGHEST), half)
    square = _rounded(jnp.square(point).sum(), half)
    return jnp.maximum(_rounded(_rounded(square - 2 * products, half) + squares, half), 0)


@partial(jax.jit, static_argnames=("k", "half"))
def _squared_radii(x: Float[Array, "n d"], k: int, half: bool) -> Float[Array, " n"]:
    squares = _rounded(jnp.square(x).sum(1), half)

    def radius(i: Int[Array, ""]) -> Float[Array, ""]:
        distances = _squared_distances(x[i], x, squares, half).at[i].set(jnp.inf)
        for _ in range(k - 1):  # On CPUs, top_k takes ten times as long.
            distances = distances.at[distances.argmin()].set(jnp.inf)
        return distances.min()

    return jax.lax.map(radius, jnp.arange(len(x)), batch_size=_ROWS)


@partial(jax.jit, static_argnames="half")
def _is_near(
    points: Float[Array, "m d"], x: Float[Array, "n d"], radii: Float[Array, " n"], half: bool
) -> Bool[Array, " m"]:
    """Whether each point is within the squared radius of any row of `x`."""
    squares = _rounded(jnp.square(x).sum(1), half)

    def near(point: Float[Array, " d"]) -> Bool[Array, ""]:
        return (_squared_distances(point, x, squares, half) <= radii).any()

    return jax.lax.map(near, points, batch_size=_ROWS)
