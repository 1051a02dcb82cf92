"""`ditx bench WHAT ...`: how fast this machine trains, draws, judges, encodes and reads, and by which choices."""

import json
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import tyro

from ditx import costs
from ditx.commands import bench_evaluation, bench_reading, bench_sweep, bench_torch, bench_work
from ditx.commands.bench_evaluation import Evaluate
from ditx.commands.bench_reading import Data, Extract
from ditx.commands.bench_sweep import fastest, flags_of
from ditx.commands.bench_work import Sample, Timing, Train, objective_of
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DIT_CONFIGS, DiTConfig
from ditx.parallel.compile import compiler_options, resolve_dtype
from ditx.parallel.mesh import make_mesh

KINDS = {"train": Train, "sample": Sample, "evaluate": Evaluate, "extract": Extract, "data": Data}
# The network of the figures on two CPU cores.
TINY = DiTConfig(28, 4, 1, 96, 4, 4, num_classes=10)


def main(argv: list[str]) -> int:
    """Time what was asked for; returns the exit code."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print("usage: ditx bench WHAT ... (ditx bench WHAT --help says more)\n")
        print("\n".join(f"  {name:<8}  {(kind.__doc__ or '').split(chr(10))[0]}" for name, kind in KINDS.items()))
        return 0
    what, *flags = argv
    if what not in KINDS:
        raise ValueError(f"there is no {what!r} to time; choose {', '.join(KINDS)}")
    config = parse(what, flags)
    check(config)
    # Programs are compiled anew, since how long that takes is told.
    jax.config.update("jax_enable_compilation_cache", False)
    if isinstance(config, Train) and config.sweep:
        told, text = sweep(config), sweep_text
    elif isinstance(config, Train | Sample) and config.beside:
        told, text = beside(config), beside_text
    elif isinstance(config, Train | Sample):
        told, text = network(config), network_text
    else:
        told, text = reading(what, config), rates_text
    print(json.dumps(told | {"config": asdict(config)}, indent=2) if config.json else text(told))
    return 0


def parse(what: str, flags: list[str]) -> Any:
    """The configuration of one kind of work. Raises ValueError for an unknown network; exits with 2 on a bad flag."""
    kind, prog = KINDS[what], f"ditx bench {what}"
    config = tyro.cli(kind, args=flags, prog=prog)
    if kind not in (Train, Sample):
        return config
    known = DIT_CONFIGS | {"tiny": TINY}
    if config.source not in known:
        raise ValueError(f"there is no network {config.source!r}; give {', '.join(known)}")
    # Read twice: the network named on the command line sets the defaults of the other flags.
    default = kind(model=known[config.source])
    if kind is Train and config.source == "tiny":
        default = replace(default, batch_size=64)
    return tyro.cli(kind, args=flags, prog=prog, default=default)


def check(config: Any) -> None:
    """Raise ValueError for values that the parts do not check themselves."""
    for name in ("batch_size", "unroll", "accumulate", "repeats", "turns", "size", "count"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if getattr(config, "workers", 0) < 0:
        raise ValueError(f"workers is {config.workers}; it must not be negative")
    if isinstance(config, Sample):
        config.sampling.check(config.model, objective_of(config.model))
    if isinstance(config, Train) and min(config.batch_sizes, default=1) < 1:
        raise ValueError(f"batch_sizes are {config.batch_sizes}; each must be at least 1")
    if isinstance(config, Train | Sample) and config.beside:
        if getattr(config, "sweep", False):
            raise ValueError("give --sweep, and with what it recommends --beside, not both at once")
        bench_torch.check(config)


def machine() -> dict[str, Any]:
    """When, and with which versions."""
    found = {name: version(name) for name in ("ditx", "jax", "jaxlib")}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "versions": found | {"python": sys.version.split()[0]}}


def devices(mesh: Any, dtype: str, compute: KernelConfig) -> dict[str, Any]:
    """Which devices, and what those can do that compute in `dtype`."""
    device = jax.local_devices()[0]
    measured, side = bench_work.peak(dtype, mesh)
    nominal = costs.nominal_peak(device.device_kind) if dtype == "bfloat16" else None
    memory = [(each.memory_stats() or {}).get("peak_bytes_in_use") for each in jax.local_devices()]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "mesh": dict(mesh.shape),
        "dtype": dtype,
        "compiler_options": compiler_options(mesh, fp8=compute.matmul_dtype == "fp8"),
        "peak_tflops_measured": measured / 1e12,
        "peak_side": side,
        "peak_tflops_nominal": nominal and nominal * mesh.size / 1e12,
        "peak_bytes": max((size for size in memory if size), default=None),
    }


def rates(timing: Timing) -> dict[str, Any]:
    """Median time, its quartiles, and what follows from it."""
    low, median, high = (float(q) for q in np.quantile(timing.times, [0.25, 0.5, 0.75]))
    told = {"seconds": median, "quartiles": [low, high], "times": timing.times, "batch_size": timing.images}
    told |= {"images_per_second": timing.images / median}
    if timing.flops:
        told |= {"flops": timing.flops, "tflops": timing.flops / median / 1e12}
    if timing.program_bytes:
        told |= {"compile_seconds": timing.compile_seconds, "program_bytes": timing.program_bytes}
    return told


def utilisation(told: dict[str, Any]) -> dict[str, float | None]:
    """Model FLOP/s over what the devices can do (Chowdhery et al. 2022, appendix B), measured and nominal."""
    nominal = told["peak_tflops_nominal"]
    return {"mfu": told["tflops"] / told["peak_tflops_measured"], "mfu_nominal": nominal and told["tflops"] / nominal}


def network(config: Train | Sample, cache: str = "") -> dict[str, Any]:
    """Figures of a network at work; programs compiled are kept in the folder `cache`, if one is given."""
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    timing = bench_work.train(config) if isinstance(config, Train) else bench_work.sample(config)
    told = describe(config) | devices(make_mesh(config.mesh), resolve_dtype(config.dtype), config) | rates(timing)
    return told | utilisation(told)


def describe(config: Train | Sample) -> dict[str, Any]:
    """Which network at which work, when, and with which versions."""
    what = "train" if isinstance(config, Train) else "sample"
    told = {"what": what, "network": config.source, "parameters": costs.parameters(config.model)}
    return told | {"products": config.matmul_dtype, **machine()}


def reading(what: str, config: Evaluate | Extract | Data) -> dict[str, Any]:
    """Figures of what is done with images."""
    where = {"backend": jax.default_backend(), "device": jax.local_devices()[0].device_kind}
    if isinstance(config, Evaluate):
        timings = bench_evaluation.evaluate(config)
    elif isinstance(config, Extract):
        decoded = {"decode": bench_reading.decode(config)} if config.images else {}
        timings, where["dtype"] = {"encode": bench_reading.extract(config), **decoded}, resolve_dtype(config.dtype)
    else:
        timings, where = bench_reading.read(config), {}
    return {"what": what, **machine(), **where, "read": {name: rates(timing) for name, timing in timings.items()}}


def sweep(config: Train) -> dict[str, Any]:
    """Figures of every choice that is tried and fits, and the fastest; in text, a line for each as it is made."""
    mesh = bench_work.check_network(config)
    rows = bench_sweep.search(config, mesh, lambda choice: rates(bench_work.train(choice)))
    fitting = [row for row in rows if "skipped" not in row]
    if not fitting:
        raise ValueError("none of the choices fits; try smaller --batch-sizes, a higher --accumulate, or --mesh.fsdp")
    where = devices(mesh, resolve_dtype(config.dtype), config)
    for row in fitting:
        row |= utilisation(where | row)
    best = max(fitting, key=lambda row: row["images_per_second"])
    by_batch_size = {size: flags_of(row) for size, row in fastest(rows).items()}
    return describe(config) | where | {"rows": rows, "recommended": flags_of(best), "by_batch_size": by_batch_size}


def beside(config: Train | Sample) -> dict[str, Any]:
    """Our figures and the peers', all timed by turns."""
    alone = replace(config, beside=())
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ditx", *config.beside)}
    with TemporaryDirectory() as cache:  # empty: the first turn tells how long compiling takes
        for turn in range(config.turns):
            for name, results in turns.items():
                if name == "ditx":
                    results.append(bench_torch.apart(partial(network, alone, cache)))
                else:
                    ours = turns["ditx"][0]
                    peer = partial(bench_torch.time_peer, alone, ours["backend"], ours["dtype"], name == "torch")
                    results.append(bench_torch.apart(peer))
                if not config.json:
                    seconds = np.median(results[-1]["times"])
                    print(f"turn {turn + 1}   {name:<12}{1e3 * seconds:>10,.2f} ms", file=sys.stderr, flush=True)
    return compare(turns)


def compare(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of `ditx` from all its turns, and in `beside` each peer's, with their time over ours as `ratio`."""
    told, work = turns["ditx"][0], {}
    for name, results in turns.items():
        times = [time for result in results for time in result["times"]]
        figures = rates(Timing(times, told["batch_size"], told["flops"]))
        work[name] = results[0] | figures | {"turns": [float(np.median(result["times"])) for result in results]}
    ours, peers = work.pop("ditx"), work
    for figures in peers.values():
        figures["ratio"] = figures["seconds"] / ours["seconds"]
    return ours | utilisation(ours) | {"beside": peers}


def network_text(told: dict[str, Any]) -> str:
    """Figures of a network at work, for people."""
    memory = f"; {told['peak_bytes'] / 2**30:,.2f} GiB in use at the peak" if told["peak_bytes"] else ""
    return "\n".join(
        [
            *head(told),
            f"memory   a program takes {told['program_bytes'] / 2**20:,.1f} MiB on each device{memory}",
            f"compiled in {told['compile_seconds']:.1f} s",
            f"time     {duration(told)}",
            f"rate     {told['images_per_second']:,.2f} images/s",
            f"speed    {told['tflops']:,.3f} TFLOP/s, {limits(told)}",
        ]
    )


def limits(told: dict[str, Any]) -> str:
    """How near a speed comes to what the devices can do in the network's type, whatever its products are of."""
    text = (
        f"{told['mfu']:.1%} of {told['peak_tflops_measured']:,.3f} in {told['dtype']} products of side"
        f" {told['peak_side']:,}"
    )
    nominal = told["peak_tflops_nominal"]
    return text + (f", {told['mfu_nominal']:.1%} of the nominal {nominal:,.0f}" if nominal else "")


def head(told: dict[str, Any]) -> list[str]:
    """What was timed where, for people."""
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    mesh = ", ".join(f"{axis} {count}" for axis, count in told["mesh"].items())
    return [
        f"{told['what']:<8} {told['network']}, {told['parameters']:,} parameters",
        f"devices  {np.prod(list(told['mesh'].values()))} x {told['device']} ({mesh}), computing in {told['dtype']}"
        + (", products with the blocks' weights in fp8" if told["products"] == "fp8" else "")
        + "".join(f", {name}={value}" for name, value in told["compiler_options"].items()),
        f"date     {told['date']}, {versions}",
    ]


def duration(told: dict[str, Any]) -> str:
    """A median and its spread, for people."""
    low, high = told["quartiles"]
    return (
        f"{1e3 * told['seconds']:,.2f} ms for {told['batch_size']:,} images, the median of {len(told['times'])};"
        f" half of them within {1e3 * low:,.2f} to {1e3 * high:,.2f}"
    )


def rates_text(told: dict[str, Any]) -> str:
    """Rates of what is done with images, for people."""
    lines = [
        f"{name:<16}{row['images_per_second']:>12,.1f} images/s   {duration(row)}" for name, row in told["read"].items()
    ]
    return "\n".join(lines)


def beside_text(told: dict[str, Any]) -> str:
    """Ours and the peers', for people."""
    lines = [
        network_text(told),
        f"{'':<14}{'ms':>10}{'images/s':>12}{'TFLOP/s':>10}{'compile s':>11}{'peak GiB':>10}{'ratio':>8}",
    ]
    for name, row in {"ditx": told, **told["beside"]}.items():
        seconds, peak = row["compile_seconds"], row["peak_bytes"]
        lines.append(
            f"{name:<14}{1e3 * row['seconds']:>10,.2f}{row['images_per_second']:>12,.2f}{row['tflops']:>10,.3f}"
            f"{'' if seconds is None else f'{seconds:,.1f}':>11}{f'{peak / 2**30:,.2f}' if peak else '':>10}"
            f"{row.get('ratio', 1.0):>8.2f}"
        )
    found = next(iter(told["beside"].values()))["versions"]
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    return "\n".join([*lines, f"ratio: a peer's time over ours, above 1 where ours is faster; {versions}"])


def sweep_text(told: dict[str, Any]) -> str:
    """What a sweep found, for people."""
    best = max((row for row in told["rows"] if "skipped" not in row), key=lambda row: row["images_per_second"])
    lines = [*head(told), f"fastest  {best['tflops']:,.3f} TFLOP/s, {limits(told | best)}"]
    lines += [f"of batch {size:<8,} train.py ... {flags}" for size, flags in told["by_batch_size"].items()]
    return "\n".join([*lines, f"try      train.py ... {told['recommended']}"])
