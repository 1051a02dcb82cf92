"""`ditx convert SOURCE TARGET`: convert weights between ditx, the authors' programs and diffusers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from ditx.nn.dit import DIT_CONFIGS, DiTConfig
from ditx.weights import convert, files, pretrained
from ditx.weights.pretrained import SourceConfig

SUFFIXES = {"ditx": (".safetensors",), "authors": (".pt", ".safetensors"), "diffusers": ("",)}


@dataclass(frozen=True)
class Config:
    """The source, the target, and facts that the source does not tell. Existing files are never overwritten."""

    source: tyro.conf.Positional[str]
    """a run, a file of the authors (.pt), of diffusers or of ditx, a folder of diffusers, or a name: DiT-XL/2-256 or
    DiT-XL/2-512, the authors' files, or OWNER/NAME on the Hugging Face hub"""
    target: tyro.conf.Positional[str]
    """a new .safetensors or .pt file or, for diffusers, a new folder"""
    to: Literal["auto", "ditx", "authors", "diffusers"] = "auto"
    """layout of the target; auto: ditx, which sample.py reads like a run, for .safetensors, authors for .pt"""
    origin: tyro.conf.OmitArgPrefixes[SourceConfig] = field(default_factory=SourceConfig)


def main(argv: list[str]) -> int:
    """Convert; returns the exit code."""
    description = "Convert weights between ditx, the authors' programs and diffusers."
    config = tyro.cli(Config, args=argv, prog="ditx convert", description=description)
    source, target = Path(config.source), Path(config.target)
    to = config.to if config.to != "auto" else "authors" if target.suffix == ".pt" else "ditx"
    if target.suffix not in SUFFIXES[to]:
        suffixes = " or ".join(suffix or "no suffix, for a folder" for suffix in SUFFIXES[to])
        raise ValueError(f"the target is {target}; give a name with {suffixes}, as the layout of {to} has")
    if target.exists():
        raise ValueError(f"{target} already exists; choose another name")
    described = pretrained.describe(source, **config.origin.facts())
    objective = described.objective
    published, _ = pretrained.published(described.model)
    if to != "ditx" and (objective.schedule, objective.prediction) != (published.schedule, published.prediction):
        raise ValueError(
            f"{source} was trained with schedule {objective.schedule} and prediction {objective.prediction}, which the"
            f" layout of {to} does not tell; write a .safetensors in the layout of ditx"
        )
    model, note = pretrained.load(source, described, **config.origin.choice())
    print(f"read     {note}", flush=True)
    for note in _notes(model.config, to):
        print(f"note     {note}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "ditx":
        pretrained.write(target, model, described)
    elif to == "authors":
        write = files.write_torch if target.suffix == ".pt" else files.write_safetensors
        write(target, convert.dit_to_torch(model))
    else:
        described, state = diffusers_config(model.config), convert.dit_to_diffusers(model)
        target.mkdir()
        files.write_safetensors(target / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
        (target / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"wrote    {target} in the layout of {to}")
    return 0


def _notes(model: DiTConfig, to: str) -> list[str]:
    """Facts about the network that its new layout does not tell, or that its user may not expect."""
    notes, depths = [], {published.hidden_size: published.depth for published in DIT_CONFIGS.values()}
    depth = depths.get(model.hidden_size, model.depth)
    if model.depth != depth:
        notes.append(f"the published network of width {model.hidden_size} has {depth} blocks, this one {model.depth}")
    if to != "ditx" and model.null_label is None:
        notes.append(f"it has no null label, which the layout of {to} does not tell; read it with --num-classes")
    if to == "authors" and model.mlp_norm_eps != 1e-6:
        notes.append(
            f"it was read with mlp_norm_eps {model.mlp_norm_eps}, which the authors' program replaces by 1e-6, so its"
            " outputs there will differ slightly; the weights are unchanged"
        )
    if (to, model.frequency_shift) in (("authors", 1), ("diffusers", 0)):
        notes.append(
            f"the time frequencies of {to} differ from those that this network was trained with, so its outputs there"
            " will differ slightly; the weights are unchanged"
        )
    return notes


def diffusers_config(model: DiTConfig) -> dict[str, Any]:
    """The `config.json` of diffusers' `DiTTransformer2DModel`. Raises ValueError for networks that it lacks."""
    if model.mlp_ratio != 4 or model.null_label is None:
        raise ValueError(
            f"mlp_ratio is {model.mlp_ratio} and label_dropout {model.label_dropout}; diffusers only has networks with"
            " mlp_ratio 4 and a null label"
        )
    return pretrained.DIFFUSERS_DIT | {
        "norm_eps": model.mlp_norm_eps,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "dropout": 0.0,
        "in_channels": model.in_channels,
        "norm_num_groups": 32,
        "num_attention_heads": model.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.depth,
        "out_channels": model.out_channels,
        "patch_size": model.patch_size,
        "sample_size": model.input_size,
        "upcast_attention": False,
    }
