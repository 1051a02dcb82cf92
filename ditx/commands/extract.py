"""`ditx extract IMAGES OUT`: encode a folder of images into shards of latents, for train.py."""

import json
import re
import zlib
from collections.abc import Generator
from contextlib import closing
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

from ditx import cli
from ditx.data import latents, loader
from ditx.data.folders import ImageFolder, find_images, report_skipped
from ditx.files import lock
from ditx.nn.vae import AutoencoderKL
from ditx.parallel.compile import compile_checked
from ditx.parallel.distributed import launched, stop_signals
from ditx.training.run import diff
from ditx.weights.frozen import load_vae

MAX_SHARDS = 500  # A reader holds all of them open, and a process may often open no more than 1,024 files.


@dataclass(frozen=True)
class Config:
    """The images and how to encode them. Run the same command again to resume at the first missing shard."""

    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """folder of images, with a subfolder for each class if they have classes"""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """folder to write to, or to resume in"""
    vae: str = "ft-mse"
    """autoencoder: ft-mse, ft-ema or original (one encoder, three decoders), or the path of one"""
    size: int = 256
    """side of the centre crop of each image, in pixels"""
    batch_size: int = 32
    """images encoded at a time, each with its mirror image, over all devices of this process"""
    shard_size: int = 0
    """images a shard, the most that a kill costs; 0 makes up to 200 shards, of 64 images or more"""
    workers: int = 0
    """processes that decode images; 0 decodes in threads"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the encoder; bfloat16 is faster and keeps two to three digits"""
    strict: bool = False
    """stop at the first unreadable image instead of skipping it"""
    process_index: int | None = None
    """number of this process, if several share the folder, each with its own shards; default from srun or mpirun"""
    process_count: int | None = None
    """number of processes that share the folder; default from srun or mpirun"""

    def check(self) -> None:
        """Raise ValueError for impossible values."""
        cli.at_least(self, 1, "size", "batch_size")
        cli.at_least(self, 0, "shard_size", "workers")
        devices = jax.local_device_count()
        if self.batch_size % devices:
            raise ValueError(f"batch_size is {self.batch_size}; make it a multiple of the {devices} devices")
        if Path(self.out).resolve().is_relative_to(Path(self.images).resolve()):
            raise ValueError(f"{self.out} is inside the folder of images, whose subfolders are classes; choose another")

    def process(self) -> tuple[int, int]:
        """Index of this process and number of processes. Raises ValueError for an index out of range."""
        # The processes do not join each other, or a failure of one would end all. On a TPU pod, JAX knows them.
        index, count = launched()
        if count == 1:
            index, count = jax.process_index(), jax.process_count()
        index = index if self.process_index is None else self.process_index
        count = count if self.process_count is None else self.process_count
        if not 0 <= index < count:
            raise ValueError(f"process_index is {index} of {count} processes; give 0 to process_count - 1")
        return index, count


@dataclass(frozen=True)
class ShardImages:
    """The images of one shard."""

    path: Path
    """file of the shard"""
    images: ImageFolder

    def __len__(self) -> int:
        return len(self.images.files)

    @property
    def checksum(self) -> int:
        """CRC-32 of the names and contents of the image files."""
        contents = [content.checksum for content in self.images.contents]
        return zlib.crc32(json.dumps(list(zip(self.images.names, contents, strict=True))).encode())

    def finished(self, strict: bool = False) -> latents.Shard | None:
        """The shard, if it was made from the files as they are now and, if `strict`, from all of them."""
        shard = latents.read_shard(self.path)
        valid = shard and shard.files_checksum == self.checksum and not (strict and shard.skipped)
        return shard if valid else None


def main(argv: list[str]) -> int:
    """Encode the missing shards; returns the exit code. Raises ValueError or OSError for a user's mistakes."""
    config = tyro.cli(Config, args=argv, prog="ditx extract", description="Images to latents, for train.py.")
    config.check()
    (index, count), out = config.process(), Path(config.out)
    images = find_images(Path(config.images).absolute())
    shard_size = config.shard_size or max(64, -(-len(images.files) // 200))
    shards = split(config, images, shard_size)
    vae, vae_name = load_vae(config.vae)
    if config.size % vae.config.downsampling:
        raise ValueError(f"size is {config.size}; the autoencoder needs a multiple of {vae.config.downsampling}")
    plan = {
        "format": latents.FORMAT,
        "images": len(images.files),
        "names_checksum": zlib.crc32(json.dumps(images.names).encode()),
        "shard_size": shard_size,
        "image_size": config.size,
        "vae": vae_name,
        "scale": vae.config.scale,
        "dtype": config.dtype,
    }
    open_folder(out, plan)
    own = shards[index::count]
    missing = [shard for shard in own if shard.finished(config.strict) is None]
    if missing:  # The metadata would be wrong once one of these shards is replaced.
        (out / latents.METADATA).unlink(missing_ok=True)
    left, total = (sum(map(len, part)) for part in (missing, own))
    print(
        f"images   {len(images.files):,} of {len(images.class_names):,} classes,"
        f" cropped to {config.size}x{config.size}\n"
        f"encoder  {vae_name}, computing in {config.dtype}\n"
        f"devices  {jax.local_device_count()} x {jax.local_devices()[0].device_kind}\n"
        f"shards   {len(missing):,} of {len(own):,} are missing, {left:,} of {total:,} images"
        + (f", in process {index} of {count}" if count > 1 else "")
        + f"\noutput   {out}",
        flush=True,
    )
    with stop_signals("stopping before the next image") as received:
        extract(config, vae, missing, total, received)
    if missing:
        done = total - sum(map(len, missing))
        print(f"stopped with {done:,} of {total:,} images in finished shards; run the same command to resume")
        return 128 + received[0]
    finished = [made for shard in shards if (made := shard.finished())]
    if len(finished) < len(shards):
        print(f"done     this part; {len(shards) - len(finished):,} of {len(shards):,} shards are left to others")
    else:
        finish(out, finished, images.class_names, plan, vae)
    return 0


def split(config: Config, images: ImageFolder, size: int) -> list[ShardImages]:
    """All images in shards of `size`. Raises ValueError if there would be too many shards."""
    total = len(images.files)
    count = -(-total // size)
    if count > MAX_SHARDS:
        raise ValueError(
            f"shard_size {size} makes more than {MAX_SHARDS} shards; give {-(-total // MAX_SHARDS)} or more"
        )
    paths = [latents.shard_path(Path(config.out), index, count) for index in range(count)]
    parts = [np.arange(first, min(first + size, total)) for first in range(0, total, size)]
    return [ShardImages(path, images.select(part)) for path, part in zip(paths, parts, strict=True)]


def open_folder(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder of a new extraction, or check that `out` holds the planned one.

    Raises ValueError if it holds another extraction, or anything else.
    """
    file = out / latents.PLAN
    leftover = re.compile(r"lock|shards|plan\.json\.\d+\.partial")  # of a process that was killed, or has just begun
    begun = out.is_dir() and all(leftover.fullmatch(entry.name) for entry in out.iterdir())
    if out.exists() and not file.exists() and not begun:
        raise ValueError(f"{out} exists and is not of `ditx extract`; choose another folder")
    (out / "shards").mkdir(parents=True, exist_ok=True)
    with lock(out / "lock"):  # Of processes that start together, one writes the plan.
        if not file.exists():
            latents.write_json(file, plan)
            return
        try:
            before = dict.fromkeys(plan) | json.loads(file.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); extract into another folder") from error
    # Weights are compared by their checksum, so they may have moved.
    before, plan = (each | {"vae": str(each["vae"]).rsplit(" ", 1)[-1].rstrip(")")} for each in (before, plan))
    if changed := diff(before, plan):
        raise ValueError(f"{out} holds other latents: {changed}; give their flags and images, or another folder")


def extract(config: Config, vae: AutoencoderKL, missing: list[ShardImages], total: int, received: list[int]) -> None:
    """Encode the images of the shards `missing`, and remove each finished shard from the list.

    Stops early if a signal is received. Progress is shown among the `total` images of this process.
    """
    files = [file for shard in missing for file in shard.images.files]
    with closing(encoded(config, vae, files, total)) as results:
        while missing:
            shard = missing[0]
            images, damaged = shard.images, shard.images.damaged
            with closing(latents.ShardWriter(shard.path)) as writer:
                for file, name, label in zip(images.files, images.names, images.labels.tolist(), strict=True):
                    values, error = next(results)
                    error = damaged.get(name, error)
                    if received:
                        return
                    if values is not None and not error:
                        writer.write(values, label, name)
                    elif config.strict:
                        raise ValueError(f"cannot read image {file}: {error}; repair it, or drop --strict")
                    else:
                        writer.skip(name, error)
                writer.finish(shard.checksum)
            missing.pop(0)


def encoded(
    config: Config, vae: AutoencoderKL, files: list[str], total: int
) -> Generator[tuple[Float16[np.ndarray, "2 2 h w c"] | None, str], None, None]:
    """For each file, the latents of its image and its mirror image, or None and the error.

    Shows the progress among `total` images; `files` are the last of them.
    """
    # A mesh of this process only, since processes do not join each other.
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    weights = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(config.dtype), vae), replicated)
    shape = (config.batch_size, config.size, config.size, 3)
    pixels = jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows)
    program, seconds, _ = compile_checked(jax.jit(encode, out_shardings=rows), weights, pixels)
    print(f"compiled in {seconds:.1f} s", flush=True)
    progress, pending = cli.Progress(total - len(files), total), None

    def fetch(errors, values):
        arrays = np.asarray(values)[: len(errors)]
        if not np.isfinite(arrays).all():
            raise ValueError("the autoencoder returns non-finite numbers; try --dtype float32, or another --vae")
        progress.add(len(errors))
        for error, array in zip(errors, arrays, strict=True):
            yield (None, error) if error else (array, "")

    decoded = loader.decode(files, config.size, batch_size=config.batch_size, workers=config.workers)
    with closing(decoded) as batches, closing(progress):
        for pixels, errors in batches:
            pixels = np.concatenate([pixels, np.zeros((shape[0] - len(pixels), *shape[1:]), np.uint8)])
            values = program(weights, jax.device_put(pixels, rows))
            values.copy_to_host_async()
            if pending:  # Fetched one batch late, so that the device always has a batch to encode.
                yield from fetch(*pending)
            pending = errors, values
        if pending:
            yield from fetch(*pending)


def encode(vae: AutoencoderKL, pixels: UInt8[Array, "b h w 3"]) -> Float16[Array, "b 2 2 z z c"]:
    """[image | mirror image][mean | standard deviation] of the latents, computed in the dtype of the weights."""
    images = pixels.astype(jnp.float32) / 127.5 - 1
    both = jnp.stack([images, images[:, :, ::-1]], 1).astype(jax.tree.leaves(vae)[0].dtype)
    mean, log_variance = jax.vmap(jax.vmap(vae.encode))(both)
    std = jnp.exp(0.5 * log_variance.astype(jnp.float32))
    return jnp.stack([mean.astype(jnp.float32), std], 2).astype(jnp.float16)


def finish(out: Path, shards: list[latents.Shard], names: tuple[str, ...], plan: dict[str, Any], vae: AutoencoderKL):
    """Report the result and write the metadata, which makes the shards a data set."""
    skipped = {name: reason for shard in shards for name, reason in shard.skipped.items()}
    count, side = sum(shard.count for shard in shards), plan["image_size"] // vae.config.downsampling
    if not count:
        raise ValueError(f"none of the {len(skipped):,} images can be read; the first: {next(iter(skipped.items()))}")
    metadata = plan | {
        "shape": [side, side, vae.config.latent_channels],
        "count": count,
        "class_names": names,
        "versions": {name: version(name) for name in ("ditx", "jax")},
        "shards": [{"count": s.count, "size": s.size, "checksum": s.checksum} for s in shards],
        "skipped": skipped,
    }
    with lock(out / "lock"):
        latents.write_json(out / latents.METADATA, metadata)
    report_skipped(skipped, str(out / latents.METADATA))
    size = sum(shard.size for shard in shards)
    print(f"done     {count:,} latents of {side}x{side}x{vae.config.latent_channels} in {out}, {size / 1e6:,.1f} MB")
