"""`ditx bench train --sweep`: which choices are tried, and in which order."""

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from jax.sharding import Mesh

from ditx.commands.bench_work import OutOfMemoryError, Train, resolve_dtype
from ditx.training.step import Remat

# What is tried, by its flags.
CHOICES = ("batch_size", "unroll", "remat", "kernels", "attention")


def search(config: Train, mesh: Mesh, measure: Callable[[Train], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each choice, with its figures or why it was skipped; in text, a line for each as it is made.

    First come all choices of memory, computed as `config` says; then, with the fastest of each batch size, what else
    can compute blocks. Trying all with all would be more than twice as many programs.
    """
    sizes = sorted(set(config.batch_sizes or (config.batch_size, 2 * config.batch_size)))
    unrolls = sorted({1, config.model.depth})
    rows: list[dict[str, Any]] = []
    too_large: set[tuple[Any, ...]] = set()

    def attempt(batch_size, *choice):
        row: dict[str, Any] = dict(zip(CHOICES, (batch_size, *choice), strict=True))
        if choice in too_large:
            row |= {"skipped": "out of memory with a smaller batch already"}
        else:
            try:
                row |= measure(replace(config, **row))
            except OutOfMemoryError as error:
                row |= {"skipped": f"out of memory: {error}"}
                too_large.add(choice)
            gc.collect()  # what a failure held on to
        rows.append(row)
        if not config.json:
            print(report(row), flush=True)

    for choice in product(sizes, unrolls, get_args(Remat)):
        attempt(*choice, config.kernels, config.attention)
    for size, row in fastest(rows).items():
        for other in others(config, mesh):
            attempt(size, row["unroll"], row["remat"], *other)
    return rows


def others(config: Train, mesh: Mesh) -> list[tuple[str, str]]:
    """Kernels and attention to try beside those of `config`, where they work; not XLA's attention, slow on GPUs."""
    attentions = (config.attention, "auto" if config.attention == "fused" else "fused")
    found = []
    for kernels, attention in product(("xla", "fused"), attentions):
        try:
            replace(config, kernels=kernels, attention=attention).check_kernels(
                mesh, resolve_dtype(config.dtype), config.model
            )
        except ValueError:
            continue
        found.append((kernels, attention))
    return [other for other in found if other != (config.kernels, config.attention)]


def fastest(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The fastest row of each batch size that fits."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "skipped" not in row:
            size = row["batch_size"]
            found[size] = max(found.get(size, row), row, key=lambda row: row["images_per_second"])
    return found


def flags_of(row: dict[str, Any]) -> str:
    """A choice as flags of train.py."""
    return " ".join(f"--{name.replace('_', '-')} {row[name]}" for name in CHOICES)


def report(row: dict[str, Any]) -> str:
    """One choice, for people."""
    if "skipped" in row:
        return f"{flags_of(row):<80} skipped: {row['skipped']}"
    return (
        f"{flags_of(row):<80}{1e3 * row['seconds']:>10,.2f} ms{row['images_per_second']:>12,.2f} images/s"
        f"{row['program_bytes'] / 2**20:>12,.1f} MiB   compiled in {row['compile_seconds']:,.1f} s"
    )
