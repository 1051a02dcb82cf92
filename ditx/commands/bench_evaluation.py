"""What `ditx bench` times of an evaluation: features of images by Inception, and the metrics of features."""

import time
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from ditx.commands.bench_work import Timing, intervals, memory_checked
from ditx.evaluation.evaluate import METRICS, NEIGHBOUR, Metric, compute_metrics
from ditx.evaluation.features import FeatureNetwork, Features, FeatureStore, make_feature_extractor
from ditx.evaluation.reference import Reference
from ditx.nn.inception import Inception
from ditx.parallel.mesh import MeshConfig, data_parallel_size, make_mesh


@dataclass(frozen=True)
class Evaluate:
    """Features of random images by Inception, of random weights, and the metrics of random features."""

    size: int = 256
    """side of the images in pixels"""
    batch_size: int = 64
    """images on each device at a time"""
    count: int = 10_000
    """features of samples that metrics are of, and as many of the reference"""
    metrics: tuple[Metric, ...] = METRICS
    """what to compute of them, once each after once that is not timed"""
    repeats: int = 10
    """batches of images that are timed, after two that are not"""
    json: bool = False
    """print JSON, for programs"""


def evaluate(config: Evaluate) -> dict[str, Timing]:
    """Time what ditx evaluate does with samples once they are drawn. Raises ValueError for too few of them."""
    if config.count <= NEIGHBOUR:
        raise ValueError(f"count is {config.count}; the metrics need at least {NEIGHBOUR + 1}")
    features = FeatureNetwork(jax.jit(lambda key: Inception(key=key))(jax.random.key(0)))
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    extract = make_feature_extractor(features, mesh, config.batch_size)
    shape = (config.batch_size * data_parallel_size(mesh), config.size, config.size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    with memory_checked():
        timings = {"features": Timing(intervals(lambda: extract(images), config.repeats), len(images))}
        sizes = [found.shape[1] for found in extract(images[:1]) if found is not None]

    def gather():
        gathered = FeatureStore()
        for first in range(0, config.count, len(images)):
            shapes = [(min(len(images), config.count - first), size) for size in sizes]
            # As Inception's are: not negative, and about so large.
            gathered.add(Features(*(np.abs(rng.normal(0, 0.5, shape)).astype(np.float32) for shape in shapes)))
        return gathered

    def timed(function):
        began = time.perf_counter()
        function()
        return Timing([time.perf_counter() - began], config.count)

    reference, samples = Reference.of(gather(), features, "random", images.shape[1:]), gather()
    timings["moments"] = timed(samples.moments)
    for metric in config.metrics:
        compute = partial(compute_metrics, samples, features, reference, (metric,))
        compute()
        timings[metric] = timed(compute)
    return timings
