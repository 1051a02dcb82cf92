"""The folder of a run: its description `config.json`, its lines of `metrics.jsonl`, and the lock of who writes them."""

import json
import math
from collections.abc import Collection
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from ditx.files import lock

CONFIG, METRICS = "config.json", "metrics.jsonl"


def check_run(run: Path, described: dict[str, Any], *, free: set[str]) -> None:
    """Raise ValueError where `run` holds another run than the one described, or anything else; nothing is written.

    Of the description, the fields in `free` may differ, and others be left out.
    """
    file = run / CONFIG
    if file.exists():
        changed = diff(read_config(run), json.loads(json.dumps(described)), free=free)
        if changed:
            raise ValueError(f"{run} holds another run: {changed}; give its flags to go on, or another --run")
    elif run.exists() and (not run.is_dir() or {entry.name for entry in run.iterdir()} - {f"{CONFIG}.partial", "lock"}):
        raise ValueError(f"{run} exists and is not a run; choose another --run")


def open_run(run: Path, described: dict[str, Any], *, free: set[str]) -> IO[str]:
    """Make the folder of a new run, or check that `run` holds the run described, and describe it anew.

    Of the description, the fields in `free` may differ. Returns the lock, which is held until it is closed or the
    process ends, however it ends. Raises ValueError if the folder holds another run, or anything else, or if another
    process is writing to it.
    """
    check_run(run, described, free=free)
    run.mkdir(parents=True, exist_ok=True)
    held = lock(run / "lock", f"another process is training in {run}; wait for it, or choose another --run")
    versions = {name: version(name) for name in ("ditx", "jax", "equinox", "optax", "orbax-checkpoint")}
    write(run / CONFIG, json.dumps(described | {"versions": versions}, indent=2) + "\n")
    return held


def read_config(run: Path) -> dict[str, Any]:
    """The description of a run. Raises ValueError if there is none, or none that can be read."""
    try:
        return json.loads((run / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run} is not a run that can be read ({error}); give the folder that train.py wrote"
        ) from error


def newest_run(root: Path) -> Path:
    """The run under `root` that was trained last. Raises ValueError if there is none."""
    runs = [file.parent for file in root.glob(f"*/{CONFIG}")]
    if not runs:
        raise ValueError(f"there is no run under {root}/; train one with train.py, or give the folder of one")
    # Not by the folder's own time, which drawing samples into an older run would renew.
    return max(runs, key=lambda run: max(file.stat().st_mtime for name in (CONFIG, METRICS) for file in run.glob(name)))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return read_lines(run / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file, of which there may be none, less one that a kill may have cut off."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def trim_metrics(run: Path, step: int) -> None:
    """Drop the lines after `step`, which the run is about to write again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line.get("step", math.inf) <= step]
    write(run / METRICS, "".join(kept))


def average_file(run: Path, step: int, length: float) -> Path:
    """Where an average by a power profile, of so many steps and such a length, is stored in a run."""
    return run / "averages" / f"{step:07d}-{length}.safetensors"


def stored_averages(run: Path) -> list[tuple[int, float]]:
    """Step and length of each average that is stored."""
    names = sorted(file.stem.split("-", 1) for file in run.glob("averages/[0-9]*-*.safetensors"))
    return [(int(step), float(length)) for step, length in names]


def diff(before: dict[str, Any], now: dict[str, Any], *, free: Collection[str] = ()) -> str:
    """The fields in which two descriptions differ, both values told, or nothing; those in `free` may differ."""
    was = _flatten(before)
    return ", ".join(
        f"{name} was {was[name]!r} and is {value!r}"
        for name, value in _flatten(now).items()
        # A field that an older version did not write had no choice then.
        if name in was and was[name] != value and name.split(".")[0] not in free
    )


def write(file: Path, text: str) -> None:
    """Write a whole file or, if killed, nothing."""
    unfinished = file.with_name(f"{file.name}.partial")
    unfinished.write_text(text)
    unfinished.replace(file)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = [_flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v} for k, v in tree.items()]
    return {name: value for part in parts for name, value in part.items()}
