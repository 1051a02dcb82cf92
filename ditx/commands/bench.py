"""`ditx bench train|sample`: time training steps or batches of samples, sweep settings, compare with PyTorch."""

import gc
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import product
from operator import itemgetter
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditx import checks, cli, costs
from ditx.commands import bench_torch
from ditx.commands.bench_torch import intervals
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.files import first_line
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DIT_CONFIGS, DiT, DiTConfig
from ditx.parallel.compile import Dtype, OutOfMemoryError, compile_checked, compiler_options, resolve_dtype, tune_malloc
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import MeshConfig, check_batch, check_mesh, make_mesh, replicated
from ditx.sampling import SamplingConfig, make_sampler
from ditx.training.compile import AbstractStep
from ditx.training.step import Remat, adamw, train_step


@dataclass(frozen=True)
class Network(KernelConfig):
    """A network and the devices that compute it."""

    source: tyro.conf.Positional[str] = "DiT-XL/2"
    """a published network (DiT-S/8 to DiT-XL/2), or tiny (4 blocks of width 96, 28x28 pixels), for CPUs"""
    model: tyro.conf.OmitArgPrefixes[DiTConfig] = field(default_factory=DiTConfig)
    dtype: Dtype = "auto"
    """compute dtype; auto is float32 on CPUs and bfloat16 elsewhere"""
    unroll: int = 1
    """blocks compiled in a row"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    repeats: int = 20
    """timed steps or batches, after two untimed ones"""
    compare: tuple[Literal["torch", "torch-eager"], ...] = ()
    """also time diffusers' DiTTransformer2DModel in PyTorch at the same work: compiled, eager, or both"""
    turns: int = 3
    """with --compare: alternating turns, ours first, each of --repeats in a new process"""
    json: bool = False
    """print JSON"""

    @property
    def objective(self) -> ObjectiveConfig:
        """The paper's objective, or flow matching for a network that predicts no variance."""
        return ObjectiveConfig() if self.model.learn_sigma else ObjectiveConfig("flow", "velocity")


@dataclass(frozen=True)
class Train(Network):
    """Training steps on random data: forward, backward, AdamW and the average of the weights, as in train.py."""

    batch_size: int = 256
    """images a step, over all devices"""
    remat: Remat = "none"
    """backward pass recomputes: nothing, all but matmuls (dots), blocks (full)"""
    accumulate: int = 1
    """parts of a batch computed in turn"""
    sweep: bool = False
    """try every --remat, unrolled or not, at each of --batch-sizes; on GPUs then the other --kernels and --attention
    with the fastest setting of each batch size; recommend the fastest"""
    batch_sizes: tuple[int, ...] = ()
    """with --sweep: batch sizes to try; once and twice --batch-size if not given"""


@dataclass(frozen=True)
class Sample(Network):
    """Batches of samples from noise, as in sample.py."""

    batch_size: int = 16
    """images of a batch, over all devices"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(
        default_factory=lambda: SamplingConfig(guidance_scale=4.0)
    )
    repeats: int = 3
    """timed batches, after two untimed ones"""


KINDS: dict[str, type[Network]] = {"train": Train, "sample": Sample}
TINY = DiTConfig(28, 4, 1, 96, 4, 4, num_classes=10)
SETTINGS = ("batch_size", "unroll", "remat", "kernels", "attention")


def main(argv: list[str]) -> int:
    """Run the benchmark of a command line; returns the exit code."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print("usage: ditx bench train|sample NETWORK ... (ditx bench train --help lists the flags)\n")
        print("\n".join(f"  {name:<8}  {(kind.__doc__ or '').strip()}" for name, kind in KINDS.items()))
        return 0
    if argv[0] not in KINDS:
        raise checks.unknown("benchmark", argv[0], KINDS)
    config = parse(*argv)
    check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    if config.compare:
        figures = compare(config)
    else:
        figures = sweep(config) if getattr(config, "sweep", False) else measure(config)
    print(json.dumps(figures | {"config": asdict(config)}, indent=2) if config.json else report(figures))
    return 0


def parse(name: str, *flags: str) -> Any:
    """The configuration of a benchmark. Raises ValueError for an unknown network; exits with 2 on a bad flag."""
    networks = DIT_CONFIGS | {"tiny": TINY}
    kind: Any = KINDS[name]

    def defaults(first: Any) -> tuple[Any, None]:
        if first.source not in networks:
            raise checks.unknown("network", first.source, networks)
        smaller = {"batch_size": 64} if (kind, first.source) == (Train, "tiny") else {}
        return kind(model=networks[first.source], **smaller), None

    parse = partial(cli.parse, kind, args=cli.expand_model([*flags], ""), prog=f"ditx bench {name}")
    return cli.parse_with_defaults(parse, defaults)[0]


def check(config: Any) -> None:
    """Raise ValueError for impossible values. Uses no device: with `compare`, each turn has them to itself."""
    names = ("batch_size", "unroll", "accumulate", "repeats", "turns")
    cli.at_least(config, 1, *(name for name in names if hasattr(config, name)))
    if min(getattr(config, "batch_sizes", ()), default=1) < 1:
        raise ValueError(f"batch_sizes are {config.batch_sizes}; each must be at least 1")
    if config.compare:
        if getattr(config, "sweep", False):
            raise ValueError("--sweep and --compare exclude each other; sweep first, then compare the fastest setting")
        bench_torch.check(config)
    if isinstance(config, Sample):
        config.sampling.check(config.model, config.objective)


def open_mesh(config: Train | Sample) -> Mesh:
    """The mesh. Raises ValueError if it does not fit the network, the kernels or the batch."""
    tune_malloc()
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, num_heads=config.model.num_heads, mlp_size=config.model.mlp_size)
    config.check_kernels(mesh, resolve_dtype(config.dtype), config.model)
    for size in (config.batch_size, *getattr(config, "batch_sizes", ())):
        check_batch(mesh, size, getattr(config, "accumulate", 1))
    return mesh


def measure(config: Train | Sample, cache: str = "") -> dict[str, Any]:
    """All figures of one setting; compiled programs are kept in the folder `cache`, if one is given."""
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    mesh = open_mesh(config)
    timed = train(config, mesh) if isinstance(config, Train) else sample(config, mesh)
    return with_rates(describe(config, mesh) | timed)


def train(config: Train, mesh: Mesh) -> dict[str, Any]:
    """Time training steps. Off CPUs, the host is one step ahead, as in a run."""
    model, optimizer = config.model, adamw(1e-4)
    function = partial(
        train_step,
        objective=make_objective(config.objective),
        optimizer=optimizer,
        ema_decay=0.9999,
        dtype=jnp.dtype(resolve_dtype(config.dtype)),
        apply_block=config.apply_block(),
        remat=config.remat,
        unroll=config.unroll,
        accumulate=config.accumulate,
        mesh=mesh,
    )
    remedy = "--remat full, a higher --accumulate, --mesh.fsdp, or a smaller --batch-size"
    options: Any = {"latent": model.in_channels == 4, "fp8": config.matmul_dtype == "fp8", "remedy": remedy}
    step = AbstractStep(function, model, optimizer, mesh, config.batch_size, **options)

    def create(key):
        state = step.create(key)
        weights = random_weights(state.model)
        return replace(state, model=weights, ema=jax.tree.map(jnp.copy, weights))

    def random_batch(key):
        shapes, count = dict(step.batch), max(model.num_classes, 1)
        labels = jax.random.randint(key, shapes.pop("y").shape, 0, count)
        return {name: jax.random.normal(key, leaf.shape, leaf.dtype) for name, leaf in shapes.items()} | {"y": labels}

    program, seconds, size = step.compiled
    key = jax.jit(lambda: jax.random.key(0), out_shardings=replicated(mesh))()
    batch = jax.jit(random_batch, out_shardings=_shardings(step.batch))(key)
    state = jax.jit(create, out_shardings=step.shardings)(key)

    def call():
        nonlocal state
        state, terms = program(state, batch, key)
        return terms

    return timed(call, config, costs.training_step(model, config.batch_size), seconds, size)


def sample(config: Sample, mesh: Mesh) -> dict[str, Any]:
    """Time batches of samples: one program for the whole loop, with its weights in the compute dtype."""
    model, dtype = config.model, jnp.dtype(resolve_dtype(config.dtype))
    objective, unroll = config.objective, config.unroll
    sampler = make_sampler(
        config.sampling, model, objective, mesh, batch_size=config.batch_size, unroll=unroll, kernels=config
    )

    def create(key):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), random_weights(DiT(model, key=key)))

    shapes = with_shardings(jax.eval_shape(create, jax.random.key(0)), mesh)
    labels, seed = np.arange(config.batch_size, dtype=np.int32) % max(model.num_classes, 1), np.uint32(0)
    program, seconds, size = compile_checked(sampler.program, shapes, None, labels, seed, np.int32(0), sampler.params)
    network = jax.jit(create, out_shardings=_shardings(shapes))(jax.random.key(0))
    numbers = iter(range(0, (config.repeats + 3) * config.batch_size, config.batch_size))

    def call():  # waits for each batch, because a CPU would compute two at once
        first = np.int32(next(numbers))
        return jax.block_until_ready(program(network, None, labels, seed, first, sampler.params))

    flops = 2 * config.batch_size * network_evaluations(config.sampling, objective) * costs.macs(model)
    return timed(call, config, flops, seconds, size)


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def timed(call: Callable[[], Any], config: Any, flops: int, compile_seconds: float, size: int) -> dict[str, Any]:
    """Times of repeated calls of a program, with its FLOPs, compile time and memory."""
    times = intervals(call, jax.block_until_ready, config.repeats)
    memory = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    figures = {"times": times, "batch_size": config.batch_size, "flops": flops, "compile_seconds": compile_seconds}
    return figures | {"program_bytes": size, "peak_bytes": max(filter(None, memory), default=None)}


def network_evaluations(sampling: SamplingConfig, objective: ObjectiveConfig) -> int:
    """Forward passes for one sample; guidance, if any, counts at all times."""
    sampling = sampling.resolved(objective)
    one = 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps
    return one * (1 if sampling.guidance_scale == 1 else 2)


def random_weights(model: Any) -> Any:
    """The model with uniform noise added to its weights, because a new network's zeros are faster to multiply."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(leaves))  # this generator compiles fast
    noise = (jax.random.uniform(k, leaf.shape, minval=-0.04, maxval=0.04) for k, leaf in zip(keys, leaves, strict=True))
    return jax.tree.unflatten(structure, map(jnp.add, leaves, noise))


def peak(dtype: str, mesh: Mesh) -> tuple[float, int]:
    """FLOP/s of all devices in products of large random square matrices, and the side of the matrices.

    The side grows until a product takes 5 ms, or to 8,192: the practical ceiling on GPUs, and fast on CPUs.
    """
    rows, chain = NamedSharding(mesh, P(tuple(mesh.axis_names))), 4
    multiply = jax.jit(lambda x, w: jax.lax.fori_loop(0, chain, lambda _, x: x @ w, x), out_shardings=rows)

    @partial(jax.jit, static_argnums=0, out_shardings=(rows, replicated(mesh)))
    def random(n):  # the products of these matrices keep their size
        x = jax.random.normal(jax.random.key(0), (mesh.size * n, n))
        w = jax.random.normal(jax.random.key(1), (n, n)) / math.sqrt(n)
        return x.astype(dtype), w.astype(dtype)

    for n in (512, 1024, 2048, 4096, 8192):
        call = partial(multiply, *random(n))
        if min(intervals(call, jax.block_until_ready, 2)) > 0.005 * chain:
            break
    times = intervals(call, jax.block_until_ready, 10)
    return 2 * chain * mesh.size * n**3 / float(np.median(times)), n


def describe(config: Train | Sample, mesh: Mesh) -> dict[str, Any]:
    """Network, date, versions, devices, and the peak of the devices in the compute dtype."""
    device, dtype = jax.local_devices()[0], resolve_dtype(config.dtype)
    measured, side = peak(dtype, mesh)
    nominal = costs.nominal_peak(device.device_kind) if dtype == "bfloat16" else None
    return {
        "what": "train" if isinstance(config, Train) else "sample",
        "network": config.source,
        "parameters": costs.parameters(config.model),
        "matmul_dtype": config.matmul_dtype,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("ditx", "jax", "jaxlib")} | {"python": sys.version.split()[0]},
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "mesh": dict(mesh.shape),
        "dtype": dtype,
        "compiler_options": compiler_options(mesh, fp8=config.matmul_dtype == "fp8"),
        "peak_tflops_measured": measured / 1e12,
        "peak_side": side,
        "peak_tflops_nominal": nominal and nominal * mesh.size / 1e12,
    }


def with_rates(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with the median and quartiles of their times, and the rates that follow.

    Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) is relative to the peak of the devices, measured or
    nominal, in the compute dtype, also where block matmuls are in fp8.
    """
    low, median, high = (float(q) for q in np.quantile(figures["times"], [0.25, 0.5, 0.75]))
    tflops, nominal = figures["flops"] / median / 1e12, figures["peak_tflops_nominal"]
    return figures | {
        "seconds": median,
        "quartiles": [low, high],
        "images_per_second": figures["batch_size"] / median,
        "tflops": tflops,
        "mfu": tflops / figures["peak_tflops_measured"],
        "mfu_nominal": nominal and tflops / nominal,
    }


def sweep(config: Train) -> dict[str, Any]:
    """Figures of all settings that fit, and the fastest of each batch size.

    First all settings of memory with the `kernels` and `attention` of `config`; then, with the fastest of each batch
    size, the others. All combinations would be more than twice as many programs.
    """
    mesh = open_mesh(config)
    sizes = sorted(set(config.batch_sizes or (config.batch_size, 2 * config.batch_size)))
    machine, rows, too_large = describe(config, mesh), [], set()

    def attempt(*setting):
        row: dict[str, Any] = dict(zip(SETTINGS, setting, strict=True))
        try:
            if setting[1:] in too_large:
                raise OutOfMemoryError("with a smaller batch already")
            row |= with_rates(machine | train(replace(config, **row), mesh))
        except (OutOfMemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, OutOfMemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["skipped"] = f"out of memory: {first_line(error)}"
            too_large.add(setting[1:])
        gc.collect()  # memory of a failed attempt
        rows.append(row)
        if not config.json:
            print(table_line(flags_of(row), row), flush=True)

    for setting in product(sizes, sorted({1, config.model.depth}), get_args(Remat)):
        attempt(*setting, config.kernels, config.attention)
    for row, kernels, attention in product(fastest(rows).values(), ("xla", "fused"), ("auto", "fused")):
        other = replace(config, kernels=kernels, attention=attention)
        if other != config and is_supported(other, mesh):
            attempt(*(row[name] for name in SETTINGS[:3]), kernels, attention)
    best = fastest(rows)
    if not best:
        raise ValueError("no setting fits; try smaller --batch-sizes, a higher --accumulate, or --mesh.fsdp")
    overall = max(best.values(), key=lambda row: row["images_per_second"])
    by_batch_size = {size: flags_of(row) for size, row in best.items()}
    return machine | {"rows": rows, "by_batch_size": by_batch_size, "recommended": flags_of(overall)}


def is_supported(config: Train, mesh: Mesh) -> bool:
    """Whether the devices support the kernels and attention of `config`."""
    with suppress(ValueError):
        config.check_kernels(mesh, resolve_dtype(config.dtype), config.model)
        return True
    return False


def fastest(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The fastest row of each batch size that fits."""
    fitting = (row for row in rows if "skipped" not in row)
    return {row["batch_size"]: row for row in sorted(fitting, key=itemgetter("batch_size", "images_per_second"))}


def flags_of(row: dict[str, Any]) -> str:
    """A setting as flags of train.py."""
    return " ".join(f"--{name.replace('_', '-')} {row[name]}" for name in SETTINGS)


def compare(config: Train | Sample) -> dict[str, Any]:
    """Our figures, and in `compare` each peer's, measured in alternating turns, each in a new process."""
    ours = replace(config, compare=())
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ditx", *config.compare)}
    killed = "a turn was killed, probably out of memory; try a smaller --batch-size"
    with TemporaryDirectory() as cache:  # starts empty, so the first turn measures the compile time
        for turn, (name, results) in product(range(config.turns), turns.items()):
            if name == "ditx":
                work = partial(measure, ours, cache)
            else:
                first = turns["ditx"][0]
                work = partial(bench_torch.time_peer, ours, first["backend"], first["dtype"], name == "torch")
            results.append(cli.in_new_process(work, killed=killed, initializer=bench_torch.use_one_gpu))
            if not config.json:
                seconds = np.median(results[-1]["times"])
                print(f"turn {turn + 1}   {name:<12}{1e3 * seconds:>10,.2f} ms", file=sys.stderr, flush=True)
    return merge_turns(turns)


def merge_turns(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures over all turns; a peer's `ratio` is its time over ours."""
    merged = {}
    for name, results in turns.items():
        times = [time for result in results for time in result["times"]]
        medians = [float(np.median(result["times"])) for result in results]
        merged[name] = with_rates(turns["ditx"][0] | results[0] | {"times": times, "turns": medians})
    ours = merged.pop("ditx")
    for figures in merged.values():
        figures["ratio"] = figures["seconds"] / ours["seconds"]
    return ours | {"compare": merged}


def report(figures: dict[str, Any]) -> str:
    """All figures as text."""
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    mesh = ", ".join(f"{axis} {count}" for axis, count in figures["mesh"].items())
    fp8 = ", block matmuls in fp8" if figures["matmul_dtype"] == "fp8" else ""
    options = "".join(f", {name}={value}" for name, value in figures["compiler_options"].items())
    nominal = figures["peak_tflops_nominal"]
    lines = [
        f"{figures['what']:<8} {figures['network']}, {figures['parameters']:,} parameters",
        f"devices  {math.prod(figures['mesh'].values())} x {figures['device']} ({mesh})",
        f"compute  {figures['dtype']}{fp8}{options}",
        f"peak     {figures['peak_tflops_measured']:,.3f} TFLOP/s in products of side {figures['peak_side']:,}"
        + (f", nominal {nominal:,.0f}" if nominal else ""),
        f"date     {figures['date']}, {versions}",
    ]
    if "rows" in figures:
        train = cli.script("train")
        lines += [f"batch {size:<8,} {train} ... {flags}" for size, flags in figures["by_batch_size"].items()]
        return "\n".join([*lines, f"fastest        {train} ... {figures['recommended']}"])
    peers = figures.get("compare", {})
    lines += [table_line(name, row) for name, row in ({"ditx": figures} | peers).items()]
    lines += [f"median and quartiles of {len(figures['times'])} for {figures['batch_size']:,} images"]
    return "\n".join(lines)


def table_line(name: str, row: dict[str, Any]) -> str:
    """One row of figures as text."""
    if "skipped" in row:
        return f"{name:<12} skipped, {row['skipped']}"
    low, high = row["quartiles"]
    parts = [
        f"{name:<12}{1e3 * row['seconds']:>10,.2f} ms ({1e3 * low:,.2f} to {1e3 * high:,.2f})",
        f"{row['images_per_second']:,.2f} images/s",
        f"{row['tflops']:,.3f} TFLOP/s",
        f"{row['mfu']:.1%} of the peak" + (f" ({row['mfu_nominal']:.1%} of nominal)" if row["mfu_nominal"] else ""),
        f"compiled in {row['compile_seconds']:,.1f} s" if row["compile_seconds"] else "",
        f"program {row['program_bytes'] / 2**20:,.1f} MiB" if row["program_bytes"] else "",
        f"peak {row['peak_bytes'] / 2**30:,.2f} GiB" if row["peak_bytes"] else "",
        f"{row['ratio']:.2f} x the time of ditx" if "ratio" in row else "",
    ]
    return ", ".join(filter(None, parts))
