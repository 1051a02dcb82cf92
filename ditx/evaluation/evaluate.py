"""The metrics of a network's samples against a reference, without images on disk, on all devices."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from ditx.evaluation import metrics
from ditx.evaluation.features import FeatureNetwork, FeatureStore, make_feature_extractor, with_channels
from ditx.evaluation.reference import Gaussian, Reference
from ditx.nn.dit import DiT
from ditx.sampling import Sampler

Metric = Literal["fid", "sfid", "inception-score", "precision-recall"]
METRICS: tuple[Metric, ...] = ("fid", "sfid", "inception-score", "precision-recall")
NEIGHBOUR = 3  # whose distance is the radius of precision and recall


def draw_labels(num_classes: int, num: int, seed: int, *, balanced: bool = False) -> Int32[np.ndarray, " num"]:
    """Labels uniform at random, the paper's protocol, or class by class in turn; the first are the same for any `num`.

    A network without labels is given its one label, the null label.
    """
    if balanced or num_classes == 0:
        return (np.arange(num) % max(num_classes, 1)).astype(np.int32)
    return np.random.default_rng((seed, 0)).integers(num_classes, size=num).astype(np.int32)


def make_fid(
    sampler: Sampler,
    labels: Int32[np.ndarray, " num"],
    seed: int,
    features: FeatureNetwork,
    reference: Reference,
    mesh: Mesh,
) -> Callable[[DiT], float]:
    """The function from weights, laid on the mesh, to the FID of their samples, one per label."""
    extract = make_feature_extractor(features, mesh)

    def fid(network):
        gathered = FeatureStore()
        for images in sampler.batches(network, labels, seed=seed):
            gathered.add(extract(with_channels(images, features.channels)))
        return compute_metrics(gathered, features, reference, ("fid",))[0]["fid"]

    return fid


def compute_metrics(
    gathered: FeatureStore, features: FeatureNetwork, reference: Reference, wanted: tuple[Metric, ...] = METRICS
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics of the samples gathered, and why others cannot be had.

    Raises ValueError for fewer than 2 samples, and for features that are not finite.
    """
    found: dict[str, float] = {}
    absent: dict[str, str] = {}
    pool, spatial = gathered.moments()
    if "fid" in wanted and reference.pool is not None:
        found["fid"] = metrics.frechet_distance(*Gaussian.of(pool), *reference.pool)
    if "sfid" in wanted:
        if spatial is None:
            absent["sfid"] = "the network has no spatial features"
        elif reference.spatial is None:
            absent["sfid"] = "the reference has no mu_s and sigma_s"
        else:
            found["sfid"] = metrics.frechet_distance(*Gaussian.of(spatial), *reference.spatial)
    if "inception-score" in wanted:
        logits = features.logits(gathered.pool)
        if logits is None:
            absent["inception_score"] = "the file of Inception's weights has no logits layer"
        else:
            found["inception_score"] = metrics.inception_score(logits)
    if "precision-recall" in wanted:
        fewest = min(gathered.count, 0 if reference.rows is None else len(reference.rows))
        if reference.rows is None:
            absent |= dict.fromkeys(("precision", "recall"), "the reference has no images (arr_0)")
        elif fewest <= NEIGHBOUR:
            absent |= dict.fromkeys(("precision", "recall"), f"{fewest} images have no neighbour of rank {NEIGHBOUR}")
        else:
            found |= metrics.precision_recall(reference.rows, gathered.pool, NEIGHBOUR)._asdict()
    return found, absent
