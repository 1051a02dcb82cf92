"""Time the reading of training batches: `uv run python tests/reading_rates.py`, a minute on two cores.

Reads the latents, CIFAR-10 or folder of images at a path or, without one, files of random content made for it. Prints
images a second, as the median over batches and the range of its middle half. The machine must be idle.
"""

import argparse
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image

from ditx.data import latents, loader
from ditx.data.sources import open_dataset


def make(folder, kind, count, size):
    """Fill a folder with images, each a coarse pattern with noise like a photograph's, or with latents."""
    rng, classes = np.random.default_rng(0), [f"class-{k}" for k in range(10)]
    if kind == "latents":
        path, values = latents.shard_path(folder, 0, 1), rng.standard_normal((16, 2, 2, size, size, 4))
        path.parent.mkdir()
        with closing(latents.ShardWriter(path)) as writer:
            for k in range(count):
                writer.write(np.abs(values[k % 16]).astype(np.float16), k % 10, f"{k}.png")
            shard = asdict(writer.finish(0))
        metadata = {"format": latents.FORMAT, "shape": [size, size, 4], "class_names": classes, "shards": [shard]}
        latents.write_json(folder / latents.METADATA, metadata | {"vae": "none", "scale": 1.0, "image_size": 8 * size})
        return
    for name in classes[:count]:
        (folder / name).mkdir()
    for k in range(count):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size))
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / classes[k % 10] / f"{k}.{kind}")


def batch_seconds(batches, repeats, workers):
    """Seconds between batches, `repeats` times, after the batches that were read ahead."""
    # Worker processes deliver in turn, often several batches at once, so whole turns are timed.
    group, seconds = max(1, 2 * workers), []
    for _ in range(8 + 4 * workers):
        next(batches)
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(group):
            next(batches)
        seconds.append((time.perf_counter() - start) / group)
    return seconds


def report(name, source, options):
    stream = loader.batches(source, batch_size=options.batch_size, seed=0, flip=True, workers=options.workers)
    with closing(stream) as batches:
        seconds = batch_seconds(batches, options.repeats, options.workers)
    low, rate, high = (options.batch_size / np.quantile(seconds, q) for q in (0.75, 0.5, 0.25))
    print(f"{name:<8} {rate:,.0f} images/s ({low:,.0f} to {high:,.0f})", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="data set to read instead of files made for it")
    parser.add_argument("--dataset", choices=["latents", "cifar10", "images"], default="images", help="kind of data")
    parser.add_argument("--make", nargs="+", choices=["latents", "png", "jpeg"], default=["latents", "png", "jpeg"])
    parser.add_argument("--count", type=int, default=4096, help="images or latents to make")
    parser.add_argument("--size", type=int, default=32, help="side of images and of latents that are made")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0 reads in threads")
    parser.add_argument("--repeats", type=int, default=50, help="batches that are timed")
    options = parser.parse_args(argv)
    if options.path:
        report(options.dataset, open_dataset(options.dataset, options.path, options.size), options)
        return
    for kind in options.make:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), kind, options.count, options.size)
            report(kind, open_dataset("latents" if kind == "latents" else "images", folder, options.size), options)


if __name__ == "__main__":
    main()
