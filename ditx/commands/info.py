"""`ditx info [MODEL]`: what a network costs, from its configuration alone; `--paper` sets all of Table 4 beside it."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from ditx import costs
from ditx.memory import step_memory
from ditx.nn.dit import DIT_CONFIGS, BlockName, DiTConfig
from ditx.parallel.mesh import MeshConfig
from ditx.training.step import Remat
from ditx.weights import pretrained

# Table 4 of Peebles and Xie 2022: what was printed for each network (block, side of the latent, G multiply-adds,
# millions of parameters).
TABLE_4: list[tuple[str, BlockName, int, float, int]] = [
    ("DiT-S/8", "adaln-zero", 32, 0.36, 33),
    ("DiT-S/4", "adaln-zero", 32, 1.41, 33),
    ("DiT-S/2", "adaln-zero", 32, 6.06, 33),
    ("DiT-B/8", "adaln-zero", 32, 1.42, 131),
    ("DiT-B/4", "adaln-zero", 32, 5.56, 130),
    ("DiT-B/2", "adaln-zero", 32, 23.01, 130),
    ("DiT-L/8", "adaln-zero", 32, 5.01, 459),
    ("DiT-L/4", "adaln-zero", 32, 19.70, 458),
    ("DiT-L/2", "adaln-zero", 32, 80.71, 458),
    ("DiT-XL/8", "adaln-zero", 32, 7.39, 676),
    ("DiT-XL/4", "adaln-zero", 32, 29.05, 675),
    ("DiT-XL/2", "adaln-zero", 32, 118.64, 675),
    ("DiT-XL/2", "in-context", 32, 119.37, 449),
    ("DiT-XL/2", "cross-attention", 32, 137.62, 598),
    ("DiT-XL/2", "adaln", 32, 118.56, 600),
    ("DiT-XL/2", "adaln-zero", 64, 524.60, 675),
]


DEVICE = {
    "weights": "weights",
    "ema": "ema",
    "moments": "moments",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "kept for the backward pass",
    "working_room": "working room",
    "copies": "copies, which CPUs make",
    "total": "in all, at the peak",
}


@dataclass(frozen=True)
class Config:
    """Which network, and how it is trained. Flags change single fields of the network."""

    source: tyro.conf.Positional[str] = "DiT-XL/2"
    """a published network (DiT-S/8 to DiT-XL/2), the folder of a run, or a file of weights"""
    model: tyro.conf.OmitArgPrefixes[DiTConfig] = field(default_factory=DiTConfig)
    batch_size: int = 256
    """images a training step, over all devices"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """what the network computes in"""
    unroll: int = 1
    """blocks compiled in a row"""
    remat: Remat = "none"
    """what the backward pass recomputes: none; all but the products with weights (dots); whole blocks (full)"""
    accumulate: int = 1
    """parts of a batch that follow each other within one step"""
    power_emas: int = 0
    """averages by power profiles: as many as --ema-lengths, with train.py's --ema-every"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """devices, which need not be at hand; without --mesh.data, there is one copy of the weights"""
    paper: bool = False
    """print the paper's Table 4 beside our counts instead"""
    json: bool = False
    """print JSON, for programs"""


def main(argv: list[str]) -> int:
    """Print what was asked for; returns the exit code."""
    prog, description = "ditx info", "What a network costs, from its configuration alone."
    source = tyro.cli(Config, args=argv, prog=prog, description=description).source
    model = DIT_CONFIGS[source] if source in DIT_CONFIGS else _described(source)
    # Read twice: the network named on the command line sets the defaults of the other flags.
    config = tyro.cli(Config, args=argv, prog=prog, default=Config(model=model), description=description)
    for name, least in {"batch_size": 1, "unroll": 1, "accumulate": 1, "profiles": 0}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    if config.paper:
        rows = paper()
        print(json.dumps(rows, indent=2) if config.json else _paper_table(rows))
    else:
        figures = info(config)
        print(json.dumps(figures, indent=2) if config.json else _table(source, config, figures))
    return 0


def info(config: Config) -> dict[str, Any]:
    """All costs: multiply-adds of one image; FLOPs and bytes of a training step, all in all and for one device."""
    model, batch_size = config.model, config.batch_size
    count, mesh = costs.parameters(model), asdict(config.mesh)
    mesh["data"] = 1 if mesh["data"] == -1 else mesh["data"]  # the rest of devices that nobody has counted
    for name, size in mesh.items():
        if size < 1:
            raise ValueError(f"mesh.{name} is {size}; the devices need not be at hand, so give their number, 1 or more")
    options = {name: getattr(config, name) for name in ("unroll", "remat", "accumulate", "profiles")}
    held = {"weights": 1, "ema": 1 + config.power_emas, "moments": 2, "gradients": 1}
    device = step_memory(model, batch_size=batch_size, mesh=mesh, dtype=jnp.dtype(config.dtype), **options)
    return {
        "config": asdict(model),
        "parameters": count,
        "multiply_adds": costs.macs(model),
        "batch_size": batch_size,
        "training_step_flops": costs.training_step(model, batch_size),
        "bytes": {name: 4 * count * copies for name, copies in held.items()},
        "mesh": mesh,
        "dtype": config.dtype,
        **options,
        "backend": jax.default_backend(),
        "device_bytes": device | {"total": sum(device.values())},
    }


def paper() -> list[dict[str, Any]]:
    """Table 4 of the paper, row by row, with our counts and how far the printed ones are from them."""
    rows = []
    for name, block, side, printed_gmacs, printed_millions in TABLE_4:
        model = replace(DIT_CONFIGS[name], block=block, input_size=side)
        gmacs, count = costs.macs(model) / 1e9, costs.parameters(model)
        rows.append(
            {
                "model": name,
                "block": block,
                "image_size": 8 * side,
                "paper_gflops": printed_gmacs,
                "gigamacs": gmacs,
                "deviation": gmacs / printed_gmacs - 1,
                "paper_millions": printed_millions,
                "parameters": count,
                "parameters_agree": round(count / 1e6) == printed_millions,
            }
        )
    return rows


def _described(source: str) -> DiTConfig:
    if not Path(source).exists():
        raise ValueError(f"there is no network {source!r}; give {', '.join(DIT_CONFIGS)}, a run, or a file of weights")
    return pretrained.describe(Path(source)).model


def _table(source: str, config: Config, figures: dict[str, Any]) -> str:
    model, held, device = config.model, figures["bytes"], figures["device_bytes"]
    mesh = " x ".join(f"{name} {size}" for name, size in figures["mesh"].items())
    macs, step_flops = _scaled(figures["multiply_adds"]), _scaled(figures["training_step_flops"])
    changed = "" if DIT_CONFIGS.get(source) == model else ", with other fields" if source in DIT_CONFIGS else ""
    return "\n".join(
        [
            f"{source}{changed}: {model.block}, {model.depth} blocks of width {model.hidden_size},"
            f" {model.num_heads} heads, {model.num_tokens} tokens of {model.input_size}x{model.input_size}"
            f"x{model.in_channels}",
            f"parameters                   {figures['parameters']:>14,}",
            f"multiply-adds, one image     {macs:>14}  (the paper's Gflops)",
            f"a training step of {config.batch_size:<10,}{step_flops:>14}FLOP  (6 a multiply-add)",
            "held all through, float32",
            *(f"  {name:<27}{_binary(held[name]):>14}" for name in ("weights", "ema", "moments")),
            f"one device of {mesh}, on {figures['backend']}, with {config.dtype}, remat {config.remat},"
            f" accumulate {config.accumulate}, unroll {config.unroll}",
            *(f"  {text:<27}{_binary(device[name]):>14}" for name, text in DEVICE.items() if device[name]),
        ]
    )


def _scaled(count: int) -> str:
    units = {"T": 1e12, "G": 1e9, "M": 1e6}
    unit = next((unit for unit, size in units.items() if count >= size), "M")
    return f"{count / units[unit]:,.2f} {unit}"


def _binary(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _paper_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'model':<26}{'px':>4}{'Gflops':>10}{'ours':>10}{'deviation':>11}{'M params':>10}{'ours':>13}"]
    for row in rows:
        name = row["model"] + ("" if row["block"] == "adaln-zero" else f" {row['block']}")
        lines.append(
            f"{name:<26}{row['image_size']:>4}{row['paper_gflops']:>10.2f}{row['gigamacs']:>10.3f}"
            f"{row['deviation']:>+11.2%}{row['paper_millions']:>10}{row['parameters']:>13,}"
            f"{'' if row['parameters_agree'] else '  differs'}"
        )
    agree = sum(row["parameters_agree"] for row in rows)
    lines.append(
        f"Gflops in the paper are multiply-adds of one forward pass; parameters agree in {agree} of {len(rows)}."
    )
    return "\n".join(lines)
