"""What `ditx bench` times of data: batches as train.py reads them, files made for that, and images into latents."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import PIL.Image
import tyro

from ditx.commands.bench_work import Timing, intervals, memory_checked
from ditx.commands.extract import encode
from ditx.data import latents, loader, sources
from ditx.data.image_files import find_classes
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.parallel.compile import Dtype, compile_checked, resolve_dtype
from ditx.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated, shard_host_array
from ditx.weights.frozen import load_vae


@dataclass(frozen=True)
class Extract:
    """Images and their mirror images into latents, as ditx extract does it: the encoder and, given images, decoding."""

    images: tyro.conf.Positional[str] = ""
    """folder with a subfolder of images for each class, whose decoding is timed, too"""
    vae: str = ""
    """autoencoder: ft-mse, ft-ema, original, or the path of one; Stable Diffusion's with random weights if not given"""
    size: int = 256
    """side of the images in pixels"""
    batch_size: int = 32
    """images encoded at a time, each with its mirror image, over all devices"""
    workers: int = 0
    """processes that decode images; 0 decodes in threads"""
    dtype: Dtype = "auto"
    """what the encoder computes in; auto is float32 on CPUs and bfloat16 elsewhere"""
    repeats: int = 10
    """batches that are timed, after two that are not"""
    json: bool = False
    """print JSON, for programs"""


@dataclass(frozen=True)
class Data:
    """The batches that train.py reads, without a network to wait for."""

    path: tyro.conf.Positional[str] = ""
    """latents of ditx extract, CIFAR-10, or a folder of images; without it, files of random content are made to read"""
    make: tuple[Literal["latents", "png", "jpeg"], ...] = ("latents", "png", "jpeg")
    """without a path: what to read"""
    count: int = 4096
    """without a path: how many to make of each"""
    size: int = 32
    """side of the images in pixels, and of the latents that are made"""
    batch_size: int = 256
    """images a batch"""
    workers: int = 0
    """processes that read; 0 reads in threads"""
    repeats: int = 50
    """batches that are timed, after some that are not"""
    json: bool = False
    """print JSON, for programs"""


def extract(config: Extract) -> Timing:
    """Time the encoder, on random pixels."""
    mesh = make_mesh(MeshConfig())
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size is {config.batch_size}; make it a multiple of the {mesh.size} devices")
    dtype, rows, whole = resolve_dtype(config.dtype), batch_sharding(mesh), replicated(mesh)
    vae = load_vae(config.vae)[0] if config.vae else AutoencoderKL(VAEConfig(), key=jax.random.key(0))
    if config.size % vae.config.downsampling:
        raise ValueError(f"size is {config.size}; the autoencoder needs a multiple of {vae.config.downsampling}")
    weights = jax.tree.map(lambda leaf: shard_host_array(np.asarray(leaf.astype(dtype)), whole), vae)
    shape = (config.batch_size, config.size, config.size, 3)
    pixels = shard_host_array(np.random.default_rng(0).integers(0, 256, shape, np.uint8), rows)
    with memory_checked():
        jitted = jax.jit(encode, out_shardings=rows)
        program, compile_seconds, program_bytes = compile_checked(jitted, weights, pixels)
        times = intervals(lambda: program(weights, pixels), config.repeats)
    return Timing(times, config.batch_size, None, compile_seconds, program_bytes)


def decode(config: Extract) -> Timing:
    """Time the decoding of the images of a folder, as ditx extract has it done, over and over."""
    files, _, _ = find_classes(config.images)
    # More than there are, so that reading never comes to its end meanwhile.
    needed = (config.repeats + 3) * _group(config.workers) * config.batch_size
    files = files * (1 + (needed + _ahead(config.workers) * config.batch_size) // len(files))
    stream = loader.decode(files, config.size, batch_size=config.batch_size, workers=config.workers)
    with closing(stream) as batches:
        return Timing(read_times(batches, config.repeats, config.workers), config.batch_size)


def read(config: Data) -> dict[str, Timing]:
    """Time the reading of batches, by what is read."""
    if config.path:
        return {config.path: read_source(open_source(Path(config.path), config.size), config)}
    timings = {}
    for kind in config.make:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), kind, config.count, config.size)
            timings[kind] = read_source(open_source(Path(folder), config.size), config)
    return timings


def read_source(source: sources.Source, config: Data) -> Timing:
    """Time the reading of batches from a source."""
    stream = loader.batches(source, batch_size=config.batch_size, seed=0, flip=True, workers=config.workers)
    with closing(stream) as batches:
        return Timing(read_times(batches, config.repeats, config.workers), config.batch_size)


def open_source(path: Path, size: int) -> sources.Source:
    """What a path holds: latents, CIFAR-10 or a folder of images. Raises ValueError if it is none of them."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give latents, CIFAR-10 or a folder of images, or nothing")
    if any((path / name).exists() for name in (latents.METADATA, latents.PLAN)):
        return latents.LatentSource(path)
    batch = "data_batch_1"
    if path.is_file() or any((folder / batch).exists() for folder in (path, path / "cifar-10-batches-py")):
        return sources.cifar10(path)
    return sources.images(path, size)


def make(folder: Path, kind: str, count: int, size: int) -> None:
    """Fill a folder with `count` images, or the latents of such: a coarse pattern with some noise, as photographs."""
    rng, classes = np.random.default_rng(0), [f"class-{k}" for k in range(10)]
    if kind == "latents":
        path, values = latents.shard_path(folder, 0, 1), rng.standard_normal((16, 2, 2, size, size, 4))
        path.parent.mkdir()
        with closing(latents.ShardWriter(path)) as writer:
            for k in range(count):
                writer.write(np.abs(values[k % 16]).astype(np.float16), k % 10, f"{k}.png")
            shard = writer.finish(0)
        told = {"format": latents.FORMAT, "shape": [size, size, 4], "class_names": classes, "vae": "none", "scale": 1.0}
        told |= {"image_size": 8 * size}
        latents.write_json(folder / latents.METADATA, told | {"shards": [asdict(shard)]})
        return
    for name in classes[:count]:
        (folder / name).mkdir()
    for k in range(count):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size))
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / classes[k % 10] / f"{k}.{kind}")


def read_times(batches: Iterator[Any], repeats: int, workers: int) -> list[float]:
    """Seconds that a batch takes to come, `repeats` times, nothing else being done meanwhile.

    Processes hand theirs over one after another, so that only the time of several tells.
    """
    group, times = _group(workers), []
    for _ in range(_ahead(workers)):
        next(batches)
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(group):
            next(batches)
        times.append((time.perf_counter() - began) / group)
    return times


def _group(workers: int) -> int:
    return max(1, 2 * workers)


def _ahead(workers: int) -> int:
    return 8 + 4 * workers  # more than is read ahead
