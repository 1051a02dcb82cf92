"""What a run tells of itself while it goes on: its losses, speed, waits and memory, updates that failed, a profile."""

import importlib.util
import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ditx.parallel.distributed import is_main_process, max_across_processes
from ditx.training import run as runs

T = TypeVar("T")
Sums = dict[str, np.ndarray]

WAIT_WORTH_SAYING = 0.1
_PROFILE_AFTER = 3  # steps; the first ones allocate


class MetricsLogger:
    """Sums up what the steps of a run return, writes the means as lines of metrics, and ends a run that diverges.

    `sums` are those since the last line; a checkpoint keeps them, so that a resumed run writes the same lines. Updates
    skipped `in_a_row` are counted up to now. Several processes call it alike, and the first one writes.
    """

    def __init__(
        self,
        run: Path,
        sums: Sums,
        *,
        step: int,
        batch_size: int,
        seed: int,
        max_skipped: int,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.sums, self.speed, self.consecutive_skips, self._last_loss = sums, 0.0, 0, None
        self._batch_size, self._seed, self._max_skipped = batch_size, seed, max_skipped
        self._waited, self._waits = 0.0, False
        self._clock, self._since = time.perf_counter(), step
        self._file = (run / runs.METRICS).open("a") if is_main_process() else None
        self._wandb = _open_wandb(wandb, run, config) if wandb and is_main_process() else None

    def close(self) -> None:
        """Close the files."""
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time counted for which they are waited for."""
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - began
            yield batch

    def add(self, step: int, terms: Mapping[str, Any]) -> None:
        """Add what step number `step` returned; of an update that was skipped, that it was.

        Raises ValueError when `max_skipped` in a row were.
        """
        if not terms["skipped"]:
            self.consecutive_skips = 0
            terms = {"count": 1, **terms}
            self.sums = {name: total + terms[name] for name, total in self.sums.items()}
            return
        self.consecutive_skips += 1
        self.sums = self.sums | {"skipped": self.sums["skipped"] + 1}
        what = f"loss {terms['loss']}, norm of the gradients {terms['grad_norm']}"
        if self.consecutive_skips >= self._max_skipped:
            raise ValueError(
                f"{self.consecutive_skips} updates in a row were skipped, up to step {step:,}"
                f" ({what}; seed {self._seed}); weights and checkpoints are those from before; try a lower --learning-rate or --dtype float32 in"
                " another --run"
            )
        _say(f"step {step:,} is not finite ({what}; seed {self._seed}); its update is skipped")

    def mean_loss(self) -> float | None:
        """Of the steps since the last line or, right after it, that of the line; None where no update was made."""
        return float(self.sums["loss"] / self.sums["count"]) if self.sums["count"] else self._last_loss

    def measure(self, step: int) -> float:
        """Images a second since the last line, or since the last pause."""
        self.speed = (step - self._since) * self._batch_size / (time.perf_counter() - self._clock)
        return self.speed

    @contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """Time that is not the training's, after step number `step`."""
        yield
        self._clock, self._since, self._waited = time.perf_counter(), step, 0.0

    def write(self, step: int) -> dict[str, Any]:
        """Write the line of step number `step`, and start anew.

        It has the means, or null where all updates were skipped; images a second; the share of the time for which data
        was waited for, of the process that waited longest; and peak memory, where the device tells it.
        Of each range of time, it has the mean loss and the number of examples.
        """
        passed = time.perf_counter() - self._clock
        count, skipped = self.sums["count"], int(self.sums["skipped"])
        means = {
            name: float(total / count) if count else None
            for name, total in self.sums.items()
            if name not in ("count", "skipped", "by_time")
        }
        share, self._last_loss = max_across_processes(self._waited / passed), means["loss"]
        line = {"step": step, **means, "skipped": skipped, "images_per_second": round(self.measure(step), 1)}
        line |= {"data_wait": round(share, 3)}
        if "by_time" in self.sums:
            shares, losses = self.sums["by_time"].tolist()
            line["loss_by_time"] = [loss / share if share else None for share, loss in zip(shares, losses, strict=True)]
            line["count_by_time"] = [round(share * self._batch_size) for share in shares]
        memory = jax.local_devices()[0].memory_stats() or {}
        line |= {"peak_memory": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {}
        if share > WAIT_WORTH_SAYING and not self._waits:
            _say(f"{share:.0%} of the time since the last line was spent waiting for data; try more --workers")
        self._waits = share > WAIT_WORTH_SAYING
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()  # one write of one line, which a kill does not cut
        if self._wandb:
            self._wandb.log({name: value for name, value in line.items() if value is not None}, step=step)
        self.sums = {name: np.zeros_like(total) for name, total in self.sums.items()}
        self._clock, self._since, self._waited = time.perf_counter(), step, 0.0
        return line

    def note(self, step: int, **values: float) -> None:
        """Write a line of what is not measured at every step."""
        if self._file:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._wandb:
            self._wandb.log(values, step=step)

    def show(self, step: int, path: Path) -> None:
        """Have a picture appear beside the metrics."""
        if self._wandb:
            image = importlib.import_module("wandb").Image(str(path))
            self._wandb.log({"samples": image}, step=step)


class Profiler:
    """A trace of `count` of the steps `first` to `last`, for TensorBoard or Perfetto; none if it is 0."""

    def __init__(self, folder: Path, first: int, last: int, count: int):
        self._first = max(first, min(first + _PROFILE_AFTER, last - count + 1))
        self._folder, self._last, self._running = folder, self._first + count - 1, False

    def before(self, step: int) -> None:
        """Start at the first step of the trace."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Stop at the last step of the trace, when its `result` is there."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what has been traced."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile  {self._folder}, for xprof or TensorBoard", flush=True)


def check_wandb() -> None:
    """Raise ValueError if wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is not installed; put --extra wandb after uv run, or pip install wandb")


def _open_wandb(project: str, run: Path, config: Mapping[str, Any] | None) -> Any:
    # Its own name for the run, made once, so that a resumed run goes on there, too.
    file = run / "wandb-id"
    if not file.exists():
        runs.write(file, secrets.token_hex(8))
    wandb = importlib.import_module("wandb")
    return wandb.init(project=project, name=run.name, id=file.read_text(), resume="allow", dir=run, config=config)


def _say(sentence: str) -> None:
    if is_main_process():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
