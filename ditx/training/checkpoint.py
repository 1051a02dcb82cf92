"""Checkpoints of a run: written in the background, verified by checksums, restored from the newest sound one."""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ditx.files import checksum, first_line
from ditx.parallel.distributed import broadcast_from_main, is_main_process, sync_errors

MANIFEST = "manifest.json"
_SLICE = 1 << 20  # bytes


class Checkpoints:
    """The checkpoints in one folder, a subfolder for each step.

    It keeps the newest `keep`, all at multiples of `keep_every`, and the `keep_best` with the lowest value of the
    metric `best`. A checkpoint is a dictionary of named trees of arrays; each tree can be read separately, on any
    devices. Its manifest has its step, the fields of `described`, and the checksums of its files. Several processes
    share the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_every: int = 0,
        keep_best: int = 0,
        best: str = "loss",
        described: dict[str, Any] | None = None,
    ):
        # Orbax logs a lot, with a traceback in each thread of a failed write. We report failures in one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder, self._described = folder.absolute(), described or {}
        policies: Any = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        # By default Orbax takes the highest metric for the best, and keeps every checkpoint without one.
        ranked = {
            "get_metric_fn": lambda metrics: metrics.get(best, math.inf),
            "reverse": True,
            "keep_checkpoints_without_metrics": False,
        }
        kept += [policies.BestN(n=keep_best, **ranked)] if keep_best else []
        self._manager = ocp.training.Checkpointer(
            str(self.folder),
            context=ocp.Context(
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
                # Orbax would compile a program to slice small arrays, so that each device writes a part.
                array_options=ocp.options.ArrayOptions(
                    saving=ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=_SLICE)
                ),
            ),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, trees: dict[str, Any], *, metrics: Mapping[str, float | None] | None = None) -> None:
        """Start to write `trees` as step `step`; waits only for the previous save. Raises OSError if that failed."""
        with self._failing():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
            with sync_errors():
                free = shutil.disk_usage(self.folder).free
                if free < size:
                    raise OSError(f"it takes {size:,} bytes, and the disk has {free:,} left")
            known: Any = {name: value for name, value in (metrics or {}).items() if value is not None}
            self._manager.save_checkpointables_async(step, trees, force=True, metrics=known or None)

    def close(self) -> None:
        """Wait until everything is on disk. Raises OSError if a write failed."""
        with self._failing():
            self._manager.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types for a full disk.
            kept = ", ".join(map(str, steps(self.folder))) or "none"
            code = re.search(r"os_error_code='(\d+)'", str(error))
            cause = os.strerror(int(code[1])) if code else first_line(error)
            remedy = f"the older ones are whole: {kept}; make room, then run the same command to resume"
            raise OSError(f"no checkpoint could be written to {self.folder} ({cause}); {remedy}") from error

    def _seal(self) -> None:
        # Orbax calls this in process 0 when all processes have written their parts, just before it renames the folder.
        # So the manifest is part of the commit.
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            step = int(unfinished.name.split(".")[0])
            manifest = {"step": step, **self._described, "files": _checksums(unfinished)}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first."""
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()) if folder.is_dir() else []


def load(folder: Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read the trees named in `abstract` (of `jax.ShapeDtypeStruct`, with shardings) from one checkpoint.

    Raises ValueError if it is damaged, or does not hold such trees.
    """
    with sync_errors():
        if is_main_process():
            _verify(folder, step)
    return _read(folder, step, abstract)


def load_newest(folder: Path, abstract: dict[str, Any]) -> tuple[int, dict[str, Any], list[tuple[int, str]]] | None:
    """The newest sound checkpoint: its step, its trees, and for each damaged newer one its step and a sentence.

    Returns None where there is no checkpoint. Raises ValueError where there are some and none is sound.
    """
    damaged, sound = [], -1
    with sync_errors():
        for step in reversed(steps(folder)) if is_main_process() else []:
            try:
                _verify(folder, step)
                sound = step
                break
            except ValueError as error:
                damaged.append((step, str(error)))
        if damaged and sound < 0:
            raise ValueError(
                f"no checkpoint in {folder} can be read: {'; '.join(sentence for _, sentence in damaged)}; bring back a"
                " copy, or train in another --run"
            )
    sound = broadcast_from_main(sound)
    return None if sound < 0 else (sound, _read(folder, sound, abstract), damaged)


def quarantine(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that a run can write this step again and nothing is deleted."""
    path = folder / str(step)
    target = next(candidate for n in range(10_000) if not (candidate := folder / f"damaged-{step}-{n}").exists())
    return path.rename(target)


def _verify(folder: Path, step: int) -> None:
    path = folder.absolute() / str(step)
    try:
        expected, actual = json.loads((path / MANIFEST).read_text())["files"], _checksums(path)
        changed = [name for name in expected if actual.get(name) != expected[name]]
        if changed:
            raise ValueError(f"{changed[0]} is missing, truncated or altered")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {first_line(error)}") from error


def _read(folder: Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    path = folder.absolute() / str(step)
    try:
        return ocp.load_checkpointables(str(path), abstract)
    except Exception as error:  # Orbax raises many types for damage.
        raise ValueError(f"checkpoint {path} cannot be read: {first_line(error)}") from error


def _checksums(path: Path) -> dict[str, list[int | str]]:
    """Size and CRC-32 of every file of every tree of a checkpoint; Orbax's own checks let altered arrays pass."""
    files = [file for file in sorted(path.glob("*/**/*")) if file.is_file()]
    return {str(file.relative_to(path)): [file.stat().st_size, checksum(file)] for file in files}
