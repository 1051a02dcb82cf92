"""`ditx extract IMAGES OUT`: a folder of images into shards of latents, for `train.py` to train on."""

import json
import signal
import sys
import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float16, UInt8
from tqdm import tqdm

from ditx.data import latents, loader
from ditx.data.latents import ShardedImages as Images
from ditx.nn.vae import AutoencoderKL
from ditx.parallel.distributed import launched
from ditx.training import run as runs
from ditx.weights.frozen import load_vae


@dataclass(frozen=True)
class Config:
    """What to encode, and how. The same command, started again, goes on with the first shard that is missing."""

    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """folder with one subfolder of images for each class"""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """folder to write to, or to go on in"""
    vae: str = "ft-mse"
    """autoencoder: ft-mse, ft-ema or original (one encoder, three decoders), or the path of one"""
    size: int = 256
    """side of the square that is cut from the centre of each image, in pixels"""
    batch_size: int = 32
    """images encoded at a time, each with its mirror image, over all devices of this process"""
    shard_size: int = 0
    """images a shard, the most that a kill costs; 0 makes up to 200 shards, of 64 images or more"""
    workers: int = 0
    """processes that decode images; 0 decodes in threads"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the encoder computes in; bfloat16 is faster, and leaves two to three digits"""
    strict: bool = False
    """end at the first image that cannot be read, rather than leave it out"""
    process_index: int | None = None
    """of processes that share a folder, each makes its own part: the number of this one; srun and mpirun tell it"""
    process_count: int | None = None
    """how many processes share the folder; srun and mpirun tell it"""

    def check(self) -> None:
        """Raise ValueError for values that cannot be."""
        for name, least in {"size": 1, "batch_size": 1, "shard_size": 0, "workers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        devices = jax.local_device_count()
        if self.batch_size % devices:
            raise ValueError(f"batch_size is {self.batch_size}; make it a multiple of the {devices} devices")
        images, out = Path(self.images).resolve(), Path(self.out).resolve()
        if out.is_relative_to(images):
            raise ValueError(f"{self.out} lies in the folder of images, whose subfolders are classes; choose another")


def main(argv: list[str]) -> int:
    """Encode what is missing; returns the exit code. Raises ValueError or OSError for what a user can mend."""
    config = tyro.cli(Config, args=argv, prog="ditx extract", description="Images to latents, for train.py.")
    config.check()
    # They need not join each other, and would end together if they did. On a TPU pod, JAX knows them.
    index, count, _ = launched()
    index, count = (index, count) if count > 1 else (jax.process_index(), jax.process_count())
    index = index if config.process_index is None else config.process_index
    count = count if config.process_count is None else config.process_count
    if not 0 <= index < count:
        raise ValueError(f"process_index is {index} of {count} processes; give 0 to process_count - 1")
    images, out = Images.find(config.images, config.shard_size), Path(config.out)
    vae, vae_name = load_vae(config.vae)
    if config.size % vae.config.downsampling:
        raise ValueError(f"size is {config.size}; the autoencoder needs a multiple of {vae.config.downsampling}")
    plan = {
        "format": latents.FORMAT,
        "images": len(images.files),
        "names_checksum": zlib.crc32(json.dumps(images.names).encode()),
        "shard_size": images.shard_size,
        "image_size": config.size,
        "vae": vae_name,
        "scale": vae.config.scale,
        "dtype": config.dtype,
    }
    open_folder(out, plan)
    mine = images.shards[index::count]
    missing = [shard for shard in mine if not is_done(out, images, shard, strict=config.strict)]
    if missing:  # What describes the shards holds no longer, should one be made anew.
        (out / latents.METADATA).unlink(missing_ok=True)
    left, total = (sum(len(images.indices(shard)) for shard in shards) for shards in (missing, mine))
    print(
        f"images   {len(images.files):,} of {len(images.class_names):,} classes, cut to {config.size}x{config.size}\n"
        f"encoder  {vae_name}, computing in {config.dtype}\n"
        f"devices  {jax.local_device_count()} x {jax.local_devices()[0].device_kind}\n"
        f"plan     {len(missing):,} of {len(mine):,} shards are missing, {left:,} of {total:,} images"
        + (f", in process {index} of {count}" if count > 1 else "")
        + f"\nwrites   {out}",
        flush=True,
    )
    try:
        with stop_signals():
            extract(config, images, vae, missing, total)
    except KeyboardInterrupt as stopped:
        kept = total - sum(len(images.indices(shard)) for shard in missing)
        print(f"stopped with {kept:,} of {total:,} images in finished shards; the same command goes on from there")
        return 128 + int(stopped.args[0])
    finish(out, images, plan, vae)
    return 0


def open_folder(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder of a new extraction, or check that `out` holds the one planned.

    Raises ValueError if it holds another one, or anything else.
    """
    file, begun = out / latents.PLAN, {"lock", "shards", f"{latents.PLAN}.partial"}
    if out.exists() and not file.exists() and (not out.is_dir() or {entry.name for entry in out.iterdir()} - begun):
        raise ValueError(f"{out} exists and is not of `ditx extract`; choose another folder")
    (out / "shards").mkdir(parents=True, exist_ok=True)
    with runs.lock(out / "lock"):  # of processes that start together, one makes the plan
        if file.exists():
            try:
                before = dict.fromkeys(plan) | json.loads(file.read_text())
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error}); extract into another folder") from error
            # The weights are told by their checksum, wherever they lie now.
            changed = runs.diff(before | {"vae": _checksum(before)}, plan | {"vae": _checksum(plan)})
            if changed:
                raise ValueError(
                    f"{out} holds other latents: {changed}; give their flags and images, or another folder"
                )
        else:
            runs.write(file, json.dumps(plan, indent=2) + "\n")


def _checksum(plan: dict[str, Any]) -> str:
    return str(plan.get("vae")).rsplit(" ", 1)[-1].rstrip(")")


def is_done(out: Path, images: Images, shard: int, *, strict: bool = False) -> bool:
    """Whether a shard is finished, as it was written, of the files that are there now and, if `strict`, of them all."""
    found = latents.read_shard(latents.shard_path(out, shard, len(images.shards)))
    return found is not None and found.files_checksum == images.checksum(shard) and not (strict and found.skipped)


def extract(config: Config, images: Images, vae: AutoencoderKL, missing: list[int], total: int) -> None:
    """Encode the images of the shards `missing`, of `total` images; those that are finished leave the list."""
    files = [images.files[n] for shard in missing for n in images.indices(shard)]
    with closing(encoded(config, vae, files, total)) as results:
        while missing:
            path = latents.shard_path(Path(config.out), missing[0], len(images.shards))
            with closing(latents.ShardWriter(path)) as writer:
                for n in images.indices(missing[0]):
                    values, wrong = next(results)
                    if values is not None:
                        writer.write(values, int(images.labels[n]), images.names[n])
                    elif config.strict:
                        raise ValueError(f"cannot read image {images.files[n]}: {wrong}; mend it, or drop --strict")
                    else:
                        writer.skip(images.names[n], wrong)
                writer.finish(images.checksum(missing[0]))
            missing.pop(0)


def encoded(
    config: Config, vae: AutoencoderKL, files: list[str], total: int
) -> Generator[tuple[Float16[np.ndarray, "2 2 h w c"] | None, str], None, None]:
    """For each file, the latents of its image and its mirror image as a shard has them, or None and what is wrong.

    Shows the progress among `total` images, of which these are the last.
    """
    # A mesh of this process alone: processes need not know of each other.
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    weights = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(config.dtype), vae), replicated)
    shape = (config.batch_size, config.size, config.size, 3)
    began = time.perf_counter()
    lowered = jax.jit(encode, out_shardings=rows).lower(weights, jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows))
    compiled = lowered.compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)

    progress, pending = Progress(total - len(files), total), None

    def fetched(wrong, values):
        arrays = np.asarray(values)[: len(wrong)]
        if not np.isfinite(arrays).all():
            raise ValueError("the autoencoder gives numbers that are not finite; try --dtype float32, or another --vae")
        progress.add(len(wrong))
        for reason, array in zip(wrong, arrays, strict=True):
            yield (None, reason) if reason else (array, "")

    stream = loader.decode(files, config.size, batch_size=config.batch_size, workers=config.workers)
    with closing(stream) as batches, closing(progress):
        for pixels, wrong in batches:
            pixels = np.concatenate([pixels, np.zeros((shape[0] - len(pixels), *shape[1:]), np.uint8)])
            values = compiled(weights, jax.device_put(pixels, rows))
            values.copy_to_host_async()
            # A batch late, so that the device has the next one to do meanwhile.
            if pending:
                yield from fetched(*pending)
            pending = wrong, values
        if pending:
            yield from fetched(*pending)


def encode(vae: AutoencoderKL, pixels: UInt8[Array, "b h w 3"]) -> Float16[Array, "b 2 2 z z c"]:
    """[image | mirror][mean | standard deviation] of the latents of images, in whatever the weights are in."""
    images = pixels.astype(jnp.float32) / 127.5 - 1
    both = jnp.stack([images, images[:, :, ::-1]], 1).astype(jax.tree.leaves(vae)[0].dtype)
    mean, log_variance = jax.vmap(jax.vmap(vae.encode))(both)
    std = jnp.exp(0.5 * log_variance.astype(jnp.float32))
    return jnp.stack([mean.astype(jnp.float32), std], 2).astype(jnp.float16)


def finish(out: Path, images: Images, plan: dict[str, Any], vae: AutoencoderKL) -> None:
    """Say what was made and, if all shards are there, describe them, which makes them a data set."""
    found = [
        latents.read_shard(latents.shard_path(out, shard, len(images.shards))) if is_done(out, images, shard) else None
        for shard in images.shards
    ]
    shards = [shard for shard in found if shard is not None]
    if len(shards) < len(found):
        print(f"done     this part; {len(found) - len(shards):,} of {len(found):,} shards are left to other processes")
        return
    skipped = {name: reason for shard in shards for name, reason in shard.skipped.items()}
    count, side = sum(shard.count for shard in shards), plan["image_size"] // vae.config.downsampling
    if not count:
        raise ValueError(f"none of the {len(skipped):,} images can be read; the first: {next(iter(skipped.items()))}")
    described = plan | {
        "shape": [side, side, vae.config.latent_channels],
        "count": count,
        "class_names": images.class_names,
        "versions": {name: version(name) for name in ("ditx", "jax")},
        "shards": [{"count": s.count, "size": s.size, "checksum": s.checksum} for s in shards],
        "skipped": skipped,
    }
    file = out / latents.METADATA
    with runs.lock(out / "lock"):
        runs.write(file, json.dumps(described, indent=2) + "\n")
    for name, reason in list(skipped.items())[:10]:
        print(f"skipped  {name}: {reason}", file=sys.stderr)
    if skipped:
        print(f"skipped  {len(skipped):,} images in all, listed in {file}", file=sys.stderr)
    size = sum(shard.size for shard in shards)
    print(f"done     {count:,} latents of {side}x{side}x{vae.config.latent_channels} in {out}, {size / 1e6:,.1f} MB")


class Progress:
    """A bar or, where nobody watches one, lines: images so far, images a second, and the time left."""

    SECONDS_BETWEEN_LINES = 30

    def __init__(self, done: int, total: int):
        self._bar = tqdm(total=total, initial=done, unit=" images", disable=None)
        self._done, self._total = done, total
        self._clock, self._since = time.perf_counter(), done

    def add(self, count: int) -> None:
        """Count images as done."""
        self._done += count
        self._bar.update(count)
        passed = time.perf_counter() - self._clock
        if self._bar.disable and passed > self.SECONDS_BETWEEN_LINES:
            speed = (self._done - self._since) / passed
            left = (self._total - self._done) / speed
            print(f"{self._done:,} of {self._total:,} images  {speed:.1f} images/s  {left:.0f} s left", flush=True)
            self._clock, self._since = self._clock + passed, self._done

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM a KeyboardInterrupt of their number; a second one ends at once."""

    def stop(number, _):
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
