"""`ditx study GRID`: train a grid of networks under one budget, evaluate each, and compare them in tables and plots."""

import csv
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from ditx import checks, cli, costs
from ditx.commands import evaluate
from ditx.evaluation.reference import read_reference
from ditx.files import checksum
from ditx.nn.dit import DiTConfig
from ditx.training import checkpoint
from ditx.training import run as runs

Row = dict[str, Any]
_KILLED = "the evaluation was killed, probably out of memory; run the study again"


@dataclass(frozen=True)
class Grid:
    """Networks trained with the same flags, and how each is evaluated."""

    preset: str
    """preset of train.py"""
    flags: str
    """flags of train.py for all networks"""
    networks: dict[str, str]
    """flags of train.py for each network, by its name"""
    steps: int
    every: int
    """training steps between evaluations"""
    num_samples: int
    """samples of each evaluation"""
    evaluation: str
    """flags of ditx evaluate for all networks"""
    sampling_steps: tuple[int, ...]
    """sampling steps of all evaluations, then further numbers of steps for the final weights only"""
    features: Literal["inception", "classifier"] = "inception"


# Width, depth and heads: tiny, medium, the digits preset's, and the paper's S and B.
_SIZES = {"T": (32, 2, 2), "M": (64, 3, 4), "D": (128, 4, 4), "S": (384, 12, 6), "B": (768, 12, 12)}
_BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")


def _networks(sizes: str, patches: tuple[int, ...], blocks: tuple[str, ...] = ()) -> dict[str, str]:
    """Flags by name of network: `B/2` or, where blocks are given, `B/2 adaln`."""
    networks = {}
    for patch, size, block in product(patches, sizes, blocks or _BLOCKS[:1]):
        shape = zip(
            ("hidden-size", "depth", "num-heads", "patch-size", "block"), (*_SIZES[size], patch, block), strict=True
        )
        flags = " ".join(f"--model.{name} {value}" for name, value in shape)
        networks[f"{size}/{patch} {block}" if blocks else f"{size}/{patch}"] = flags
    return networks


_CIFAR10 = Grid(
    preset="cifar10",
    flags="--schedule linear --prediction eps --model.learn-sigma --decay constant --warmup 500",  # as in the paper
    networks=_networks("SB", (8, 4, 2)),
    steps=10_000,
    every=2_500,
    num_samples=10_000,
    evaluation="--sampler ddpm --dtype bfloat16 --batch 500 --feature-batch 250",
    sampling_steps=(128, 16, 32, 64),
)
GRIDS = {
    "digits": Grid(
        preset="digits",
        flags="",
        networks=_networks("TMD", (14, 7)) | _networks("M", (7,), _BLOCKS[1:]),
        steps=2000,
        every=500,
        num_samples=2000,
        evaluation="--sampler euler",
        sampling_steps=(16, 2, 4, 8),
        features="classifier",
    ),
    "sizes": _CIFAR10,
    "blocks": replace(_CIFAR10, networks=_networks("S", (2,), _BLOCKS)),
}


@dataclass(frozen=True)
class Study:
    """A grid and its folder. The same command resumes a study and repeats nothing that is done.

    digits: small networks on the embedded digits, some minutes on two CPU cores. sizes: S/8 to B/2 on CIFAR-10, for a
    GPU. blocks: the four designs of the block in S/2 on CIFAR-10. Flags after -- are passed to train.py.
    """

    grid: Annotated[tyro.conf.Positional[Literal["digits", "sizes", "blocks"]], tyro.conf.arg(metavar="GRID")]
    """digits, sizes or blocks"""
    data_path: str = ""
    """CIFAR-10: its batches, an .npz or a folder"""
    out: str = ""
    """output folder; studies/GRID if not given"""
    only: tuple[str, ...] = ()
    """train and evaluate these networks only, by name"""
    list: bool = False
    """print the progress of each network and exit"""
    reference: str = ""
    """reference statistics; computed from the data, into the output folder, if not given"""
    inception: str = ""
    """file of the Inception weights; pytorch-fid's, downloaded once, if not given"""
    steps: int = 0
    """training steps of each network; 0 takes the grid's number"""
    every: int = 0
    """training steps between evaluations; 0 takes the grid's number"""
    num_samples: int = 0
    """samples of each evaluation; 0 takes the grid's number"""
    plan: tyro.conf.Suppress[Grid] = GRIDS["digits"]
    """the grid with the numbers above"""
    train_flags: tyro.conf.Suppress[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, argv: "list[str]") -> "Study":
        """The study of a command line, with the grid's numbers where none are given. Exits with 2 on a bad flag."""
        split = argv.index("--") if "--" in argv else len(argv)
        study = tyro.cli(cls, args=argv[:split], prog="ditx study")
        numbers = {name: getattr(study, name) for name in ("steps", "every", "num_samples") if getattr(study, name)}
        plan = replace(GRIDS[study.grid], **numbers)
        return replace(study, plan=plan, train_flags=tuple(argv[split + 1 :]))

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out or f"studies/{self.grid}")

    @property
    def statistics(self) -> Path:
        """The file of the reference statistics."""
        return Path(self.reference or self.folder / "reference.npz")

    def run(self, name: str) -> Path:
        """The folder of a network's run."""
        return self.folder / "runs" / re.sub(r"\W+", "-", name)

    def results(self, name: str) -> Path:
        """The folder of a network's evaluations, apart from other evaluations of the same run."""
        return self.folder / "evaluations" / self.run(name).name

    def check(self) -> None:
        """Raise ValueError for impossible values."""
        cli.at_least(self.plan, 1, "steps", "every", "num_samples")
        for name in self.only:
            if name not in self.plan.networks:
                raise checks.unknown(f"network of {self.grid}", name, self.plan.networks)
        if self.plan.preset != "digits" and not (self.data_path or self.list):
            raise ValueError(f"{self.grid} trains on CIFAR-10; give its path with --data-path")

    def points(self) -> "list[tuple[int, int]]":
        """All evaluations of a network: training steps and sampling steps."""
        plan, (sampling_steps, *others) = self.plan, self.plan.sampling_steps
        steps = [*range(plan.every, plan.steps, plan.every), plan.steps]
        return [*((step, sampling_steps) for step in steps), *((plan.steps, other) for other in others)]

    def progress(self, name: str) -> str:
        """The progress of a network in words."""
        step = max(checkpoint.steps(self.run(name) / "checkpoints"), default=0)
        evaluations = f"{len(self.evaluations(name))} of {len(self.points())} evaluations"
        return f"step {step:,} of {self.plan.steps:,}, {evaluations}"

    def make_reference(self) -> None:
        """Compute the reference statistics if there are none."""
        if not (self.reference or self.statistics.exists()):
            source = "digits" if self.plan.preset == "digits" else self.data_path
            flags = ["--features", self.plan.features, "--make-stats", str(self.statistics)]
            cli.in_new_process(partial(evaluate.main, [source, *flags, *self._inception()]), killed=_KILLED)

    def train(self, name: str) -> None:
        """Run train.py until a network's last step."""
        run, plan, done = self.run(name), self.plan, checkpoint.steps(self.run(name) / "checkpoints")
        before = runs.read_config(run) if done else {"decay": "constant"}
        if before["decay"] != "constant" and before["steps"] != plan.steps:
            raise ValueError(
                f"{run} is a run of {before['steps']:,} steps with a decaying learning rate, not of {plan.steps:,}"
                " steps; give another --out"
            )
        if plan.steps in done and not self.train_flags:  # train.py compares flags with those of the run
            return
        command = [sys.executable, *f"-m ditx train {plan.preset} {plan.flags} {plan.networks[name]}".split()]
        command += ["--run", str(run), "--steps", str(plan.steps), "--sample-every", "0"]
        command += ["--checkpoint-every", str(plan.every), "--keep-every", str(plan.every)]
        command += ["--data-path", self.data_path] if self.data_path else []
        process = subprocess.Popen([*command, *self.train_flags])
        try:
            code = process.wait()
        except KeyboardInterrupt as stopped:
            # Ctrl-C reaches train.py as well; it ends with a checkpoint.
            if stopped.args[0] == signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        if code:
            raise ValueError(
                f"the training of {name} failed with exit code {code}; see above, then run the study again"
            )

    def evaluate(self, name: str) -> None:
        """Run the missing evaluations of a network and write the tables."""
        for step, sampling_steps in self.points():
            flags = f"--num-samples {self.plan.num_samples} --step {step} --steps {sampling_steps}".split()
            flags += [*self.plan.evaluation.split(), *self._inception(), "--out", str(self.results(name))]
            config, described = evaluate.parse([str(self.run(name)), str(self.statistics), *flags])
            config.check()
            result = evaluate.evaluate(config, described)
            values = ", ".join(f"{metric} {value:.4g}" for metric, value in result["metrics"].items())
            print(f"{name} at step {step:,}, {sampling_steps} sampling steps: {values}", flush=True)
        self.write_tables()

    def evaluations(self, name: str) -> "list[Row]":
        """The finished evaluations of a network, as rows of the table."""
        rows, points = {}, self.points()
        reference = checksum(self.statistics) if self.statistics.is_file() else None
        for line in runs.read_lines(self.results(name) / evaluate.RESULTS):
            step, sampling_steps = point = line["samples"]["step"], line["samples"]["steps"]
            same = (line["count"], line["reference"]["checksum"]) == (self.plan.num_samples, reference)
            if point in points and same:
                rows[point] = {"network": name, "step": step, "sampling_steps": sampling_steps, **line["metrics"]}
        return [rows[point] for point in points if point in rows]

    def write_tables(self) -> None:
        """Write all finished evaluations of all networks as table.json, table.csv and table.md."""
        rows, plan = [], self.plan
        for name in plan.networks:
            for row in self.evaluations(name):
                described = runs.read_config(self.run(name))
                model = DiTConfig(**described["model"])
                flops = costs.training_step(model, described["batch_size"]) * row["step"]
                own = {"block": model.block, "parameters": costs.parameters(model), "gflops": costs.macs(model) / 1e9}
                rows.append({"network": name, **own, "training_flops": flops, **row})
        final = [r for r in rows if (r["step"], r["sampling_steps"]) == (plan.steps, plan.sampling_steps[0])]
        sizes = [row for row in final if row["block"] == "adaln-zero"]
        table = {
            "steps": plan.steps,
            "samples": plan.num_samples,
            "sampling_steps": plan.sampling_steps[0],
            "features": read_reference(self.statistics).features,
            "correlation_of_fid_with_log_gflops": correlation(*([r[c] for r in sizes] for c in ("gflops", "fid"))),
            "rows": rows,
        }
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        runs.write(self.folder / "table.json", json.dumps(table, indent=1) + "\n")
        runs.write(self.folder / "table.csv", text.getvalue())
        runs.write(self.folder / "table.md", _markdown(final, table))

    def _inception(self) -> "list[str]":
        return ["--inception", self.inception] if self.inception else []


def main(argv: list[str]) -> int:
    """Train and evaluate what is missing, then write tables and plots; returns the exit code."""
    study = Study.parse(argv)
    study.check()
    if study.list:
        print("\n".join(f"{name:<20} {study.progress(name)}" for name in study.plan.networks))
        return 0
    try:
        with _interrupts():
            study.make_reference()
            for name in study.only or study.plan.networks:
                print(f"\n== {name}: {study.progress(name)}", flush=True)
                study.train(name)
                # A new process frees all GPU memory before the next network is trained.
                cli.in_new_process(partial(study.evaluate, name), killed=_KILLED)
    except KeyboardInterrupt as stopped:
        print("stopped; run the same command to resume", flush=True)
        return 128 + int(stopped.args[0])
    print(f"\n{(study.folder / 'table.md').read_text()}\nwrote {study.folder}/table.md, .csv, .json")
    try:
        written = write_plots(study.folder, json.loads((study.folder / "table.json").read_text()))
        print(f"wrote {', '.join(str(path) for path in written)}")
    except ModuleNotFoundError:
        print("no plots: matplotlib is not installed; use uv run --extra plot, or pip install matplotlib")
    return 0


@contextmanager
def _interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt(number) on SIGINT or SIGTERM; a second signal ends the process at once."""

    def interrupt(number, _):
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def correlation(gflops: list[float], fids: list[float]) -> float | None:
    """Correlation of FID with log Gflops (Peebles and Xie 2022, Figure 8); None for fewer than 3 sizes."""
    return float(np.corrcoef(np.log(gflops), fids)[0, 1]) if len(set(gflops)) > 2 else None


def write_plots(folder: Path, table: dict[str, Any]) -> list[Path]:
    """Plot FID as the paper's Figures 2, 5, 6, 8, 9 and 10 do. Raises ModuleNotFoundError without matplotlib."""
    rows, r = table["rows"], table["correlation_of_fid_with_log_gflops"]
    along = [row for row in rows if row["sampling_steps"] == table["sampling_steps"]]
    final = [row for row in along if row["step"] == table["steps"]]
    sizes = [row for row in along if row["block"] == "adaln-zero"]
    last = [row for row in rows if row["block"] == "adaln-zero" and row["step"] == table["steps"]]
    last = [row | {"cost": row["gflops"] * row["sampling_steps"]} for row in last]
    others = {_size(row) for row in rows if row["block"] != "adaln-zero"}  # networks that differ in their block only
    blocks = [row for row in along if _size(row) in others]
    title = "" if r is None else f"correlation with log Gflops, adaLN-Zero: {r:.3f}"
    plots = {
        "gflops": (final, "gflops", "Gflops (multiply-adds of one forward pass)", "block", _size, title),
        "parameters": (final, "parameters", "parameters", "block", _size),
        "compute": (sizes, "training_flops", "training compute, FLOPs", "network"),
        "training": (sizes, "step", "training step", "network"),
        "sampling": (last, "cost", "Gflops of one sample, by the number of steps", "network", _steps),
        "blocks": (blocks, "step", "training step", "network"),
    }
    return [_plot(folder / f"{name}.png", *plot) for name, plot in plots.items() if plot[0] or name != "blocks"]


def _size(row: Row) -> str:
    return row["network"].split(" ")[0]


def _steps(row: Row) -> str:
    return str(row["sampling_steps"])


def _markdown(final: list[Row], table: dict[str, Any]) -> str:
    metrics = [name for name in ("fid", "sfid", "inception_score", "precision", "recall") if final and name in final[0]]
    lines = [("network", "block", "parameters", "Gflops", *metrics), ("---",) * (4 + len(metrics))]
    for row in final:
        values = (f"{row[name]:.4g}" for name in ("gflops", *metrics))
        lines.append((row["network"], row["block"], f"{row['parameters']:,}", *values))
    note = (
        f"After {table['steps']:,} training steps; {table['samples']:,} samples in {table['sampling_steps']} steps;"
        f" features: {table['features']}."
    )
    if table["correlation_of_fid_with_log_gflops"] is not None:
        note += f" Correlation of FID with log Gflops: {table['correlation_of_fid_with_log_gflops']:.3f}."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note, ""])


def _plot(
    path: Path,
    rows: list[Row],
    x: str,
    x_label: str,
    series: str,
    label: Callable[[Row], str] | None = None,
    title: str = "",
) -> Path:
    """FID of `rows` over their field `x`, with a line for each network or a colour for each block."""
    # Not by pyplot, which looks for a display.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel="FID", xscale="linear" if x == "step" else "log")
    axes.set_title(title, fontsize=10)
    if x != "step":
        axes.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    for name in dict.fromkeys(row[series] for row in rows):
        points = sorted((row[x], row["fid"]) for row in rows if row[series] == name)
        axes.plot(*zip(*points, strict=True), "o-" if series == "network" else "o", ms=4, label=name)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.draw_without_rendering()  # fixes the layout, by which labels are placed
    if label:
        _annotate(axes, [((row[x], row["fid"]), label(row)) for row in rows])
    figure.savefig(path)
    return path


def _annotate(axes: Any, labels: list[tuple[Any, str]]) -> None:
    """Label points, each at the nearest place that covers neither a point nor another label."""
    bounds = importlib.import_module("matplotlib.transforms").Bbox.from_bounds
    taken = [bounds(*(axes.transData.transform(point) - 3), 6, 6) for point, _ in labels]
    offsets = [(x, y) for distance in range(3, 60, 3) for y in (distance, -distance - 5) for x in (5, -5)]
    for point, text in labels:
        for x, y in offsets:
            place = {"textcoords": "offset points", "ha": "left" if x > 0 else "right", "fontsize": 7}
            note = axes.annotate(text, point, (x, y), **place)
            box = note.get_window_extent()
            if not any(map(box.overlaps, taken)):
                taken.append(box)
                break
            note.remove()
