"""The folder of a run: `config.json`, `metrics.jsonl`, checkpoints, pictures, averages, and the lock of its writer."""

import json
import math
import shlex
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from ditx import pictures
from ditx.cli import script
from ditx.files import check_writable, lock, make_folder, write_atomically
from ditx.parallel.distributed import assert_same_everywhere, broadcast_from_main, is_main_process, sync_errors
from ditx.training import checkpoint
from ditx.training.config import Config
from ditx.training.step import TrainState

CONFIG, METRICS = "config.json", "metrics.jsonl"
Sums = dict[str, Any]  # arrays and NumPy numbers, by name of a term


class Run:
    """A run's folder, which no other process can train in until `close`."""

    def __init__(self, config: Config, held: IO[str] | None):
        self.folder, self._config, self._lock = Path(config.run), config, held
        self._checkpoints: checkpoint.Checkpoints | None = None
        self._saved = -1

    @staticmethod
    def check(config: Config, described: dict[str, Any]) -> bool:
        """Whether the run `config.run` is finished. Raises ValueError as `open` does for other runs; writes nothing."""
        own = ("data_path", "distributed")  # may differ between processes
        assert_same_everywhere({name: value for name, value in described.items() if name not in own})
        folder, reached = Path(config.run), 0
        with sync_errors():
            if is_main_process():
                check_run(folder, described, changeable=config.changeable_on_resume)
                check_writable(folder)
                reached = max(checkpoint.steps(folder / "checkpoints"), default=0)
                if reached > config.steps:
                    raise ValueError(f"{folder} has come to step {reached:,}; give at least --steps {reached}")
        return broadcast_from_main(reached) == config.steps

    @classmethod
    def open(cls, config: Config, described: dict[str, Any]) -> "Run":
        """Make the folder `config.run`, or open it to resume, in all processes alike.

        Raises ValueError if it holds another run, or anything else; if another process trains in it; or if the
        processes do not share it.
        """
        folder, held = Path(config.run), None
        with sync_errors():
            if is_main_process():
                held = open_run(folder, described, changeable=config.changeable_on_resume)
        token = str(broadcast_from_main(time.time_ns() % 2**31))
        with sync_errors():
            if is_main_process():
                write(folder / "shared", token)
        with sync_errors():
            if not (folder / "shared").exists() or (folder / "shared").read_text() != token:
                raise ValueError(f"{folder} is not shared with process 0; give a --run that all processes share")
        return cls(config, held)

    def close(self) -> None:
        """Wait for the last checkpoint, and unlock the folder."""
        try:
            if self._checkpoints:
                self._checkpoints.close()
        finally:
            if self._lock:
                self._lock.close()

    def restore(self, shapes: TrainState, sums: Sums) -> tuple[TrainState, Sums, int] | None:
        """State, metric sums and step of the newest sound checkpoint, on the devices of `shapes`; None in a new run.

        A damaged checkpoint is reported, renamed and skipped. Raises ValueError if none is sound, or if
        there is none although the metrics show that one was written.
        """
        folder = self.folder / "checkpoints"
        restored = checkpoint.load_newest(folder, _parts(shapes) | {"metric_sums": sums})
        if restored is None:
            reached = max((line["step"] for line in read_metrics(self.folder)), default=0)
            with sync_errors():
                # Each save waits for the one before it, so that a kill cannot cause this.
                if reached >= 2 * self._config.checkpoint_every or self._curve.exists():
                    raise ValueError(
                        f"{self.folder} has come to step {reached:,} but has no checkpoint; bring back {folder}, or"
                        " choose another --run"
                    )
            return None
        step, trees, damaged = restored
        for number, sentence in damaged:
            aside = checkpoint.quarantine(folder, number)
            print(f"warning: {sentence}; moved to {aside}, going back to step {step:,}", file=sys.stderr)
        sums = jax.tree.map(np.asarray, trees.pop("metric_sums"))
        return TrainState(**trees), sums, step

    def start(self, step: int) -> None:
        """Prepare to train after `step`: drop the later lines of metrics, and curves of a shorter run."""
        config = self._config
        with sync_errors():
            if is_main_process():
                for file in (self._curve, *self.folder.glob("averages/*.partial")):
                    file.unlink(missing_ok=True)
                trim_metrics(self.folder, step)
        self._checkpoints = checkpoint.Checkpoints(
            self.folder / "checkpoints",
            keep=config.keep,
            keep_every=config.keep_every,
            keep_best=max(config.keep_best, config.eval_every > 0),
            best="fid" if config.eval_every else "loss",
            described=read_config(self.folder),
        )

    def save(self, step: int, state: TrainState, sums: Sums, **metrics: float | None) -> None:
        """Start to write the checkpoint of `step`, unless there is one."""
        if self._checkpoints and step != self._saved:
            self._checkpoints.save(step, _parts(state) | {"metric_sums": sums}, metrics=metrics)
            self._saved = step

    def picture(self, step: int) -> Path:
        """The file of the samples of a step."""
        return self.folder / "samples" / f"step-{step:07d}.png"

    def write_loss_curve(self) -> None:
        """Draw the loss over training and by time, unless it is there; matplotlib is needed."""
        if not is_main_process() or self._curve.exists():
            return
        lines = [
            {"loss_by_time": [], "count_by_time": [], **line} for line in read_metrics(self.folder) if "loss" in line
        ]
        names = ("step", "loss", "loss_by_time", "count_by_time")
        steps, losses, by_time, counts = (np.array([line[name] for line in lines], np.float64) for name in names)
        try:
            pictures.write_loss_curve(self._curve, steps, losses, by_time, counts)
        except ModuleNotFoundError:
            print("no loss curve, which needs matplotlib: use `uv run --extra plot ...`, or pip install matplotlib")

    @property
    def _curve(self) -> Path:
        return self.folder / "loss.png"


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that have arrays, each a tree of its own in a checkpoint."""
    parts = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def check_run(run: Path, described: dict[str, Any], *, changeable: Collection[str]) -> None:
    """Raise ValueError if `run` holds another run than the one described, or anything else.

    Fields in `changeable` may differ.
    """
    if (run / CONFIG).exists():
        before, now = read_config(run), json.loads(json.dumps(described))
        changed = diff(before, now, ignore=changeable)
        data = {"data_checksum", "class_names", "latents", "model.num_classes"}
        if not changed:
            return
        remedy = "give its flags to resume it, or another --run"
        more = described["steps"] - before["steps"]
        if "data_checksum" in changed and not diff(before, now, ignore={*changeable, *data}):
            remedy = f"bring the data back, or train in another --run, which --init-from {run} can start from"
        elif diff(before, now, ignore=now.keys() - {"jax"}):
            remedy = "set JAX_ENABLE_X64 and JAX_DEFAULT_PRNG_IMPL as they were, or give another --run"
        elif diff(before, now, ignore=now.keys() - {"own"}):
            remedy = "resume it by the program that passes its own pieces to train, or give another --run"
        elif more > 0 and not diff(before, now, ignore={*changeable, "steps"}):
            command = shlex.join([*script("train").split(), "--resume", str(run), "--init-from", str(run)])
            remedy = "at its end the learning rate is 0; train on from its weights in a new run with: "
            remedy += f"{command} --run {shlex.quote(f'{run}-longer')} --steps {more}"
        raise ValueError(f"{run} holds another run: {changed}; {remedy}")
    if run.exists() and not (run.is_dir() and all(_left_by_a_kill(entry.name) for entry in run.iterdir())):
        raise ValueError(f"{run} exists and is not a run; choose another --run")


def _left_by_a_kill(name: str) -> bool:
    return name == "lock" or (name.startswith(CONFIG) and name.endswith(".partial"))


def open_run(run: Path, described: dict[str, Any], *, changeable: Collection[str] = ()) -> IO[str]:
    """Make or check the folder of a run, write its description, and return its lock.

    The lock is held until it is closed or the process ends. Raises ValueError as `check_run` does, and if another
    process holds the lock.
    """
    check_run(run, described, changeable=changeable)
    make_folder(run)
    held = lock(run / "lock", f"another process is training in {run}; wait for it, or choose another --run")
    versions = {name: version(name) for name in ("ditx", "jax", "equinox", "optax", "orbax-checkpoint")}
    write(run / CONFIG, json.dumps(described | {"versions": versions}, indent=2) + "\n")
    return held


def read_config(run: Path) -> dict[str, Any]:
    """The description of a run. Raises ValueError if there is none that can be read."""
    try:
        return json.loads((run / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run} is not a readable run ({error}); give the folder that {script('train')} wrote"
        ) from error


def newest_run(root: Path) -> Path:
    """The run under `root` that was trained last. Raises ValueError if there is none."""
    runs = [file.parent for file in root.glob(f"*/{CONFIG}")]
    if not runs:
        raise ValueError(f"there is no run under {root}/; train one with {script('train')}, or give the folder of one")
    # Not by the folder's own time, which changes when samples are drawn into an older run.
    return max(runs, key=lambda run: max(file.stat().st_mtime for name in (CONFIG, METRICS) for file in run.glob(name)))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return read_lines(run / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, without one that a kill has cut off; none if there is no file."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def trim_metrics(run: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line.get("step", math.inf) <= step]
    write(run / METRICS, "".join(kept))


def average_file(run: Path, step: int, length: float) -> Path:
    """The file of a power-function EMA in a run, by its step and relative length."""
    return run / "averages" / f"{step:07d}-{length}.safetensors"


def stored_averages(run: Path) -> list[tuple[int, float]]:
    """Step and relative length of each stored power-function EMA."""
    names = sorted(file.stem.split("-", 1) for file in run.glob("averages/[0-9]*-*.safetensors"))
    return [(int(step), float(length)) for step, length in names]


def diff(before: dict[str, Any], now: dict[str, Any], *, ignore: Collection[str] = ()) -> str:
    """The fields that differ between two descriptions, with both values; empty if none but those in `ignore` do."""
    was = _flatten(before)
    return ", ".join(
        f"{name} was {was[name]!r:.200} and is {value!r:.200}"
        for name, value in _flatten(now).items()
        # A field that an older version did not write could not be set in that version.
        if name in was and was[name] != value and not {name, name.split(".")[0]} & set(ignore)
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = [_flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v} for k, v in tree.items()]
    return {name: value for part in parts for name, value in part.items()}


def write(file: Path, text: str) -> None:
    """Write a text file whole or, if killed, not at all."""
    with write_atomically(file) as stream:
        stream.write(text.encode())
