"""`ditx evaluate SOURCE REFERENCE`: FID and its kin, of a run, weights or images; `--make-stats` makes references."""

import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from ditx.cli import Progress
from ditx.data.loader import images_in_order
from ditx.data.sources import open_images
from ditx.evaluation.evaluate import METRICS, Metric, compute_metrics
from ditx.evaluation.features import FeatureName, FeatureNetwork, FeatureStore, make_feature_extractor, with_channels
from ditx.evaluation.generate import DrawingConfig, Samples, generate_samples
from ditx.evaluation.reference import POOL_ROWS, Reference, read_reference
from ditx.evaluation.train_classifier import train_classifier
from ditx.files import read_npz
from ditx.nn.inception import Resize
from ditx.parallel.distributed import (
    DistributedConfig,
    broadcast_from_main,
    end,
    initialize,
    is_main_process,
    sync_errors,
)
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import run as runs
from ditx.weights import pretrained
from ditx.weights.frozen import load_inception
from ditx.weights.pretrained import Description

RESULTS = "evaluations.jsonl"
_FEW = 10_000
_TITLES = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score"}


@dataclass(frozen=True)
class Config:
    """What to judge, and by what. Sampler and steps not given here are those that a run draws its own pictures with.

    Guidance is none unless given, as in the paper's tables. The same command, started again, goes on where it stopped.
    """

    source: tyro.conf.Positional[str] = ""
    """a run (the newest if not given), weights, a folder of images, or an .npz of them; digits, the embedded ones"""
    reference: tyro.conf.Positional[str] = ""
    """statistics that --make-stats has written, or a reference .npz of the ADM suite"""
    make_stats: str = ""
    """write the statistics of SOURCE, a data set, to this .npz, for others to be judged by"""
    features: FeatureName = "inception"
    """with --make-stats: inception, as everyone, or a small classifier trained on that data, for digits and the like"""
    inception: str = ""
    """file of the Inception weights; pytorch-fid's, fetched once, if not given"""
    resize: Resize = "adm"
    """how Inception enlarges images: as the ADM suite, or as pytorch-fid (with statistics made so)"""
    size: int = 0
    """crop the images of a folder to this side; without it, they must all be of one size"""
    metrics: tuple[Metric, ...] = METRICS
    """those to compute"""
    drawing: tyro.conf.OmitArgPrefixes[DrawingConfig] = field(default_factory=DrawingConfig)
    feature_batch: int = 64
    """images that the feature network sees at a time on each device"""
    out: str = ""
    """folder of results and of what is not finished; that of the run, or samples/NAME for weights, if not given"""
    json: bool = False
    """print JSON, for programs"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def check(self) -> None:
        """Raise ValueError for values that cannot be."""
        self.drawing.check()
        for name, least in {"feature_batch": 1, "size": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.metrics:
            raise ValueError(f"no metrics are given; choose among {' '.join(METRICS)}")


def main(argv: list[str]) -> int:
    """Judge, or make a reference; returns the exit code. Raises ValueError or OSError for what a user can mend."""
    config, described = parse(argv)
    try:
        config.check()
        if config.make_stats:
            make_statistics(config)
        else:
            result = evaluate(config, described)
            if is_main_process():
                print(json.dumps(result, indent=2) if config.json else table(result))
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        print(f"ditx evaluate: {error}", file=sys.stderr)
        return end(2)
    return 0


def parse(argv: list[str]) -> tuple[Config, Description | None]:
    """What to do and, if there is a network to draw from, its description. Exits with 2 on a bad flag."""
    prog, description = "ditx evaluate", "FID, sFID, Inception Score, precision and recall of samples or images."
    first = tyro.cli(Config, args=argv, prog=prog, description=description)
    initialize(first.distributed)
    source = first.source or ("" if first.make_stats else str(runs.newest_run(Path("runs"))))
    if first.make_stats or not _has_weights(Path(source)):
        return first, None
    # Read twice: what is named on the command line sets the defaults of the other flags.
    described = pretrained.describe(Path(source))
    sampling = replace(described.sampling, guidance_scale=1.0)
    default = Config(source=source, drawing=DrawingConfig(sampling=sampling, vae=described.vae))
    return tyro.cli(Config, args=argv, prog=prog, default=default, description=description), described


def _has_weights(source: Path) -> bool:
    if source.is_dir():
        return pretrained.is_run(source) or any(source.glob("**/diffusion_pytorch_model.*"))
    return source.suffix in (".pt", ".pth", ".bin", ".safetensors")


def make_statistics(config: Config) -> None:
    """Write the reference that a data set makes."""
    out = Path(config.make_stats)
    if not config.source:
        raise ValueError(f"what is {out} to be made from? Give a folder of images, an .npz, CIFAR-10, or digits")
    if _has_weights(Path(config.source)):
        raise ValueError(f"{config.source} is a network, not a data set; statistics are made from images")
    if out.suffix != ".npz" or out.exists():
        raise ValueError(f"--make-stats is {out}; give the name of a new file that ends in .npz")
    if Path(config.source).suffix == ".npz" and "mu" in read_npz(Path(config.source), ("mu",)):
        raise ValueError(f"{config.source} has statistics already; give it as the REFERENCE of an evaluation")
    mesh = make_mesh(config.mesh)
    source = open_images(config.source, config.size)
    print(f"images   {len(source):,} of {_shape(source.image_shape)}, {config.source}", flush=True)
    if config.features == "classifier":
        most = np.unique(np.linspace(0, len(source) - 1, min(len(source), 50_000)).astype(int))
        images = np.stack([source[int(n)]["image"] for n in most])
        network, accuracy = train_classifier(images, source.labels[most], len(source.class_names), config.drawing.seed)
        features = FeatureNetwork(network)
        print(f"features a classifier trained on these images, right in {accuracy:.1%} of a tenth held out", flush=True)
    else:
        features = read_inception(config)
    kept = np.zeros(len(source), bool)
    kept[np.linspace(0, len(source) - 1, min(len(source), POOL_ROWS)).astype(int)] = True
    gathered = FeatureStore(kept=kept)
    gather(images_in_order(source, 0, config.drawing.batch), gathered, features, config, mesh, len(source))
    reference = Reference.of(gathered, features, config.source, source.image_shape)
    with sync_errors():
        if is_main_process():
            reference.write(out)
            print(f"wrote    {out}")


def read_inception(config: Config) -> FeatureNetwork:
    """The network of the file given, or fetched."""
    network, said = load_inception(config.inception)
    _say(config, f"features Inception, {said}, resize {config.resize}")
    return FeatureNetwork(network, config.resize)


def gather(
    batches: Iterator[np.ndarray],
    gathered: FeatureStore,
    features: FeatureNetwork,
    config: Config,
    mesh: Mesh,
    total: int,
) -> None:
    """Add the features of the images that come, up to `total`."""
    extract = make_feature_extractor(features, mesh, config.feature_batch)
    progress = Progress(gathered.count, total) if is_main_process() and not config.json else None
    count = broadcast_from_main(gathered.count)
    grey = False
    while count < total:
        with sync_errors():
            images = next(batches)[: total - count]
            if not grey and features.channels == 3 and (images == images[..., :1]).all():
                grey = True
                print("note: grey images are repeated to 3 channels", file=sys.stderr)
            images = with_channels(images, features.channels)
        rows = extract(images)
        with sync_errors():
            if is_main_process():
                gathered.add(rows)
        count += len(images)
        if progress:
            progress.add(len(images))
    if progress:
        progress.close()


def evaluate(config: Config, described: Description | None) -> dict[str, Any]:
    """All that is found and how, as it is printed and stored; only the first of several processes has it."""
    if not config.reference:
        raise ValueError(
            "there is nothing to compare with; make statistics with: ditx evaluate --make-stats OUT DATA, and give OUT"
        )
    mesh = make_mesh(config.mesh)
    reference = read_reference(Path(config.reference))
    features = FeatureNetwork(reference.classifier) if reference.classifier else read_inception(config)
    source, folder = Path(config.source), Path(config.out) if config.out else None
    if described:
        samples = generate_samples(source, described, config.drawing, mesh)
        folder = folder or (source if pretrained.is_run(source) else Path("samples") / source.stem)
    else:
        samples = of_images(config)
    if samples.count < 2:
        raise ValueError(f"{config.source} has {samples.count} images; a covariance needs at least 2")
    reference.check(features, samples.image_shape)
    result = {
        "source": config.source,
        "samples": samples.about,
        "count": samples.count,
        "features": {"name": features.name, "checksum": features.checksum, "resize": features.resize},
        "reference": {"file": config.reference, "checksum": checksum(Path(config.reference))},
        "wanted": list(config.metrics),
    }
    done = _stored(folder, result) if is_main_process() else None
    if broadcast_from_main(done is not None):
        return done or {}
    with ExitStack() as stack:
        partial = None
        if folder and is_main_process():
            key = zlib.crc32(json.dumps([result["samples"], result["features"]]).encode())
            partial = folder / f"evaluation-{key:08x}"
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(runs.lock(partial / "lock", f"another process evaluates the same in {folder}"))
        if reference.images is not None and (reference.pool is None or "precision-recall" in config.metrics):
            _say(config, f"reads    {len(reference.images):,} images of the reference")
            of_reference, images = FeatureStore(), reference.images
            batch = config.drawing.batch
            parts = (images[first : first + batch] for first in range(0, len(images), batch))
            gather(parts, of_reference, features, config, mesh, len(images))
            reference = reference.with_images(of_reference)
        gathered = FeatureStore(partial, samples.count)
        start = broadcast_from_main(gathered.count)
        there = f", of which {start:,} are there" if start else ""
        _say(config, f"samples  {samples.count:,} of {_shape(samples.image_shape)}{there}")
        gather(samples.batches(start), gathered, features, config, mesh, samples.count)
        if not is_main_process():
            return {}
        result["metrics"], result["absent"] = compute_metrics(gathered, features, reference, config.metrics)
        result["reference"] |= {"name": reference.name, "count": reference.count}
        if folder and partial:
            with (folder / RESULTS).open("a") as file:
                file.write(json.dumps(result) + "\n")
            shutil.rmtree(partial)
    return result


def _stored(folder: Path | None, result: dict[str, Any]) -> dict[str, Any] | None:
    """What the same evaluation found before."""
    for line in runs.read_lines(folder / RESULTS) if folder else []:
        if all(line.get(name) == result[name] for name in ("samples", "count", "features", "wanted")) and (
            line["reference"]["checksum"] == result["reference"]["checksum"]
        ):
            return line
    return None


def of_images(config: Config) -> Samples:
    """Those of a data set, a folder or a file."""
    source = open_images(config.source, config.size)
    idle = replace(config.drawing, batch=DrawingConfig().batch)
    if idle != DrawingConfig():
        raise ValueError(f"{config.source} has images, all of which are judged; leave out the flags of drawing samples")
    about = {"checksum": f"{source.checksum:08x}", "size": config.size}

    def batches(start):
        return images_in_order(source, start, config.drawing.batch)

    return Samples(about, len(source), source.image_shape, batches)


def table(result: dict[str, Any]) -> str:
    """For people: the metrics, and the protocol that they hold for."""
    about, features, reference = result["samples"], result["features"], result["reference"]
    lines = [("samples", f"{result['count']:,} of {result['source']}")]
    if "weights" in about:
        at = f" at step {about['step']:,}" if about["step"] else ""
        guided = "" if about["guidance_scale"] == 1 else f" on {about['guidance_channels'] or 'all'} channels"
        lines = [
            (
                "samples",
                f"{result['count']:,} of {result['source']}{at}, labels {about['labels']}, seed {about['seed']}",
            ),
            (
                "sampler",
                f"{about['sampler']} in {about['steps']} steps, guidance {about['guidance_scale']}{guided},"
                f" computing in {about['dtype']}" + (f", decoded by {about['vae']}" if about["vae"] else ""),
            ),
        ]
    of = f"{reference['count']:,} images" if reference["count"] else "images of unknown number"
    lines.append(("reference", f"{reference['file']}: {of}, from {reference['name']}"))
    if features["name"] == "inception":
        lines.append(("features", f"Inception (CRC-32 {features['checksum']}), resize {features['resize']}"))
    else:
        words = "a classifier of the reference's own: not to be compared with FIDs of Inception"
        lines.append(("features", f"{words} (CRC-32 {features['checksum']})"))
    lines += [(_TITLES.get(name, name), f"{value:.4f}") for name, value in result["metrics"].items()]
    lines += [(_TITLES.get(name, name), f"none: {why}") for name, why in result["absent"].items()]
    if result["count"] < _FEW:
        lines.append(
            ("warning", f"{result['count']:,} samples: FID and sFID are too high; compare none of fewer than {_FEW:,}")
        )
    return "\n".join(f"{title:<16} {text}" for title, text in lines)


def _say(config: Config, sentence: str) -> None:
    print(sentence, file=sys.stderr if config.json else sys.stdout, flush=True)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def checksum(file: Path) -> str:
    """CRC-32 of a file's contents."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"
