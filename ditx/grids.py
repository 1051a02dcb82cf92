"""The grids of networks that `ditx study` trains under one budget, and how it judges them."""

from dataclasses import dataclass, replace
from typing import Literal

from ditx.nn.dit import DIT_CONFIGS


@dataclass(frozen=True)
class Grid:
    """Networks that are trained alike, and how each is judged."""

    preset: str
    """of train.py"""
    flags: tuple[str, ...]
    """of train.py, for all"""
    networks: dict[str, tuple[str, ...]]
    """by name, the flags that make each"""
    steps: int
    every: int
    """steps between evaluations along training"""
    num: int
    """samples an evaluation"""
    drawing: tuple[str, ...]
    """flags of ditx evaluate, for all"""
    sampling_steps: tuple[int, ...]
    """numbers of sampling steps that the last weights are also judged with; the first is that of all evaluations"""
    features: Literal["inception", "classifier"] = "inception"


def _network(width: int, depth: int, heads: int, patch: int, block: str = "adaln-zero") -> tuple[str, ...]:
    fields = {"hidden-size": width, "depth": depth, "num-heads": heads, "patch-size": patch, "block": block}
    return tuple(str(word) for name, value in fields.items() for word in (f"--model.{name}", value))


def _published(name: str, block: str = "adaln-zero") -> tuple[str, ...]:
    model = DIT_CONFIGS[name]
    return _network(model.hidden_size, model.depth, model.num_heads, model.patch_size, block)


_BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")
_SMALL = {"T": (32, 2, 2), "M": (64, 3, 4), "D": (128, 4, 4)}  # tiny, medium, and that of the preset
_CIFAR10 = Grid(
    preset="cifar10",
    flags=(
        "--schedule",
        "linear",
        "--prediction",
        "eps",
        "--model.learn-sigma",
        "--decay",
        "constant",
        "--warmup",
        "500",
    ),  # as in the paper
    networks={f"{name}/{patch}": _published(f"DiT-{name}/{patch}") for patch in (8, 4, 2) for name in ("S", "B")},
    steps=10_000,
    every=2_500,
    num=10_000,
    drawing=("--sampler", "ddpm", "--dtype", "bfloat16", "--batch", "500", "--feature-batch", "250"),
    sampling_steps=(128, 16, 32, 64),
)
GRIDS = {
    "digits": Grid(
        preset="digits",
        flags=(),
        networks={
            **{f"{name}/{patch}": _network(*sizes, patch) for patch in (14, 7) for name, sizes in _SMALL.items()},
            **{f"M/7 {block}": _network(*_SMALL["M"], 7, block) for block in _BLOCKS[1:]},
        },
        steps=2000,
        every=500,
        num=2000,
        drawing=("--sampler", "euler"),
        sampling_steps=(16, 2, 4, 8),
        features="classifier",
    ),
    "sizes": _CIFAR10,
    "blocks": replace(_CIFAR10, networks={f"S/2 {block}": _published("DiT-S/2", block) for block in _BLOCKS}),
}
