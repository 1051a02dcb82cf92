"""`ditx evaluate SOURCE REFERENCE`: FID and related metrics of a run, weights or images, or a new reference."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jax.sharding import Mesh

from ditx.cli import Progress, at_least, parse_with_defaults
from ditx.data.loader import images_in_order
from ditx.data.sources import open_images
from ditx.evaluation.classifier import train_classifier
from ditx.evaluation.evaluate import METRICS, GenerationConfig, Metric, Samples, compute_metrics, generate_samples
from ditx.evaluation.features import FeatureName, FeatureNetwork, FeatureStore, make_feature_extractor
from ditx.evaluation.reference import POOL_ROWS, Reference, read_reference
from ditx.files import checksum, checksum_arrays, lock, read_npz
from ditx.nn.inception import Resize
from ditx.parallel.distributed import DistributedConfig, broadcast_from_main, initialize, is_main_process, sync_errors
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import run as runs
from ditx.weights import hub, pretrained
from ditx.weights.frozen import load_inception
from ditx.weights.pretrained import Description

RESULTS = "evaluations.jsonl"
_FEW = 10_000
_TITLES = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score"}


@dataclass(frozen=True)
class Config:
    """The samples to evaluate and the reference. Sampler and steps default to those of the run's own pictures.

    Guidance is off unless given, as in the paper's tables. Run the same command again to resume.
    """

    source: tyro.conf.Positional[str] = ""
    """a run (default: the newest), weights, a folder of images, an .npz of images, or digits (the embedded ones)"""
    reference: tyro.conf.Positional[str] = ""
    """statistics that --make-stats wrote, or a reference .npz of the ADM suite"""
    make_stats: str = ""
    """write the statistics of SOURCE, a data set, to this .npz, to use as a reference"""
    features: FeatureName = "inception"
    """with --make-stats: inception, the standard, or a small classifier trained on that data, for digits"""
    inception: str = ""
    """file of the Inception weights; default: pytorch-fid's, downloaded once"""
    resize: Resize | None = None
    """how Inception resizes images: as the ADM suite (adm) or as pytorch-fid; default: as the reference records"""
    size: int = 0
    """crop the images of a folder to this side; 0 requires that all have one size"""
    metrics: tuple[Metric, ...] = METRICS
    """metrics to compute"""
    generation: tyro.conf.OmitArgPrefixes[GenerationConfig] = field(default_factory=GenerationConfig)
    feature_batch: int = 64
    """images per device in a batch of the feature network"""
    out: str = ""
    """folder of results and unfinished work; default: the run's, or samples/NAME for weights"""
    json: bool = False
    """print JSON, for programs"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def check(self) -> None:
        """Raise ValueError for impossible values."""
        self.generation.check()
        at_least(self, 1, "feature_batch")
        at_least(self, 0, "size")
        if not self.metrics:
            raise ValueError(f"metrics is empty; choose from {', '.join(METRICS)}")

    def report(self, sentence: str) -> None:
        """Print progress, apart from JSON."""
        print(sentence, file=sys.stderr if self.json else sys.stdout, flush=True)


def main(argv: list[str]) -> int:
    """Evaluate, or make a reference; returns the exit code."""
    config, described = parse(argv)
    config.check()
    if config.make_stats:
        make_statistics(config)
        return 0
    result = evaluate(config, described)
    if is_main_process():
        print(json.dumps(result, indent=2) if config.json else table(result))
    return 0


def parse(argv: list[str]) -> tuple[Config, Description | None]:
    """The configuration and, if there is a network to sample, its description. Exits with 2 on a bad flag."""

    def defaults(first: Config) -> tuple[Config | None, Description | None]:
        initialize(first.distributed)
        source = first.source or ("" if first.make_stats else str(runs.newest_run(Path("runs"))))
        if first.make_stats or not _has_weights(Path(source)):
            return None, None
        described = pretrained.describe(Path(source))
        sampling = replace(described.sampling, guidance_scale=1.0)
        return Config(source=source, generation=GenerationConfig(sampling=sampling, vae=described.vae)), described

    description = "FID, sFID, Inception Score, precision and recall of samples or images."
    parse = partial(tyro.cli, Config, args=argv, prog="ditx evaluate", description=description)
    return parse_with_defaults(parse, defaults)


def _has_weights(source: Path) -> bool:
    if source.is_dir():
        return pretrained.is_run(source) or any(source.glob("**/diffusion_pytorch_model.*"))
    return source.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors") or hub.is_name(source)


def make_statistics(config: Config) -> None:
    """Write the reference statistics of a data set."""
    out = Path(config.make_stats)
    if not config.source:
        raise ValueError(f"--make-stats {out} needs a source; give a folder of images, an .npz, CIFAR-10, or digits")
    if _has_weights(Path(config.source)):
        raise ValueError(f"{config.source} is a network, not a data set; statistics are made from images")
    if out.suffix != ".npz" or out.exists():
        raise ValueError(f"--make-stats is {out}; give the name of a new file that ends in .npz")
    if Path(config.source).suffix == ".npz" and "mu" in read_npz(Path(config.source), ("mu",)):
        raise ValueError(f"{config.source} already has statistics; give it as the REFERENCE of an evaluation")
    mesh = make_mesh(config.mesh)
    source = open_images(config.source, config.size)
    print(f"images   {len(source):,} of {_shape(source.image_shape)}, {config.source}", flush=True)
    if config.features == "classifier":
        chosen = _spread(len(source), 50_000)
        images = np.stack([source[int(n)]["image"] for n in chosen])
        seed, num_classes = config.generation.seed, len(source.class_names)
        network, accuracy = train_classifier(images, source.labels[chosen], num_classes, seed)
        features, note = FeatureNetwork(network), "a classifier trained on these images"
        note = f"{note}, accuracy {accuracy:.1%} on a held-out tenth"
    else:
        network, note = load_inception(config.inception)
        features = FeatureNetwork(network, config.resize or "adm")
        note = f"Inception, {note}, resize {features.resize}"
    print(f"features {note}", flush=True)
    kept = np.zeros(len(source), bool)
    kept[_spread(len(source), POOL_ROWS)] = True
    store = FeatureStore(kept=kept)
    extract_features(images_in_order(source, 0, config.generation.batch), store, features, config, mesh, len(source))
    reference = Reference.of(store, features, config.source, source.image_shape)
    with sync_errors():
        if is_main_process():
            reference.write(out)
            print(f"wrote    {out}")


def extract_features(
    batches: Iterator[np.ndarray], store: FeatureStore, features: FeatureNetwork, config: Config, mesh: Mesh, total: int
) -> None:
    """Add the features of the next images to the main process's store, until it has `total`."""
    extract = make_feature_extractor(features, mesh, config.feature_batch)
    progress = Progress(store.count, total) if is_main_process() and not config.json else None
    count, is_grey = broadcast_from_main(store.count), False
    while count < total:
        with sync_errors():
            images = next(batches)[: total - count]
            if not is_grey and features.channels == 3 and (images == images[..., :1]).all():
                is_grey = True
                print("note: grey images are repeated to 3 channels", file=sys.stderr)
        batch = extract(images)
        with sync_errors():
            if is_main_process():
                store.add(batch)
        count += len(images)
        if progress:
            progress.add(len(images))
    if progress:
        progress.close()


def evaluate(config: Config, described: Description | None) -> dict[str, Any]:
    """The metrics and how they were measured, as stored and printed; empty in all processes but the main one."""
    if not config.reference:
        raise ValueError(
            "there is no reference; make statistics with: ditx evaluate --make-stats OUT DATA, and give OUT"
        )
    mesh, reference = make_mesh(config.mesh), read_reference(Path(config.reference))
    features, note = reference.load_features(config.inception, config.resize)
    if note:
        config.report(f"features Inception, {note}, resize {features.resize}")
    source, folder = Path(config.source), Path(config.out) if config.out else None
    if described:
        samples = generate_samples(source, described, config.generation, mesh)
        folder = folder or (source if pretrained.is_run(source) else Path("samples") / source.stem)
    else:
        samples = images_on_disk(config)
    if samples.count < 2:
        raise ValueError(f"{config.source} has {samples.count} images; a covariance needs at least 2")
    reference.check(features, samples.image_shape)
    result = {
        "source": config.source,
        "samples": samples.fingerprint,
        "count": samples.count,
        "features": {"name": features.name, "checksum": features.checksum, "resize": features.resize},
        "reference": {"file": config.reference, "checksum": checksum(config.reference)},
        "wanted": list(config.metrics),
    }
    stored = _stored(folder, result) if is_main_process() else None
    if broadcast_from_main(stored is not None):
        return stored or {}
    with ExitStack() as stack:
        unfinished = None
        if folder and is_main_process():
            key = np.frombuffer(json.dumps([result["samples"], result["features"]]).encode(), np.uint8)
            unfinished = folder / f"evaluation-{checksum_arrays([key])}"
            unfinished.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(unfinished / "lock", f"another process runs the same evaluation in {folder}"))
        reference = _with_features(reference, features, config, mesh)
        store = FeatureStore(unfinished, samples.count)
        start = broadcast_from_main(store.count)
        resumed = f", resuming at {start:,}" if start else ""
        config.report(f"samples  {samples.count:,} of {_shape(samples.image_shape)}{resumed}")
        extract_features(samples.batches(start), store, features, config, mesh, samples.count)
        if not is_main_process():
            return {}
        result["metrics"], result["absent"] = compute_metrics(store, features, reference, config.metrics)
        result["reference"] |= {name: getattr(reference, name) for name in ("name", "count", "resize")}
        if folder and unfinished:
            with (folder / RESULTS).open("a") as file:
                file.write(json.dumps(result) + "\n")
            shutil.rmtree(unfinished)
    return result


def _with_features(reference: Reference, features: FeatureNetwork, config: Config, mesh: Mesh) -> Reference:
    """The reference with the features of its images, if the metrics need them."""
    images, batch = reference.images, config.generation.batch
    if images is None or (reference.pool is not None and "precision-recall" not in config.metrics):
        return reference
    config.report(f"reads    {len(images):,} images of the reference")
    store = FeatureStore()
    parts = (images[first : first + batch] for first in range(0, len(images), batch))
    extract_features(parts, store, features, config, mesh, len(images))
    return reference.with_images(store)


def _stored(folder: Path | None, result: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result of the same evaluation, if there is one."""
    for line in runs.read_lines(folder / RESULTS) if folder else []:
        if all(line.get(name) == result[name] for name in ("samples", "count", "features", "wanted")) and (
            line["reference"]["checksum"] == result["reference"]["checksum"]
        ):
            return line
    return None


def images_on_disk(config: Config) -> Samples:
    """The images of a data set, a folder or a file."""
    source = open_images(config.source, config.size)
    if replace(config.generation, batch=GenerationConfig().batch) != GenerationConfig():
        raise ValueError(f"{config.source} has images, all of which are evaluated; leave out the flags of sampling")
    fingerprint = {"checksum": f"{source.checksum:08x}", "size": config.size}

    def batches(start):
        return images_in_order(source, start, config.generation.batch)

    return Samples(fingerprint, len(source), source.image_shape, batches)


def table(result: dict[str, Any]) -> str:
    """The metrics and their protocol, for people."""
    samples, features, reference = result["samples"], result["features"], result["reference"]
    lines = [("samples", f"{result['count']:,} of {result['source']}")]
    if "weights" in samples:
        step = f" at step {samples['step']:,}" if samples["step"] else ""
        lines = [("samples", f"{lines[0][1]}{step}, labels {samples['labels']}, seed {samples['seed']}")]
        channels = "" if samples["guidance_scale"] == 1 else f" on {samples['guidance_channels'] or 'all'} channels"
        sampler = f"{samples['sampler']} in {samples['steps']} steps, guidance {samples['guidance_scale']}{channels}"
        decoder = f", decoded by {samples['vae']}" if samples["vae"] else ""
        lines.append(("sampler", f"{sampler}, computing in {samples['dtype']}{decoder}"))
    count = f"{reference['count']:,} images" if reference["count"] else "an unknown number of images"
    lines.append(("reference", f"{reference['file']}: {count}, from {reference['name']}"))
    name = f"Inception (CRC-32 {features['checksum']}), resize {features['resize']}"
    if not reference.get("resize", True):
        name += " as given, which the reference does not record"
    if features["name"] == "classifier":
        name = f"the reference's own classifier: not comparable with Inception's FID (CRC-32 {features['checksum']})"
    lines.append(("features", name))
    lines += [(_TITLES.get(name, name), f"{value:.4f}") for name, value in result["metrics"].items()]
    lines += [(_TITLES.get(name, name), f"none: {reason}") for name, reason in result["absent"].items()]
    if result["count"] < _FEW:
        lines.append(("warning", f"FID and sFID of {result['count']:,} samples, fewer than {_FEW:,}, are too high"))
    return "\n".join(f"{title:<16} {text}" for title, text in lines)


def _spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
