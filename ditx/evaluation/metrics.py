"""Metrics of generated images as functions of their features, as the ADM suite has them (Dhariwal and Nichol 2021).

Features are rows of numbers, as `ditx.nn.inception` gives them, of NumPy or JAX. What is summed over all images is in
float64 and NumPy; the distances between all pairs are in float32 and JAX, on its first device. Every function raises
ValueError for features that are not finite, or of a wrong shape.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Shapes are checked by `_matrix` and others, whose errors are sentences.
Numbers = Float[np.ndarray, "..."] | Float[Array, "..."]

_ROWS = 1024  # whose distances to all other rows are in memory at once: 200 MB for 50,000 in float32


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of features; those of parts of a data set, added, are those of the whole.

    Parts may come in any order, from batches or from processes (Chan et al. 1983, whose update is stable).
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]
    """sum over rows of the outer products of what is left of them without the mean"""

    @classmethod
    def of(cls, features: Numbers) -> "Moments":
        """Those of features (n, d); n may be 0."""
        x = _matrix("features", features)
        count, size = x.shape
        mean = x.mean(0, dtype=np.float64) if count else np.zeros(size)
        scatter = np.zeros((size, size))
        for start in range(0, count, _ROWS):  # so that there is never a copy of all in float64
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


def frechet_distance(mean_a: Numbers, cov_a: Numbers, mean_b: Numbers, cov_b: Numbers) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982), means (d,) and covariances (d, d).

    Of pool features it is the FID (Heusel et al. 2017), of spatial ones sFID (Nash et al. 2021). Covariances may be
    singular: the trace of their product's root is the sum of the singular values of the product of their factors.
    """
    mean_a, factor_a = _gaussian("first", mean_a, cov_a)
    mean_b, factor_b = _gaussian("second", mean_b, cov_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"the first distribution is of {mean_a.size} features, the second of {mean_b.size}; give two of one kind"
        )
    # The squares of these are the eigenvalues of sqrt(A) B sqrt(A), but small ones do not drown in rounding.
    root = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum() if factor_a.size and factor_b.size else 0.0
    spread = np.square(factor_a).sum() + np.square(factor_b).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + spread - 2 * root))


def inception_score(logits: Numbers, split_size: int = 5000) -> float:
    """Inception Score (Salimans et al. 2016) of logits (n, classes): the mean over splits of exp of the mean KL.

    Splits are of successive rows; the last has the rest and counts as much as any, as in the ADM suite.
    """
    x = _matrix("logits", logits)
    if split_size < 1 or not x.size:
        raise ValueError(f"{len(x)} samples of {x.shape[1]} classes in splits of {split_size} give no Inception Score")
    scores = []
    for start in range(0, len(x), split_size):
        part = x[start : start + split_size].astype(np.float64)
        log_p = part - _log_sum_exp(part, axis=1)
        log_marginal = _log_sum_exp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1))))
    return float(np.mean(scores))


class PrecisionRecall(NamedTuple):
    """Fractions of the samples that are near the reference, and of the reference that is near the samples."""

    precision: float
    recall: float


def precision_recall(reference: Numbers, samples: Numbers, k: int = 3, *, half: bool = True) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features (n, d) and (m, d), of any n and m.

    A row is near a set if it is within the distance from any of the set's rows to that row's k-th nearest neighbour.
    The ADM suite rounds features and distances to half precision, unless they are too large for it, and so does this;
    `half=False` leaves them in float32.
    """
    x, y = _matrix("reference", reference), _matrix("samples", samples)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the reference has {x.shape[1]} features, the samples {y.shape[1]}; both must have the same")
    _check_neighbours("reference", x, k)
    _check_neighbours("samples", y, k)
    (x, y), half = _points(x, y, half=half)
    precision = np.asarray(_is_near(y, x, _squared_radii(x, k, half), half)).mean()
    recall = np.asarray(_is_near(x, y, _squared_radii(y, k, half), half)).mean()
    return PrecisionRecall(float(precision), float(recall))


def squared_radii(features: Numbers, k: int = 3, *, half: bool = True) -> Float[np.ndarray, " n"]:
    """Squared distance of each row of features (n, d) to its `k`-th nearest other, as for `precision_recall`."""
    x = _matrix("features", features)
    _check_neighbours("features", x, k)
    (x,), half = _points(x, half=half)
    return np.asarray(_squared_radii(x, k, half))


def _matrix(name: str, array: Numbers) -> np.ndarray:
    x = np.asarray(array)
    if x.ndim != 2:
        raise ValueError(f"{name} have shape {x.shape}; give one row a sample, (n, d)")
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise ValueError(
            f"{name} are not finite in {(~finite).sum()} of {len(x)} rows, first in row {finite.argmin()}; leave those"
            " out, or mend what made them"
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
        raise ValueError(f"the {name} mean or covariance is not finite; compute it anew, without samples that are not")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    # Both are 0 but for rounding, which files in float32 have more of.
    skewness, negative = np.abs(cov - cov.T).max(), -values[0]
    if max(skewness, negative) > 1e-3 * max(values[-1], 0):
        raise ValueError(
            f"the {name} covariance is none: its smallest eigenvalue is {values[0]:.3g}, its largest {values[-1]:.3g},"
            f" and it differs by up to {skewness:.3g} from its transpose"
        )
    kept = values > values[-1] * mean.size * np.finfo(np.float64).eps  # all others are 0 but for rounding
    return mean, vectors[:, kept] * np.sqrt(values[kept])


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    largest = x.max(axis, keepdims=True)
    return largest + np.log(np.exp(x - largest).sum(axis, keepdims=True))


def _check_neighbours(name: str, x: np.ndarray, k: int) -> None:
    if not 1 <= k < len(x):
        raise ValueError(
            f"{name} have {len(x)} rows; a neighbour of rank {k} needs at least {max(k, 1) + 1}, and rank 1"
        )


def _points(*sets: np.ndarray, half: bool) -> tuple[list[Float[Array, "n d"]], bool]:
    """Sets in float32, ready for distances, and whether these are to be rounded to half precision."""
    with np.errstate(over="ignore"):
        largest = max(float(np.square(x, dtype=np.float32).sum(1).max()) for x in sets)
    if half and 4 * largest < float(np.finfo(np.float16).max):  # a bound of all distances
        return [jnp.asarray(x.astype(np.float16), jnp.float32) for x in sets], True
    # Moved so that squares are small, since distances are their differences.
    centre = sets[0].mean(0, dtype=np.float64)
    return [jnp.asarray(x - centre, jnp.float32) for x in sets], False


def _rounded(x: Float[Array, "..."], half: bool) -> Float[Array, "..."]:
    return jax.lax.reduce_precision(x, 5, 10) if half else x  # A cast there and back may be optimised away.


def _squared_distances(
    point: Float[Array, " d"], x: Float[Array, "n d"], squares: Float[Array, " n"], half: bool
) -> Float[Array, " n"]:
    """From a point to all rows, whose sums of squares are given, so that most of it is a matrix product."""
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
