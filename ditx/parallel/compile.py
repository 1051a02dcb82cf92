"""Compilation of programs, their memory on a device, and their dtype."""

import ctypes
import os
import time
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh

from ditx.checks import check_choice

Dtype = Literal["auto", "float32", "bfloat16"]


class OutOfMemoryError(ValueError):
    """A program needs more memory than a device has."""


def compile_checked(
    function: Any, *arguments: Any, remedy: str = "a smaller --batch-size"
) -> tuple[jax.stages.Compiled, float, int]:
    """Compile a jitted function; returns the program, the seconds this took, and its bytes on each device.

    Arguments may be shapes with shardings. Raises OutOfMemoryError with the remedy if a device has less memory.
    """
    began = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds, needed, limit = time.perf_counter() - began, memory_of(program), device_memory()
    if needed > limit:
        sizes = f"{needed / 2**30:,.2f} GiB on each device, which has {limit / 2**30:,.2f}"
        raise OutOfMemoryError(f"the program needs {sizes}; try {remedy}")
    return program, seconds, needed


def memory_of(program: jax.stages.Compiled) -> int:
    """Bytes of a program on each device, with arguments and results, as XLA reports them."""
    sizes: Any = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


def device_memory() -> int:
    """Bytes of memory of a device. CPU devices share the machine's memory."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def resolve_dtype(dtype: str) -> str:
    """The dtype that `auto` means on these devices: float32 on CPUs, else bfloat16. Raises ValueError for others."""
    check_choice("dtype", dtype, get_args(Dtype))
    return dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"


def compiler_options(mesh: Mesh, *, fp8: bool = False) -> dict[str, bool]:
    """XLA options beyond the defaults, for `jax.jit`. XLA_FLAGS takes precedence.

    Several GPUs overlap communication with computation, as NVIDIA's images of JAX do and XLA by default does not. FP8
    products go to cuBLAS, since Triton would widen the factors first. For a single GPU without FP8 no option is known
    to pay.
    """
    gpus, options = mesh.devices.flat[0].platform == "gpu", {}
    if gpus and mesh.size > 1:
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    if gpus and fp8:
        options["xla_gpu_enable_triton_gemm"] = False
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


def tune_malloc() -> None:
    """Make glibc keep freed memory if this process computes on CPUs. Call it before JAX has looked for devices.

    XLA allocates a program's memory at every call, and glibc returns large blocks to the system after each. Mapping
    tens of megabytes again, page by page, takes from a sixth to a half of a small network's step. Only the main
    thread's arena keeps blocks of 64 MiB or more, so asynchronous dispatch is turned off and that thread calls the
    programs. With several CPU devices, or with processes that have been joined, XLA's own threads still call them.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # exists in glibc only
    if mallopt and jax.default_backend() == "cpu":
        trim_threshold, mmap_max = -1, -4  # constants of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
