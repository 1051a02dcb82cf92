"""Plots of a study, in the manner of the paper's Figures 2, 5, 6, 8, 9 and 10. They need matplotlib (--extra plot)."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(folder: Path, table: dict[str, Any]) -> list[Path]:
    """Write the plots that the rows of a study's table allow. Raises ModuleNotFoundError without matplotlib."""
    rows, usual = table["rows"], table["sampling_steps"]
    along = [row for row in rows if row["sampling_steps"] == usual]
    final = [row for row in along if row["step"] == table["steps"]]
    last = [row for row in rows if row["step"] == table["steps"]]
    sizes = [row for row in along if row["block"] == "adaln-zero"]
    blocks = _blocks(along)
    r = table["correlation_of_fid_with_log_gflops"]
    title = "" if r is None else f"correlation with log Gflops, of adaLN-Zero: {r:.3f}"
    written = [
        _points(folder / "gflops.png", final, "gflops", "Gflops (multiply-adds of one forward pass)", title),
        _points(folder / "parameters.png", final, "parameters", "parameters", ""),
        _lines(folder / "compute.png", sizes, lambda row: row["training_flops"], "training compute, FLOP"),
        _lines(folder / "training.png", sizes, lambda row: row["step"], "training step", log=False),
        _lines(
            folder / "sampling.png",
            last,
            lambda row: row["gflops"] * row["sampling_steps"],
            "Gflops of drawing one sample, by the number of steps",
            notes="sampling_steps",
        ),
    ]
    if len({row["block"] for row in blocks}) > 1:
        written.append(_lines(folder / "blocks.png", blocks, lambda row: row["step"], "training step", log=False))
    return written


def _blocks(rows: list[Row]) -> list[Row]:
    """Those of the networks that differ in their blocks alone."""
    others = {row["network"].split(" ")[0] for row in rows if row["block"] != "adaln-zero"}
    return [row for row in rows if row["network"].split(" ")[0] in others]


def _points(path: Path, rows: list[Row], field: str, label: str, title: str) -> Path:
    figure, axes = _figure(label, log=True)
    axes.set_title(title, fontsize=10)
    for block in dict.fromkeys(row["block"] for row in rows):
        of_block = [row for row in rows if row["block"] == block]
        axes.scatter([row[field] for row in of_block], [row["fid"] for row in of_block], label=block)
    for row in rows:
        place = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 8}
        axes.annotate(row["network"].split(" ")[0], (row[field], row["fid"]), **place)
    return _save(figure, axes, path)


def _lines(
    path: Path, rows: list[Row], place: Callable[[Row], float], label: str, *, log: bool = True, notes: str = ""
) -> Path:
    figure, axes = _figure(label, log=log)
    for name in dict.fromkeys(row["network"] for row in rows):
        of_network = sorted((row for row in rows if row["network"] == name), key=place)
        axes.plot([place(row) for row in of_network], [row["fid"] for row in of_network], marker="o", ms=4, label=name)
        for row in of_network if notes else ():
            offset = {"textcoords": "offset points", "xytext": (3, 3), "fontsize": 6}
            axes.annotate(row[notes], (place(row), row["fid"]), **offset)
    return _save(figure, axes, path)


def _figure(label: str, *, log: bool) -> tuple[Any, Any]:
    # Without pyplot, which would look for a display.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel("FID")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")  # whose labels would lie over each other
        axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path
