"""`ditx study GRID`: train a grid of networks under one budget, evaluate each, and set them side by side."""

import csv
import io
import json
import multiprocessing
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import ditx
from ditx import costs, plots
from ditx.commands import evaluate
from ditx.commands.extract import stop_signals
from ditx.evaluation.reference import read_reference
from ditx.grids import GRIDS, Grid
from ditx.nn.dit import DiTConfig
from ditx.training import checkpoint
from ditx.training import run as runs


@dataclass(frozen=True)
class Config:
    """Which networks, and where they go. The same command, started again, goes on; what is done is not done again.

    digits: small networks on the embedded digits, some minutes on two CPU cores. sizes: S/8 to B/2 on CIFAR-10, for a
    GPU. blocks: the four designs of the block in S/2 on CIFAR-10. Flags after -- are handed to train.py.
    """

    grid: Annotated[tyro.conf.Positional[Literal["digits", "sizes", "blocks"]], tyro.conf.arg(metavar="GRID")]
    """digits, sizes or blocks"""
    data_path: str = ""
    """where CIFAR-10 lies: its batches, an .npz or a folder"""
    out: str = ""
    """folder to write to, or to go on in; studies/GRID if not given"""
    only: tuple[str, ...] = ()
    """networks to train and evaluate now, by name; all if not given"""
    list: bool = False
    """print what is done and what is not, and end"""
    reference: str = ""
    """statistics to judge by; made from the data, into the folder, if not given"""
    inception: str = ""
    """file of the Inception weights; pytorch-fid's, fetched once, if not given"""
    steps: int = 0
    """training steps of each, in place of the grid's"""
    every: int = 0
    """steps between evaluations along training, in place of the grid's"""
    num: int = 0
    """samples of each evaluation, in place of the grid's"""


def main(argv: list[str]) -> int:
    """Train and evaluate what is missing, and write what is there; returns the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    description = "Networks of many kinds, trained alike and judged alike, side by side."
    config = tyro.cli(Config, args=argv[:split], prog="ditx study", description=description)
    study = Study.of(config, argv[split + 1 :])
    if config.list:
        print("\n".join(f"{name:<20} {study.told(name)}" for name in study.grid.networks))
        return 0
    try:
        with stop_signals():
            study.make_reference(config)
            for name in config.only or study.grid.networks:
                print(f"\n== {name}: {study.told(name)}", flush=True)
                study.train(name)
                _apart(study.evaluate, name)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command goes on from there", flush=True)
        return 128 + int(stopped.args[0])
    print(f"\n{(study.out / 'table.md').read_text()}\nwrote {study.out}/table.md, .csv, .json")
    try:
        written = plots.write(study.out, json.loads((study.out / "table.json").read_text()))
        print(f"wrote {', '.join(str(path) for path in written)}")
    except ModuleNotFoundError:
        print("no plots, for which matplotlib is needed: put --extra plot after uv run, or pip install matplotlib")
    return 0


def _apart(function: Callable[..., Any], argument: Any) -> None:
    """Call it in a process of its own, so that none of a GPU's memory is held while the next network is trained."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(function, argument).result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()  # It goes on from its last batch.
            raise
        except BrokenProcessPool as error:
            raise ValueError("the evaluation was killed, perhaps for want of memory; start the study again") from error


@dataclass(frozen=True)
class Study:
    """A grid in a folder."""

    grid: Grid
    out: Path
    script: Path
    """train.py"""
    data_path: str
    reference: Path
    inception: str
    flags: tuple[str, ...]
    """of train.py, beyond the grid's"""

    @classmethod
    def of(cls, config: Config, flags: list[str]) -> "Study":
        """What the command line describes. Raises ValueError where it cannot be."""
        changes = {name: getattr(config, name) for name in ("steps", "every", "num") if getattr(config, name)}
        grid = replace(GRIDS[config.grid], **changes)
        for name in ("steps", "every"):
            if getattr(grid, name) < 1:
                raise ValueError(f"{name} is {getattr(grid, name)}; it must be at least 1")
        unknown = [name for name in config.only if name not in grid.networks]
        if unknown:
            raise ValueError(f"there is no network {unknown[0]!r} in {config.grid}; choose {', '.join(grid.networks)}")
        script = Path(ditx.__file__).parents[1] / "train.py"
        if not script.is_file():
            raise ValueError(f"{script} is not there; a study runs train.py, which a clone of the repository has")
        if grid.preset != "digits" and not (config.data_path or config.list):
            raise ValueError(f"{config.grid} is of CIFAR-10; say where it lies with --data-path")
        out = Path(config.out or f"studies/{config.grid}")
        reference = Path(config.reference) if config.reference else out / "reference.npz"
        return cls(grid, out, script, config.data_path, reference, config.inception, tuple(flags))

    def run(self, name: str) -> Path:
        """The folder of a network's run."""
        return self.out / "runs" / re.sub(r"\W+", "-", name)

    def results(self, name: str) -> Path:
        """The folder of its evaluations, which those that others make of the run do not reach."""
        return self.out / "evaluations" / self.run(name).name

    def make_reference(self, config: Config) -> None:
        """Make the statistics, where they are not there and not given."""
        if config.reference or self.reference.exists():
            return
        flags = ["--features", self.grid.features, "--make-stats", str(self.reference)]
        source = self.data_path if self.grid.preset != "digits" else "digits"
        flags += ["--inception", self.inception] if self.inception else []
        _apart(evaluate.main, [source, *flags])

    def steps(self) -> list[int]:
        """Those after which a network is judged."""
        return [*range(self.grid.every, self.grid.steps, self.grid.every), self.grid.steps]

    def points(self) -> list[tuple[int, int]]:
        """All evaluations of a network: its step, and the steps of sampling."""
        usual, *others = self.grid.sampling_steps
        return [*((step, usual) for step in self.steps()), *((self.grid.steps, each) for each in others)]

    def told(self, name: str) -> str:
        """How far a network has come."""
        steps, rows = checkpoint.steps(self.run(name) / "checkpoints"), self.found(name)
        trained = f"step {max(steps, default=0):,} of {self.grid.steps:,}"
        return f"{trained}, {len(rows)} of {len(self.points())} evaluations"

    def train(self, name: str) -> None:
        """Have train.py bring a run to its last step."""
        done = checkpoint.steps(self.run(name) / "checkpoints")
        if done:
            planned = runs.read_config(self.run(name))
            if planned["decay"] != "constant" and planned["steps"] != self.grid.steps:
                raise ValueError(
                    f"{self.run(name)} is a run of {planned['steps']:,} steps, with a learning rate that falls over"
                    f" them, and not of {self.grid.steps:,}; give another --out"
                )
        if self.grid.steps in done and not self.flags:  # which train.py holds against the run's own
            return
        every = str(self.grid.every)
        flags = ["--run", str(self.run(name)), "--steps", str(self.grid.steps), "--sample-every", "0"]
        flags += ["--checkpoint-every", every, "--keep-every", every]
        flags += ["--data-path", self.data_path] if self.data_path else []
        command = [sys.executable, str(self.script), self.grid.preset, *self.grid.flags, *self.grid.networks[name]]
        process = subprocess.Popen([*command, *flags, *self.flags])
        try:
            code = process.wait()
        except KeyboardInterrupt as stopped:
            # Ctrl-C reaches it as well; it ends with a checkpoint.
            if stopped.args[0] == signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        if code:
            raise ValueError(f"train.py ended with {code} for {name}, for the reason above; start the study again")

    def evaluate(self, name: str) -> None:
        """Make all evaluations of a network that are missing, and write the tables."""
        for step, sampling_steps in self.points():
            flags = [
                *self.grid.drawing,
                "--num",
                str(self.grid.num),
                "--step",
                str(step),
                "--steps",
                str(sampling_steps),
            ]
            flags += ["--inception", self.inception] if self.inception else []
            flags += ["--out", str(self.results(name))]
            config, described = evaluate.parse([str(self.run(name)), str(self.reference), *flags])
            config.check()
            result = evaluate.evaluate(config, described)
            values = ", ".join(f"{metric} {value:.4g}" for metric, value in result["metrics"].items())
            print(f"{name} at step {step:,}, {sampling_steps} steps of sampling: {values}", flush=True)
        self.write()

    def found(self, name: str) -> list[dict[str, Any]]:
        """The evaluations of a network that are there, as rows of the table."""
        if not self.reference.is_file():
            return []
        checksum, rows = evaluate.checksum(self.reference), {}
        for line in runs.read_lines(self.results(name) / evaluate.RESULTS):
            point = line["samples"]["step"], line["samples"]["steps"]
            if point in self.points() and (line["count"], line["reference"]["checksum"]) == (self.grid.num, checksum):
                rows[point] = {"network": name, "step": point[0], "sampling_steps": point[1], **line["metrics"]}
        return [rows[point] for point in self.points() if point in rows]

    def write(self) -> None:
        """Write all that was found, of all networks, as three tables."""
        rows, steps, usual = [], self.grid.steps, self.grid.sampling_steps[0]
        for name in self.grid.networks:
            found = self.found(name)
            if not found:
                continue
            described = runs.read_config(self.run(name))
            model = DiTConfig(**described["model"])
            own = {"block": model.block, "parameters": costs.parameters(model), "gflops": costs.macs(model) / 1e9}
            batch = described["batch_size"]
            for row in found:
                training = costs.training_step(model, batch) * row["step"]
                rows.append({"network": name, **own, "training_flops": training, **row})
        final = [row for row in rows if (row["step"], row["sampling_steps"]) == (steps, usual)]
        sizes = [row for row in final if row["block"] == "adaln-zero"]
        with_size = correlation([row["gflops"] for row in sizes], [row["fid"] for row in sizes])
        table = {
            "steps": steps,
            "samples": self.grid.num,
            "sampling_steps": usual,
            "features": read_reference(self.reference).features,
            "correlation_of_fid_with_log_gflops": with_size,
            "rows": rows,
        }
        runs.write(self.out / "table.json", json.dumps(table, indent=1) + "\n")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        runs.write(self.out / "table.csv", text.getvalue())
        runs.write(self.out / "table.md", _markdown(final, table))


def correlation(gflops: list[float], fids: list[float]) -> float | None:
    """Of FID with log Gflops (Peebles and Xie 2022, Figure 8); none of fewer than 3 networks."""
    if len(set(gflops)) < 3:
        return None
    return float(np.corrcoef(np.log(gflops), fids)[0, 1])


def _markdown(final: list[dict[str, Any]], table: dict[str, Any]) -> str:
    metrics = (
        [name for name in ("fid", "sfid", "inception_score", "precision", "recall") if name in final[0]]
        if final
        else []
    )
    columns = ("network", "block", "parameters", "Gflops", *metrics)
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in final:
        values = [f"{row[name]:.4g}" for name in metrics]
        lines.append(
            " | ".join([row["network"], row["block"], f"{row['parameters']:,}", f"{row['gflops']:.4g}", *values])
        )
    said = (
        f"After {table['steps']:,} steps; {table['samples']:,} samples in {table['sampling_steps']} steps, features of"
    )
    said += f" {table['features']}."
    if table["correlation_of_fid_with_log_gflops"] is not None:
        said += f" Correlation of FID with log Gflops: {table['correlation_of_fid_with_log_gflops']:.3f}."
    return "\n".join([*(f"| {line} |" for line in lines), "", said, ""])
