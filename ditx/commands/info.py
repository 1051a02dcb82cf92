"""`ditx info [MODEL]`: costs of a network, from its configuration only; `--paper` compares with the paper's Table 4."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from ditx import checks, cli, costs
from ditx.nn.dit import DIT_CONFIGS, BlockName, DiTConfig
from ditx.parallel.mesh import MeshConfig
from ditx.training.step import Remat
from ditx.weights import hub, pretrained

# Table 4 of Peebles and Xie 2022 as printed: network, block, side of the latent, Gflops (multiply-adds), millions of
# parameters.
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


@dataclass(frozen=True)
class Config:
    """The network and its training step. Flags change single fields of the network; --model DiT-S/4 sets its sizes."""

    source: tyro.conf.Positional[str] = "DiT-XL/2"
    """a published network (DiT-S/8 to DiT-XL/2), the folder of a run, or a file of weights"""
    model: tyro.conf.OmitArgPrefixes[DiTConfig] = field(default_factory=DiTConfig)
    batch_size: int = 256
    """images a training step, over all devices"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """compute dtype"""
    remat: Remat = "none"
    """backward pass recomputes: nothing, all but matmuls (dots), blocks (full)"""
    accumulate: int = 1
    """parts of a batch computed in turn"""
    power_emas: int = 0
    """power-function EMAs, one for each of train.py's --ema-lengths"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """devices, which need not exist; one copy of the weights without --mesh.data"""
    paper: bool = False
    """print the paper's Table 4 beside our counts"""
    json: bool = False
    """print JSON"""


def main(argv: list[str]) -> int:
    """Print the costs; returns the exit code."""
    description = "Costs of a network and its training step, from the configuration only."
    parse = partial(cli.parse, Config, args=cli.expand_model(argv, ""), prog="ditx info", description=description)
    config, _ = cli.parse_with_defaults(parse, lambda first: (Config(model=network(first.source)), None))
    cli.at_least(config, 1, "batch_size", "accumulate")
    cli.at_least(config, 0, "power_emas")
    figures = paper() if config.paper else info(config)
    if config.json:
        print(json.dumps(figures, indent=2))
    else:
        print(table(config, figures) if isinstance(figures, dict) else paper_table(figures))
    return 0


def network(source: str) -> DiTConfig:
    """The configuration of a published network, a run or a file of weights. Raises ValueError for anything else."""
    if source in DIT_CONFIGS:
        return DIT_CONFIGS[source]
    if not Path(source).exists() and not hub.is_name(source):
        raise checks.unknown("network", source, [*DIT_CONFIGS, "a run", "a file of weights"])
    return pretrained.describe(Path(source)).model


def info(config: Config) -> dict[str, Any]:
    """Multiply-adds of one image; FLOPs and bytes of a training step; bytes of one device, an estimate."""
    model, batch_size, count = config.model, config.batch_size, costs.parameters(config.model)
    mesh = replace(config.mesh, data=1) if config.mesh.data == -1 else config.mesh  # devices are not counted
    for name, size in asdict(mesh).items():
        if size < 1:
            raise ValueError(f"mesh.{name} is {size}; give the number of devices, at least 1 (they need not exist)")
    options = {name: getattr(config, name) for name in ("dtype", "remat", "accumulate", "power_emas")}
    device = costs.step_memory(model, batch_size=batch_size, mesh=mesh, **options)
    copies = {"weights": 1, "ema": 1 + config.power_emas, "moments": 2, "gradients": 1}
    return {
        "config": asdict(model),
        "parameters": count,
        "multiply_adds": costs.macs(model),
        "batch_size": batch_size,
        "training_step_flops": costs.training_step(model, batch_size),
        "bytes": {name: 4 * count * number for name, number in copies.items()},
        "mesh": asdict(mesh),
        **options,
        "device_bytes": device | {"total": sum(device.values())},
    }


def paper() -> list[dict[str, Any]]:
    """Rows of the paper's Table 4 with our counts and their deviation."""
    rows = []
    for name, block, side, gflops, millions in TABLE_4:
        model = replace(DIT_CONFIGS[name], block=block, input_size=side)
        gmacs, count = costs.macs(model) / 1e9, costs.parameters(model)
        row = {"model": name, "block": block, "image_size": 8 * side, "paper_gflops": gflops, "gigamacs": gmacs}
        row |= {"deviation": gmacs / gflops - 1, "paper_millions": millions, "parameters": count}
        rows.append(row | {"parameters_agree": round(count / 1e6) == millions})
    return rows


def table(config: Config, figures: dict[str, Any]) -> str:
    """The costs, for people."""
    model = config.model
    name = next((name for name, published in DIT_CONFIGS.items() if published == model), config.source)
    mesh = " x ".join(f"{name} {size}" for name, size in figures["mesh"].items())
    changed = ", changed by flags" if DIT_CONFIGS.get(name, model) != model else ""
    bytes_of = {name: _binary(size) for name, size in figures["bytes"].items() if name != "gradients"}
    lines = [
        f"{name}{changed}: {model.block}, {model.depth} blocks of width {model.hidden_size}, {model.num_heads} heads,"
        f" {model.num_tokens} tokens of {'x'.join(map(str, model.input_shape))}",
        f"parameters                   {figures['parameters']:>14,}",
        f"multiply-adds of an image    {costs.scaled(figures['multiply_adds']):>14}  (the paper's Gflops)",
        f"training step, batch {config.batch_size:<8,}{costs.scaled(figures['training_step_flops']):>14}FLOP"
        "  (6 for each multiply-add)",
        "memory of all devices, float32, one copy",
        *(f"  {name:<27}{size:>14}" for name, size in bytes_of.items()),
        f"memory of one device in a training step, an estimate: {mesh}, {config.dtype}, remat {config.remat},"
        f" accumulate {config.accumulate}",
        *(f"  {name.replace('_', ' '):<27}{_binary(size):>14}" for name, size in figures["device_bytes"].items()),
    ]
    return "\n".join(lines)


def _binary(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def paper_table(rows: list[dict[str, Any]]) -> str:
    """The paper's Table 4 beside our counts, for people."""
    lines = [f"{'model':<26}{'px':>4}{'Gflops':>10}{'ours':>10}{'deviation':>11}{'M params':>10}{'ours':>13}"]
    for row in rows:
        name = row["model"] + ("" if row["block"] == "adaln-zero" else f" {row['block']}")
        lines.append(
            f"{name:<26}{row['image_size']:>4}{row['paper_gflops']:>10.2f}{row['gigamacs']:>10.3f}"
            f"{row['deviation']:>+11.2%}{row['paper_millions']:>10}{row['parameters']:>13,}"
            f"{'' if row['parameters_agree'] else '  differs'}"
        )
    agree = sum(row["parameters_agree"] for row in rows)
    note = f"The paper's Gflops are multiply-adds of one forward pass; parameters agree in {agree} of {len(rows)}."
    return "\n".join([*lines, note])
