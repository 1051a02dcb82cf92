"""Programs: how they are compiled, what they take of a device's memory, and the type that they compute in."""

import ctypes
import os
import time
from typing import Any, Literal

import jax
from jax.sharding import Mesh

Dtype = Literal["auto", "float32", "bfloat16"]


class OutOfMemoryError(ValueError):
    """A program takes more memory than a device has."""


def compile_checked(
    function: Any, *arguments: Any, remedy: str = "a smaller --batch-size"
) -> tuple[jax.stages.Compiled, float, int]:
    """A jitted function made ready for arguments, the seconds this took, and the bytes it takes on each device.

    Shapes with places will do for arguments. Raises OutOfMemoryError, which says what to try, where a device has fewer.
    """
    began = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds, needed, limit = time.perf_counter() - began, memory_of(program), device_memory()
    if needed > limit:
        sizes = f"{needed / 2**30:,.2f} GiB on each device, which has {limit / 2**30:,.2f}"
        raise OutOfMemoryError(f"the program takes {sizes}; try {remedy}")
    return program, seconds, needed


def memory_of(program: jax.stages.Compiled) -> int:
    """Bytes that a program takes on each device, arguments and results included, as XLA reports it."""
    sizes: Any = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


def device_memory() -> int:
    """Bytes that a device can give; CPU devices share those of the machine."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def resolve_dtype(dtype: str) -> str:
    """The type that `auto` stands for on the devices at hand."""
    return dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"


def compiler_options(mesh: Mesh, *, fp8: bool = False) -> dict[str, bool]:
    """What XLA is told beyond its defaults, for `jax.jit`, unless XLA_FLAGS says it one way or the other.

    Several GPUs compute while they send: the schedule that NVIDIA's images of JAX have and XLA as such has not. Without
    Triton's products, which would widen factors of 8 bits first, those in FP8 are cuBLAS's. For a single GPU and plain
    products no option is known that pays.
    """
    gpus, options = mesh.devices.flat[0].platform == "gpu", {}
    if gpus and mesh.size > 1:
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    if gpus and fp8:
        options["xla_gpu_enable_triton_gemm"] = False
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


def tune_malloc() -> None:
    """Have glibc keep what this process frees, where it computes on CPUs; call it before JAX has looked for devices.

    XLA takes a program's memory from it at every call, and large pieces go back to the system after each: a step then
    has its tens of megabytes mapped anew, page by page, which takes from a sixth to a half of the time of a small
    network's. Of threads but the first, glibc keeps no piece of 64 MiB or more, so that this calls the programs; XLA's
    do all the same where there are several devices, or where processes were joined, which looks for devices.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt and jax.default_backend() == "cpu":
        trim_threshold, mmap_max = -1, -4  # numbers of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
