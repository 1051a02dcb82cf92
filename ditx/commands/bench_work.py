"""What `ditx bench` times on devices: training steps and draws of a network, and the products that are their limit."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditx import costs
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DiT, DiTConfig
from ditx.parallel.compile import Dtype, OutOfMemoryError, compile_checked, compiler_options, resolve_dtype, tune_malloc
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    check_batch,
    check_mesh,
    make_mesh,
    replicated,
    shard_host_array,
)
from ditx.sampling import SamplingConfig, make_sampler
from ditx.training.step import Remat, TrainState, adamw, train_step


@dataclass(frozen=True)
class Network(KernelConfig):
    """A network at work."""

    source: tyro.conf.Positional[str] = "DiT-XL/2"
    """a published network (DiT-S/8 to DiT-XL/2), or tiny, that of the figures on two CPU cores"""
    model: tyro.conf.OmitArgPrefixes[DiTConfig] = field(default_factory=DiTConfig)
    dtype: Dtype = "auto"
    """what the network computes in; auto is float32 on CPUs and bfloat16 elsewhere"""
    unroll: int = 1
    """blocks compiled in a row"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    repeats: int = 20
    """steps, or draws, that are timed, after two that are not"""
    beside: tuple[Literal["torch", "torch-eager"], ...] = ()
    """time diffusers' DiTTransformer2DModel in PyTorch at the same work, too: compiled, eager, or both"""
    turns: int = 3
    """with --beside: how often it is each one's turn, ours first, to be timed --repeats times in a new process"""
    json: bool = False
    """print JSON, for programs"""


@dataclass(frozen=True)
class Train(Network):
    """A training step on random data: forward, backward, AdamW and the average of the weights, as train.py does it."""

    batch_size: int = 256
    """images a step, over all devices"""
    remat: Remat = "none"
    """what the backward pass recomputes: none; all but the products with weights (dots); whole blocks (full)"""
    accumulate: int = 1
    """parts of a batch that follow each other within one step"""
    sweep: bool = False
    """try all kinds of --remat with blocks unrolled and not at each of --batch-sizes, on GPUs with the fastest of each
    the other --kernels and --attention fused, too, and recommend the fastest"""
    batch_sizes: tuple[int, ...] = ()
    """with --sweep: what to try; once and twice --batch-size if not given"""


@dataclass(frozen=True)
class Sample(Network):
    """A batch drawn from noise, as sample.py does it."""

    batch_size: int = 16
    """images drawn at a time, over all devices"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(
        default_factory=lambda: SamplingConfig(guidance_scale=4.0)
    )
    repeats: int = 3
    """draws that are timed, after two that are not"""


@dataclass(frozen=True)
class Timing:
    """What was timed."""

    times: list[float]
    """seconds from one result to the next"""
    images: int
    """of each result"""
    flops: int | None = None
    """of each result"""
    compile_seconds: float | None = None
    program_bytes: int | None = None
    """on each device, arguments and results included, as XLA reports it"""


def intervals(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds from each result of `call` to the next, as in a run: off CPUs, the one after it is under way already."""
    jax.block_until_ready(call())  # with all that only a first call does
    pending, times, last = call(), [], 0.0
    for _ in range(repeats + 1):
        following = call()
        jax.block_until_ready(pending)
        now = time.perf_counter()
        times.append(now - last)
        pending, last = following, now
    jax.block_until_ready(pending)
    return times[1:]


def peak(dtype: str, mesh: Mesh) -> tuple[float, int]:
    """FLOP/s of all devices together in a large product of random matrices, and their side.

    The side grows until it takes a while, so that it is the practical ceiling on a GPU and soon found on a CPU.
    """
    spread, chain = P(tuple(mesh.axis_names)), 4

    def multiply(x, w):
        def local(x, w):  # values keep their size, and the device its temper: zeros would be quicker
            return jax.lax.fori_loop(0, chain, lambda _, x: x @ w, x)

        return jax.shard_map(local, mesh=mesh, in_specs=(spread, P()), out_specs=spread, check_vma=False)(x, w)

    def make(n):
        @partial(jax.jit, out_shardings=(NamedSharding(mesh, spread), replicated(mesh)))
        def random():
            x = jax.random.normal(jax.random.key(0), (mesh.size * n, n))
            w = jax.random.normal(jax.random.key(1), (n, n)) / math.sqrt(n)
            return x.astype(dtype), w.astype(dtype)

        return partial(jax.jit(multiply), *random())

    for n in (512, 1024, 2048, 4096, 8192):
        call = make(n)
        jax.block_until_ready(call())
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds = time.perf_counter() - began
        if seconds > 0.02 or n == 8192:
            break
    times = intervals(call, min(50, max(5, int(0.4 / seconds))))
    return 2 * chain * mesh.size * n**3 / float(np.median(times)), n


def random_weights(model: Any) -> Any:
    """A network that has come some way: the zeros with which it begins would be quicker to multiply."""
    leaves, structure = jax.tree.flatten(model)
    # A generator that compiles in no time, however many the leaves.
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(leaves))
    leaves = [
        leaf + jax.random.uniform(k, leaf.shape, minval=-0.04, maxval=0.04)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


@contextmanager
def memory_checked() -> Iterator[None]:
    """Raise OutOfMemoryError where a device has too little."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0][:200]
        raise OutOfMemoryError(f"too little memory on the devices ({line}); try a smaller --batch-size") from error


def check_network(config: Train | Sample) -> Mesh:
    """The mesh. Raises ValueError for what cannot be, before anything is compiled."""
    tune_malloc()
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, num_heads=config.model.num_heads, mlp_size=config.model.mlp_size)
    config.check_kernels(mesh, resolve_dtype(config.dtype), config.model)
    accumulate = config.accumulate if isinstance(config, Train) else 1
    for size in (config.batch_size, *(config.batch_sizes if isinstance(config, Train) else ())):
        check_batch(mesh, size, accumulate)
    return mesh


def train(config: Train) -> Timing:
    """Time training steps: the state born in its place and donated; off CPUs, the host is one step ahead."""
    mesh, model, size = check_network(config), config.model, config.model.input_size
    optimizer = adamw(1e-4)
    step = partial(
        train_step,
        objective=make_objective(objective_of(model)),
        optimizer=optimizer,
        ema_decay=0.9999,
        dtype=jnp.dtype(resolve_dtype(config.dtype)),
        unroll=config.unroll,
        remat=config.remat,
        apply_block=config.apply_block(),
        accumulate=config.accumulate,
        mesh=mesh,
    )

    def create(key):
        state = TrainState.create(model, optimizer, key=key)
        weights = random_weights(state.model)
        return replace(state, model=weights, ema=jax.tree.map(jnp.copy, weights))

    def draw(key):  # latents as ditx extract has them, or pixels
        shape, names = (config.batch_size, size, size, model.in_channels), ("x", "std")
        latent = model.in_channels == 4
        arrays = [jax.random.normal(k, shape) for k in jax.random.split(key)]
        batch = (
            {"x": arrays[0]} if not latent else dict(zip(names, (a.astype(jnp.float16) for a in arrays), strict=True))
        )
        return batch | {"y": jax.random.randint(key, shape[:1], 0, model.num_classes)}

    key = jax.jit(lambda: jax.random.key(0), out_shardings=replicated(mesh))()
    abstract = with_shardings(jax.eval_shape(create, key), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    rows = batch_sharding(mesh)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), jax.eval_shape(draw, key)
    )
    with memory_checked():
        options = compiler_options(mesh, fp8=config.matmul_dtype == "fp8")
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options=options)
        program, compile_seconds, program_bytes = compile_checked(jitted, abstract, shapes, key)
        batch = jax.jit(draw, out_shardings=rows)(key)
        state = jax.jit(create, out_shardings=places)(key)

        def call():
            nonlocal state
            state, terms = program(state, batch, key)
            return terms

        times = intervals(call, config.repeats)
    work = costs.training_step(model, config.batch_size)
    return Timing(times, config.batch_size, work, compile_seconds, program_bytes)


def sample(config: Sample) -> Timing:
    """Time draws: the whole loop is one program, its weights in what it computes in; all numbers are arguments."""
    mesh, model = check_network(config), config.model
    dtype = jnp.dtype(resolve_dtype(config.dtype))
    sampler = make_sampler(
        config.sampling,
        model,
        objective_of(model),
        mesh,
        batch_size=config.batch_size,
        unroll=config.unroll,
        kernels=config,
    )

    def create(key):
        network = random_weights(DiT(model, key=key))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), network)

    whole = replicated(mesh)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=whole)()
    abstract = with_shardings(jax.eval_shape(create, key), mesh)
    labels = shard_host_array(np.arange(config.batch_size, dtype=np.int32) % model.num_classes, whole)
    firsts = [shard_host_array(np.int32(k * config.batch_size), whole) for k in range(config.repeats + 3)]
    with memory_checked():
        rest = None, labels, np.uint32(0), firsts[0], sampler.params
        program, compile_seconds, program_bytes = compile_checked(sampler.program, abstract, *rest)
        network = jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(key)
        # Each is waited for; a CPU would run two at once.
        arguments = network, None, labels, np.uint32(0)
        times = intervals(
            lambda: jax.block_until_ready(program(*arguments, firsts.pop(), sampler.params)), config.repeats
        )
    work = 2 * config.batch_size * evaluations(config.sampling, objective_of(model)) * costs.macs(model)
    return Timing(times, config.batch_size, work, compile_seconds, program_bytes)


def objective_of(model: DiTConfig) -> ObjectiveConfig:
    """The paper's, or flow matching for a network that predicts no variance."""
    return ObjectiveConfig() if model.learn_sigma else ObjectiveConfig("flow", "velocity")


def evaluations(sampling: SamplingConfig, objective: ObjectiveConfig) -> int:
    """Forward passes for one sample, guided at all times if at any."""
    heun = sampling.resolved(objective).sampler == "heun"
    return (2 * sampling.steps - 1 if heun else sampling.steps) * (1 if sampling.guidance_scale == 1 else 2)
