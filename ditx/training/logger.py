"""Metrics of a run on the console, in `metrics.jsonl` and in Weights & Biases; the guard against divergence; traces."""

import importlib
import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from ditx.parallel.distributed import is_main_process, max_across_processes
from ditx.training import run as runs
from ditx.training.config import Config
from ditx.training.run import Sums

T = TypeVar("T")

MAX_SKIPPED = 10  # updates in a row, after which a run ends
SLOW_DATA = 0.1  # share of the time, from which waiting for data is worth a warning
_PROFILE_AFTER = 3  # steps; the first ones allocate


class MetricsLogger:
    """Sums the terms that steps return, writes their means as lines of metrics, and ends a run that diverges.

    Terms are read one step late, so that the host never waits for the device. `sums` are of the steps since the last
    line; a checkpoint keeps them, so that a resumed run writes the same lines. All processes call it alike; the main
    one writes.
    """

    def __init__(self, folder: Path, config: Config, sums: Sums, start: int = 0):
        self.step, self.consecutive_skips, self.sums = start, 0, sums
        self._config, self._last_loss, self._slow_data = config, None, False
        self._pending: tuple[int, Any] | None = None
        main = is_main_process()
        self._file = (folder / runs.METRICS).open("a") if main else None
        self._wandb = _open_wandb(folder, config) if main and config.wandb else None
        self.bar = tqdm(
            total=config.steps,
            initial=start,
            disable=None if main else True,  # None: only on a terminal; elsewhere lines are printed
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._restart_clock(start)

    def close(self) -> None:
        """Close the files and the progress bar."""
        self.bar.close()
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time spent waiting for them counted."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def add(self, step: int, terms: Mapping[str, Any]) -> None:
        """Take the terms of a step, to be read when the next one is under way.

        Raises ValueError if `MAX_SKIPPED` updates in a row were skipped.
        """
        self.settle()
        self.step, self._pending = step, (step, terms)
        loss = self.mean_loss()
        if loss is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {self.speed():.0f} images/s", refresh=False)
        self.bar.update()

    def settle(self) -> None:
        """Read the terms taken last and add them to the sums; of a skipped update, only count that it was skipped."""
        if self._pending is None:
            return
        (step, terms), self._pending = jax.device_get(self._pending), None
        if not terms["skipped"]:
            self.consecutive_skips = 0
            terms = {"count": 1, **terms}
            self.sums = {name: total + terms[name] for name, total in self.sums.items()}
            return
        self.consecutive_skips += 1
        self.sums = self.sums | {"skipped": self.sums["skipped"] + 1}
        numbers = f"loss {terms['loss']}, gradient norm {terms['grad_norm']}, seed {self._config.seed}"
        if self.consecutive_skips >= MAX_SKIPPED:
            raise ValueError(
                f"{self.consecutive_skips} updates in a row were skipped, up to step {step:,} ({numbers}); weights and"
                " checkpoints are from before; try a lower --learning-rate or --dtype float32 in another --run"
            )
        _warn(f"step {step:,} is not finite ({numbers}); its update is skipped")

    def skipping(self) -> bool:
        """Whether the last update was skipped."""
        self.settle()
        return self.consecutive_skips > 0

    def mean_loss(self) -> float | None:
        """Mean loss of the updates since the last line; right after it, of that line; None if there was no update."""
        return float(self.sums["loss"] / self.sums["count"]) if self.sums["count"] else self._last_loss

    def speed(self) -> float:
        """Images a second since the last line or pause."""
        return (self.step - self._since) * self._config.batch_size / (time.perf_counter() - self._clock)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count as training."""
        self.settle()
        yield
        self._restart_clock(self.step)

    def write(self) -> dict[str, Any]:
        """Write a line of metrics for the last step, on the console too, and start new sums.

        The line has the means, null if every update was skipped; images a second; the share of time spent waiting for
        data, of the slowest process; peak device memory, where it is known; and for each of ten ranges of time the
        mean loss and the number of examples.
        """
        self.settle()
        config, passed = self._config, time.perf_counter() - self._clock
        count, skipped, speed = self.sums["count"], int(self.sums["skipped"]), self.speed()
        means = {
            name: float(total / count) if count else None
            for name, total in self.sums.items()
            if name not in ("count", "skipped", "by_time")
        }
        wait, self._last_loss = max_across_processes(self._waited / passed), means["loss"]
        line = {"step": self.step, **means, "skipped": skipped, "images_per_second": round(speed, 1)}
        line["data_wait"] = round(wait, 3)
        if "by_time" in self.sums:
            shares, losses = self.sums["by_time"].tolist()
            line["loss_by_time"] = [loss / share if share else None for share, loss in zip(shares, losses, strict=True)]
            line["count_by_time"] = [round(share * config.batch_size) for share in shares]
        memory = jax.local_devices()[0].memory_stats() or {}
        line |= {"peak_memory": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {}
        if wait > SLOW_DATA and not self._slow_data:
            _warn(f"{wait:.0%} of the time since the last line was spent waiting for data; try more --workers")
        self._slow_data = wait > SLOW_DATA
        self._write(line)
        if self.bar.disable:
            loss = "none" if means["loss"] is None else f"{means['loss']:.4f}"
            left = (config.steps - self.step) * config.batch_size / max(speed, 1e-9)
            print(f"step {self.step:,}  loss {loss}  {speed:.0f} images/s  {left:.0f} s left", flush=True)
        self.sums = {name: np.zeros_like(total) for name, total in self.sums.items()}
        self._restart_clock(self.step)
        return line

    def log(self, results: Mapping[str, Any]) -> None:
        """Write results of the last step that are not measured at every step: numbers, and pictures for W&B."""
        numbers = {name: value for name, value in results.items() if isinstance(value, float)}
        if numbers:
            self._write({"step": self.step, **numbers})
            named = ", ".join(f"{name.upper()} {value:.4f}" for name, value in numbers.items())
            self.bar.write(f"step {self.step:,}  {named}")
        for name, value in results.items():
            if self._wandb and isinstance(value, Path):
                self._wandb.log({name: importlib.import_module("wandb").Image(str(value))}, step=self.step)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()  # one write, which a kill does not cut
        if self._wandb:
            self._wandb.log({name: value for name, value in line.items() if value is not None}, step=line["step"])

    def _restart_clock(self, step: int) -> None:
        self._clock, self._since, self._waited = time.perf_counter(), step, 0.0


class Profiler:
    """A trace of `count` steps soon after `start`, for TensorBoard or Perfetto; no trace if `count` is 0."""

    def __init__(self, folder: Path, start: int, last: int, count: int):
        self._first = max(start + 1, min(start + 1 + _PROFILE_AFTER, last - count + 1))
        self._folder, self._last, self._running = folder, self._first + count - 1, False

    def before(self, step: int) -> None:
        """Start at the first step of the trace."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Stop after the last step of the trace, when its `result` is computed."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write the trace."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile   {self._folder}, for xprof or TensorBoard", flush=True)


def _open_wandb(folder: Path, config: Config) -> Any:
    # One id for the run, so that a resumed run continues there too.
    file = folder / "wandb-id"
    if not file.exists():
        runs.write(file, secrets.token_hex(8))
    options: dict[str, Any] = {"name": folder.name, "id": file.read_text(), "resume": "allow", "dir": folder}
    return importlib.import_module("wandb").init(project=config.wandb, config=asdict(config), **options)


def _warn(sentence: str) -> None:
    if is_main_process():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
