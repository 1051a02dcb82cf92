"""Programs: compiled ahead of time, what they take of a device's memory, and the type that they compute in."""

import os
import time
from typing import Any, Literal

import jax

Dtype = Literal["auto", "float32", "bfloat16"]


class OutOfMemoryError(ValueError):
    """A program takes more memory than a device has."""


def compiled(
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


def resolved(dtype: str) -> str:
    """The type that `auto` stands for on the devices at hand."""
    return dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
