"""The metrics of a network's samples against a reference; samples stay in memory and use all devices."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from ditx.checks import check_choice, check_names
from ditx.cli import at_least, check_seed
from ditx.evaluation import metrics
from ditx.evaluation.features import FeatureNetwork, FeatureStore
from ditx.evaluation.reference import Reference
from ditx.files import checksum_arrays
from ditx.parallel.compile import Dtype, resolve_dtype
from ditx.parallel.distributed import broadcast_from_main
from ditx.parallel.mesh import check_mesh
from ditx.sampling import SamplingConfig, make_decode, make_sampler
from ditx.training import checkpoint
from ditx.weights import pretrained
from ditx.weights.frozen import load_decoder
from ditx.weights.pretrained import Description

Metric = Literal["fid", "sfid", "inception-score", "precision-recall"]
METRICS: tuple[Metric, ...] = get_args(Metric)
NEIGHBOUR = 3  # its distance is the radius of precision and recall


@dataclass(frozen=True)
class GenerationConfig:
    """The samples to evaluate: how many, from which weights, and how they are drawn."""

    num_samples: int = 50_000
    """samples to draw"""
    balanced: bool = False
    """draw every class equally often instead of labels uniform at random, the paper's protocol"""
    step: int = 0
    """checkpoint of a run, by its step; 0 is the newest"""
    weights: Literal["ema", "live"] = "ema"
    """of a run: the averaged weights, or the live ones that training updates"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vae: str = ""
    """decoder of latents: ft-ema, ft-mse, original, or a path; default from the run"""
    seed: int = 0
    """seed of the samples, or of a classifier's training; sample k depends on the seed and k only"""
    dtype: Dtype = "float32"
    """dtype of the network; auto is float32 on CPUs and bfloat16, which is faster, elsewhere"""
    unroll: int = 1
    """blocks compiled in a row; all of them are about 5 % faster on a GPU and slow to compile"""
    batch: int = 128
    """samples drawn, or images read, at a time; only memory and speed depend on it"""
    decode_batch: int = 4
    """latents decoded at a time on each device"""

    def check(self) -> None:
        """Raise ValueError for impossible values."""
        if self.num_samples < 2:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 2, since a covariance needs 2")
        check_names(self)
        at_least(self, 1, "batch", "decode_batch", "unroll")
        at_least(self, 0, "step")
        check_seed(self.seed)


@dataclass(frozen=True)
class Samples:
    """The samples to evaluate, none of them read or drawn yet."""

    fingerprint: dict[str, Any]
    """identifies the samples, except for their number and place"""
    count: int
    image_shape: tuple[int, ...]
    batches: Callable[[int], Iterator[np.ndarray]]
    """`batches(start)`: the images from number `start` on"""


def draw_labels(num_classes: int, num: int, seed: int, *, balanced: bool = False) -> Int32[np.ndarray, " num"]:
    """Labels uniform at random, the paper's protocol, or each class in turn. The first labels are equal for any `num`.

    A network without labels gets its null label, 0.
    """
    if balanced or num_classes == 0:
        return (np.arange(num) % max(num_classes, 1)).astype(np.int32)
    return np.random.default_rng((seed, 0)).integers(num_classes, size=num).astype(np.int32)


def generate_samples(source: Path, described: Description, config: GenerationConfig, mesh: Mesh) -> Samples:
    """Samples of a run or of weights. Raises ValueError for impossible settings."""
    model, objective, dtype = described.model, described.objective, resolve_dtype(config.dtype)
    config.sampling.check(model, objective)
    check_mesh(mesh, num_heads=model.num_heads, mlp_size=model.mlp_size)
    step, weights = _identify(source, config.step, config.weights)
    vae, vae_name = load_decoder(config.vae, model.in_channels, described.latent_scale)
    side = model.side * (vae.config.downsampling if vae else 1)
    fingerprint = {
        "step": step,
        "weights": weights if config.weights == "ema" else f"{weights}, live",
        "vae": vae_name,
        "seed": config.seed,
        "labels": "balanced" if config.balanced else "uniform at random",
        "dtype": dtype,
        **json.loads(json.dumps(asdict(config.sampling.resolved(objective)))),  # with lists for tuples, as it is stored
    }

    def batches(start):
        network, _ = pretrained.load_on_mesh(source, described, mesh, dtype, step=step, weights=config.weights)
        decode = make_decode(vae, mesh, config.decode_batch)
        batch = min(config.batch, config.num_samples)
        options: Any = {"batch_size": batch, "decode": decode, "unroll": config.unroll}
        sampler = make_sampler(config.sampling, model, objective, mesh, **options)
        labels = draw_labels(model.num_classes, config.num_samples, config.seed, balanced=config.balanced)
        return sampler.batches(network, labels[start:], seed=config.seed, first=start)

    return Samples(fingerprint, config.num_samples, (side, side, 3 if vae else model.in_channels), batches)


def compute_metrics(
    store: FeatureStore, features: FeatureNetwork, reference: Reference, names: tuple[Metric, ...] = METRICS
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics of the samples in a store, and the reasons why others are missing.

    The Inception Score is of the samples in a fixed random order, because its splits need all classes. Raises
    ValueError for fewer than 2 samples or features that are not finite.
    """
    for name in names:
        check_choice("metric", name, METRICS)
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    pool, spatial = store.moments()
    if "fid" in names and reference.pool is not None:
        values["fid"] = metrics.frechet_distance(*pool.stats, *reference.pool)
    if "sfid" in names:
        if spatial is None:
            missing["sfid"] = "the network has no spatial features"
        elif reference.spatial is None:
            missing["sfid"] = "the reference has no mu_s and sigma_s"
        else:
            values["sfid"] = metrics.frechet_distance(*spatial.stats, *reference.spatial)
    if "inception-score" in names:
        logits = features.logits(store.pool)
        if logits is None:
            missing["inception_score"] = "the file of Inception's weights has no logits layer"
        else:
            values["inception_score"] = metrics.inception_score(np.random.default_rng(0).permutation(logits))
    if "precision-recall" in names:
        smaller = min(store.count, 0 if reference.rows is None else len(reference.rows))
        if smaller > NEIGHBOUR and reference.rows is not None:
            values |= metrics.precision_recall(reference.rows, store.pool, NEIGHBOUR)._asdict()
        else:
            reason = f"{smaller} images have no {NEIGHBOUR} neighbours each"
            reason = "the reference has no images (arr_0)" if reference.rows is None else reason
            missing |= dict.fromkeys(("precision", "recall"), reason)
    return values, missing


def _identify(source: Path, step: int, weights: str) -> tuple[int, str]:
    """The step of a run's checkpoint (0 for a file of weights), and a checksum of the weights."""
    if pretrained.is_run(source):
        folder = source / "checkpoints"
        steps = checkpoint.steps(folder)
        if not steps:
            raise ValueError(f"{source} has no checkpoint yet; wait until training writes the first")
        if step not in (0, *steps):
            raise ValueError(f"{source} has no checkpoint of step {step:,}; choose from {', '.join(map(str, steps))}")
        step = broadcast_from_main(step or steps[-1])
        manifest = json.loads((folder / str(step) / checkpoint.MANIFEST).read_text())
        return step, checksum_arrays([np.frombuffer(json.dumps(manifest["files"]).encode(), np.uint8)])
    if step or weights == "live":
        raise ValueError(
            f"{source} is not a run, so it has no steps and no live weights; leave --step and --weights out"
        )
    tensors = pretrained.open_weights(source)[0].tensors
    return 0, checksum_arrays(tensor for _, tensor in sorted(tensors.items()))
