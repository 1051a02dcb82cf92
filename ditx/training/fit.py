"""Fields of a run fitted to a folder of images and to the devices, with the reasons."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from ditx.nn.dit import DIT_CONFIGS, DiTConfig
from ditx.training.config import Config

TINY = DiTConfig(hidden_size=128, depth=4, num_heads=4)
WIDE_FROM = 20_000  # images, from which an accelerator trains B instead of S


class Facts(NamedTuple):
    """The facts of images and devices by which a run is fitted."""

    images: int
    """number of images"""
    side: int
    """median of their shorter sides, in pixels"""
    platform: str
    """cpu, gpu or tpu"""
    devices: int
    """number of devices"""


def fit_fields(config: Config, given: set[str], facts: Facts) -> tuple[Config, list[str]]:
    """`config` with the fields fitted that the user has not `given`, and a line for each choice and its reason.

    Names of fields are as `steps` and `model.depth`. Figures of speed and quality exist for CPUs only (README).
    """
    images, side, platform, devices = facts
    cpu, lines = platform == "cpu", []

    def choose(reason: str, **values: Any) -> None:
        nonlocal config
        values = {name: value for name, value in values.items() if not {name, f"model.{name}"} & given}
        sizes = {name: value for name, value in values.items() if hasattr(config.model, name)}
        others = {name: value for name, value in values.items() if name not in sizes}
        config = replace(config, model=replace(config.model, **sizes), **others)
        flags = [f"--{'model.' * (name in sizes)}{name.replace('_', '-')} {value}" for name, value in values.items()]
        lines.extend([f"  {' '.join(flags)}: {reason}"] if flags else [])

    limit, across, largest_batch = (32, 8, 16) if cpu else (64, 16, 256)
    unit = config.model.patch_size if "model.patch_size" in given else 4
    choose(
        f"the images have {side} pixels; on a {platform.upper()} at most {limit} are affordable",
        input_size=max(unit, min(limit, side) // unit * unit),
    )
    size = config.model.side
    patch = next(patch for patch in range(1, size + 1) if size % patch == 0 and size // patch <= across)
    choose(
        f"{(size // patch) ** 2} tokens; on a {platform.upper()} at most {across**2} are affordable", patch_size=patch
    )
    name = "DiT-B/4" if images >= WIDE_FROM else "DiT-S/4"
    network, reason = (
        (TINY, "small enough for a CPU") if cpu else (DIT_CONFIGS[name], f"{name[:-2]}, for {images:,} images")
    )
    choose(reason, hidden_size=network.hidden_size, depth=network.depth, num_heads=network.num_heads)

    parts = devices * config.accumulate
    batch = 2 ** int(math.log2(min(images, largest_batch))) // parts * parts
    choose(f"no more than the {images:,} images, and a multiple of the devices", batch_size=max(batch, parts))
    steps = min(max(200 * images // config.batch_size, 10_000), 400_000)
    reason = "minutes on two cores; more steps make better samples" if cpu else "200 epochs, at least 10,000 steps"
    choose(reason, steps=1_500 if cpu else steps)
    steps, small = config.steps, config.model.hidden_size <= TINY.hidden_size
    choose(
        "as on the digits" if small else "the paper's",
        learning_rate=2e-3 if small else 1e-4,
        beta2=0.99 if small else 0.999,
    )
    choose("a tenth of the steps", warmup=min(steps // 10, 1_000))
    choose(
        "the samples' weights are averaged over a twentieth of the steps", ema_decay=round(max(0.9, 1 - 20 / steps), 6)
    )
    every = max(1, min(steps // 5, 2_000))
    logs = max(1, min(steps // 50, 100))
    choose("to see and to keep progress", sample_every=every, checkpoint_every=every, log_every=logs)
    choose(
        f"the faster choice on a {platform.upper()}",
        dtype="float32" if cpu else "bfloat16",
        unroll=config.model.depth if cpu and small else 1,
    )
    return config, lines
