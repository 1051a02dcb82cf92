"""Measure ditx on a GPU, in order: `python tests/helpers/gpu_day.py FOLDER --cifar TRAIN --test TEST --inception FILE`.

Each measurement writes FOLDER/NAME.json as soon as it is made. One that has its file is not made again, so the same
command goes on after an interruption; `--seconds 540` starts nothing that is expected to take longer than the rest of
this time. `--table` prints the table for ditx/kernels/README.md from the files, each figure beside its prediction.
tests/test_gpu_day.py rehearses all commands at a tiny size.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Measurement:
    """A command after `python -m`, the seconds it takes on an H100, and the prediction, all made beforehand."""

    name: str
    command: str
    seconds: int
    predicted: str


TRAIN = "ditx bench train {} --json --batch-size"
XL2 = TRAIN.format("DiT-XL/2") + " 128 --unroll 28"
# Predictions for DiT-XL/2, batch 128: 127 ms of matrix products at 800 TFLOP/s, 25 ms of attention, and 53 ms of
# element-wise passes (45 with fused kernels) by their bytes at 3.0 TB/s. Smaller networks are scaled from these by
# multiply-adds, heads and bytes. The peer's 520 images/s were measured once; others follow from the same parts.
MEASUREMENTS = (
    Measurement("train-xl2", f"{XL2} --compare torch", 420, "624 images/s, torch 1.20 x the time"),
    Measurement("train-xl2-kernels", f"{XL2} --kernels fused", 120, "650 images/s"),
    Measurement("train-xl2-attention", f"{XL2} --attention fused", 120, "610 images/s"),
    Measurement("train-xl2-both", f"{XL2} --kernels fused --attention fused", 120, "635 images/s"),
    Measurement("train-xl2-fp8", f"{XL2} --matmul-dtype fp8", 120, "690 images/s"),
    Measurement(
        "train-b2",
        TRAIN.format("DiT-B/2") + " 256 --unroll 12 --compare torch",
        240,
        "2,660 images/s, torch 1.25 x the time",
    ),
    Measurement(
        "train-s2",
        TRAIN.format("DiT-S/2") + " 512 --unroll 12 --compare torch",
        240,
        "7,000 images/s, torch 1.30 x the time",
    ),
    Measurement(
        "sample-xl2",
        "ditx bench sample DiT-XL/2 --json --unroll 28 --compare torch",
        400,
        "3.9 images/s, torch 1.35 x the time",
    ),
    Measurement(
        "memory-xl2",
        TRAIN.format("DiT-XL/2") + " 256 --remat full --compare torch --turns 1",
        240,
        "500 images/s, peak 24 GiB",
    ),
    Measurement("goldens", "pytest -q -n0 tests/nn", 300, "all pass"),
    Measurement(
        "cifar10",
        "ditx train cifar10 --data-path {cifar} --run {folder}/cifar10 --steps 12000 --profile-steps 5",
        540,
        "7,000 images/s",
    ),
    Measurement(
        "statistics", "ditx evaluate {cifar} --make-stats {folder}/cifar.npz {inception}", 120, "50,000 images"
    ),
    Measurement(
        "fid-cifar10",
        "ditx evaluate {folder}/cifar10 {folder}/cifar.npz --json --num-samples 10000 {inception}",
        240,
        "FID 12",
    ),
    Measurement("fid-test", "ditx evaluate {test} {folder}/cifar.npz --json {inception}", 120, "FID 3.12"),
)


def arguments(measurement: Measurement, **paths: str) -> list[str]:
    """The words of a command, with the paths filled in; a path without a value leaves out its word."""
    words = (word.format(**paths) for word in measurement.command.split())
    inception = ["--inception", paths["inception"]] if paths.get("inception") else []
    return [part for word in words for part in (inception if word == paths.get("inception", "") else [word])]


def record(folder: Path, measurement: Measurement, command: list[str], code: int, output: str, seconds: float) -> dict:
    """Write a measurement's file: its JSON if it printed any, the last metrics of a run, or else its last lines."""
    start, figures = output.find("{"), {}
    if code == 0 and "--json" in command:
        figures = json.JSONDecoder().raw_decode(output[start:])[0]
    elif code == 0 and "--run" in command:
        run = Path(command[command.index("--run") + 1])
        figures = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    known = {name: version(name) for name in ("ditx", "jax", "jaxlib", "torch") if importlib.util.find_spec(name)}
    entry = {
        "name": measurement.name,
        "command": shlex.join(command),
        "predicted": measurement.predicted,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": known | {"python": sys.version.split()[0]},
        "exit_code": code,
        "seconds": round(seconds, 1),
        "figures": figures,
        "last_lines": output.splitlines()[-20:],
    }
    (folder / f"{measurement.name}.json").write_text(json.dumps(entry, indent=2))
    return entry


def device() -> str:
    """The name and driver of the first GPU, or cpu."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "cpu"


def measured(entry: dict) -> str:
    """The figures of a measurement that its prediction speaks of, as text."""
    figures = entry["figures"]
    if entry["exit_code"]:
        return f"failed ({entry['exit_code']}): {entry['last_lines'][-1] if entry['last_lines'] else ''}"
    parts = [f"{figures['images_per_second']:,.4g} images/s"] if "images_per_second" in figures else []
    parts += [f"{peer} {row['ratio']:.2f} x the time" for peer, row in figures.get("compare", {}).items()]
    parts += [f"MFU {figures['mfu']:.1%}"] if figures.get("mfu") else []
    peaks = [("", figures), *((f"{peer} ", row) for peer, row in figures.get("compare", {}).items())]
    parts += [f"{name}peak {row['peak_bytes'] / 2**30:.1f} GiB" for name, row in peaks if row.get("peak_bytes")]
    parts += [f"FID {figures['fid']:.2f}"] if "fid" in figures else []
    return ", ".join(parts) or (entry["last_lines"][-1] if entry["last_lines"] else "done")


def table(folder: Path) -> str:
    """The measurements of a folder as Markdown, in their order, with device, versions and dates."""
    files = (folder / f"{measurement.name}.json" for measurement in MEASUREMENTS)
    entries = [json.loads(file.read_text()) for file in files if file.exists()]
    if not entries:
        raise SystemExit(f"{folder} has no measurements yet; make them with: python tests/helpers/gpu_day.py {folder}")
    machines = {
        entry["device"] + "".join(f", {name} {number}" for name, number in entry["versions"].items())
        for entry in entries
    }
    lines = ["| command | predicted | measured | date |", "|---|---|---|---|"]
    for entry in entries:
        cells = (f"`{entry['command']}`", entry["predicted"], measured(entry), entry["date"][:10])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*sorted(machines), "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Make the measurements that are missing, or print the table; returns 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the figures")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in MEASUREMENTS], help="measurements to make")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all of them")
    parser.add_argument("--cifar", default="cifar-10-batches-py", help="CIFAR-10's training images")
    parser.add_argument("--test", default="cifar-10-test", help="a folder of its test images")
    parser.add_argument("--inception", default="", help="file of Inception weights; fetched if not given")
    parser.add_argument("--table", action="store_true", help="print the table of the figures in the folder")
    options = parser.parse_args(argv)
    if options.table:
        print(table(options.folder))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, 0
    for one in MEASUREMENTS:
        if (options.only and one.name not in options.only) or (options.folder / f"{one.name}.json").exists():
            continue
        if time.monotonic() + one.seconds > end:
            print(f"{one.name}: left for the next call, which needs {one.seconds} s for it", flush=True)
            continue
        paths = {"folder": str(options.folder), "cifar": options.cifar, "test": options.test}
        command, start = arguments(one, **paths, inception=options.inception), time.monotonic()
        process = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        output = process.stdout if process.returncode == 0 else process.stdout + process.stderr
        entry = record(options.folder, one, command, process.returncode, output, time.monotonic() - start)
        failed |= process.returncode != 0
        print(f"{one.name}: {measured(entry)} (predicted {one.predicted})", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
