"""Batches from data sets, by grain: shuffled and endless for training, in order for evaluation and extraction."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache, partial
from itertools import islice

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from ditx.data import image_files
from ditx.data.sources import ArraySource, Batch, FolderSource, Source


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    start: int = 0,
    rows: Int[np.ndarray, "rows"] | None = None,
    workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, reshuffled every epoch; batch number s is a function of the arguments and s.

    `start=s` therefore resumes exactly: the position in the data is the training step. `batch_size` counts the images
    of all processes together and may exceed the data set; a process reads only its `rows` of each batch (default all).
    `flip` mirrors images left to right with probability 1/2. One thread reads ahead. With `workers` > 0, that many
    processes read instead; the script then needs `if __name__ == "__main__"`. Close the iterator to end them.
    """
    if len(source) == 0:
        raise ValueError("the data set has 0 images; give one with at least 1")
    for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    rows = np.arange(batch_size) if rows is None else rows
    if len(rows) == 0 or not 0 <= rows.min() <= rows.max() < batch_size:
        raise ValueError(f"rows are {rows.tolist()}; give at least one, from 0 to {batch_size - 1}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; give 0 to {2**32 - 1}")
    # A function of the module, since it is pickled for the worker processes.
    read = partial(_read, source=source, batch_size=batch_size, seed=seed, flip=flip, rows=rows)
    # Grain sees the numbers of batches. It would shuffle numbers of images one by one.
    dataset = grain.MapDataset.range(start, 2**62).map(read)
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return iter(_with_workers(iterable, workers))


def decode(
    files: list[str], size: int, *, batch_size: int, workers: int = 0
) -> Generator[tuple[UInt8[np.ndarray, "b h w 3"], list[str]], None, None]:
    """Images of all `files` in order, batch by batch, with an error message for each, empty if it could be read.

    Unreadable images are black. Raises OSError if the disk or the machine is at fault, not the image. Threads decode,
    or `workers` processes if there are any; close the generator to end them.
    """
    # Two batches at a time, so that no core waits for the last image of a batch.
    threads = 1 if workers else os.cpu_count() or 1
    dataset = grain.MapDataset.range(len(files)).batch(batch_size, batch_fn=np.asarray)
    dataset = dataset.map(partial(_decode, files=files, size=size, threads=threads))
    # Endless, and abandoned at the end: grain's processes leave shared memory behind when a data set ends.
    options = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=4)
    iterable = dataset.repeat().to_iter_dataset(options)
    with closing(iter(_with_workers(iterable, workers))) as iterator:
        yield from islice(iterator, len(dataset))


def images_in_order(
    source: ArraySource | FolderSource, start: int, batch_size: int
) -> Generator[UInt8[np.ndarray, "b h w c"], None, None]:
    """All images from number `start` on, in order. Raises ValueError at one that cannot be read."""
    if isinstance(source, ArraySource):
        for first in range(start, len(source), batch_size):
            yield source.images[first : first + batch_size]
        return
    files = iter(source.files[start:])
    with closing(decode(source.files[start:], source.size, batch_size=batch_size)) as decoded:
        for images, errors in decoded:
            for error, file in zip(errors, files, strict=False):
                if error:
                    raise ValueError(f"cannot read image {file}: {error}; replace or remove it")
            yield images


def _with_workers(iterable: grain.IterDataset, workers: int) -> grain.IterDataset:
    if not workers:
        return iterable
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read an absl flag, and no absl program parses it.
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iterable.mp_prefetch(options, worker_init_fn=_exit_with_parent)


def _exit_with_parent(worker: int, count: int) -> None:
    """End this worker when its parent ends, however it ends; leave signals, sent to every process, to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@lru_cache(maxsize=2)  # A batch may span two epochs.
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, "count"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _read(step: int, *, source: Source, batch_size: int, seed: int, flip: bool, rows: Int[np.ndarray, "rows"]) -> Batch:
    epochs, positions = np.divmod(step * batch_size + rows, len(source))
    indices = np.empty_like(rows)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        indices[mask] = _order(len(source), seed, int(epoch))[positions[mask]]
    # Flips are drawn for the global batch, so they do not depend on the number of processes.
    mirrored = np.random.default_rng((seed, step, 1)).random(batch_size) < 0.5
    return source.take(indices, mirrored[rows] & flip)


def _decode(
    indices: Int[np.ndarray, "b"], *, files: list[str], size: int, threads: int
) -> tuple[UInt8[np.ndarray, "b h w 3"], list[str]]:
    images, errors = np.zeros((len(indices), size, size, 3), np.uint8), [""] * len(indices)

    def read(row):
        file = files[indices[row]]
        try:
            images[row] = image_files.read(file, size)
        except ValueError as error:
            errors[row] = image_files.reason(error)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(len(indices))))
    return images, errors
