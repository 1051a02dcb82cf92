"""The metrics of a network's samples against a reference, without images on disk, on all devices."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32, UInt8

from ditx.data.image_files import to_uint8
from ditx.data.sources import with_channels
from ditx.diffusion.objective import ObjectiveConfig
from ditx.evaluation import metrics
from ditx.evaluation.features import FeatureNetwork, FeatureStore, make_feature_extractor
from ditx.evaluation.reference import Gaussian, Reference
from ditx.nn.dit import DiT, DiTConfig
from ditx.parallel.compile import compiler_options
from ditx.parallel.mesh import data_parallel_size, replicated
from ditx.sampling import Decode, SamplingConfig, make_draw, on_mesh, sample_keys

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


Images = Callable[[DiT, int], UInt8[np.ndarray, "b h w c"]]


def make_images(
    sampling: SamplingConfig,
    model: DiTConfig,
    objective: ObjectiveConfig,
    decode: Decode | None,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    balanced: bool = False,
    unroll: int = 1,
) -> Images:
    """The function from weights, laid on the mesh, and the number of the first to a batch of samples as uint8.

    The batch is rounded up for the devices to share it; a sample depends on the seed and its own number alone. Raises
    ValueError where samples are not finite.
    """
    batch = -(-batch_size // data_parallel_size(mesh)) * data_parallel_size(mesh)
    draw, params = on_mesh(make_draw(sampling, model, objective, unroll=unroll), mesh), sampling.params(objective)

    @partial(jax.jit, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))
    def compiled(network, labels, seed, first, params):
        return draw(network, labels, sample_keys(seed, first, batch), params=params)[0]

    def images(network, first):
        labels = draw_labels(model.num_classes, first + batch, seed, balanced=balanced)[first:]
        samples = compiled(network, labels, np.uint32(seed), np.int32(first), params)
        samples = np.asarray(decode(samples) if decode else samples)
        if not np.isfinite(samples).all():
            raise ValueError(
                "samples are not finite numbers; try --dtype float32, a lower --guidance-scale, or more steps"
            )
        return to_uint8(samples)

    return images


def make_fid(
    images: Images, features: FeatureNetwork, reference: Reference, mesh: Mesh, num: int
) -> Callable[[DiT], float]:
    """The function from weights, laid on the mesh, to the FID of their first `num` samples."""
    extract = make_feature_extractor(features, mesh)

    def fid(network):
        gathered = FeatureStore()
        while gathered.count < num:
            batch = images(network, gathered.count)[: num - gathered.count]
            gathered.add(extract(with_channels(batch, features.channels)))
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
