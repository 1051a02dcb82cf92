"""`ditx convert SOURCE TARGET`: weights of runs, of the authors and of diffusers, each into the others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ditx.nn.dit import DIT_CONFIGS, DiTConfig
from ditx.weights import convert, files, pretrained

OVERRIDES = ("sit", "num_heads", "num_classes", "input_size", "frequency_shift")
SUFFIXES = {"ditx": (".safetensors",), "authors": (".pt", ".safetensors"), "diffusers": ("",)}


@dataclass(frozen=True)
class Config:
    """What to read and what to write. Nothing that exists is overwritten."""

    source: tyro.conf.Positional[str]
    """a run's folder; a file of the authors' (.pt), of diffusers or of ours; or diffusers' folder"""
    target: tyro.conf.Positional[str]
    """a new .safetensors or .pt file, or, for diffusers, a new folder"""
    to: Literal["auto", "ditx", "authors", "diffusers"] = "auto"
    """layout to write: ditx, which sample.py takes in place of a run, for .safetensors; authors for .pt"""
    sit: bool = False
    """the source holds weights of SiT, whose files are like DiT's"""
    num_heads: int | None = None
    """of a source that does not tell, with a width that was never published"""
    num_classes: int | None = None
    """of a source that was trained without a null label; else its label table has one row more than classes"""
    input_size: int | None = None
    """of a file from diffusers without its config.json: side of the latents"""
    frequency_shift: int | None = None
    """of a source from diffusers: 0 if its weights were trained in the authors' program and then converted"""


def main(argv: list[str]) -> int:
    """Convert; returns the exit code."""
    config = tyro.cli(
        Config, args=argv, prog="ditx convert", description="Convert weights between ditx, the authors and diffusers."
    )
    source, target = Path(config.source), Path(config.target)
    to = config.to if config.to != "auto" else "authors" if target.suffix == ".pt" else "ditx"
    if target.suffix not in SUFFIXES[to]:
        wanted = " or ".join(suffix or "no suffix, for a folder" for suffix in SUFFIXES[to])
        raise ValueError(f"the target is {target}; a name for the layout of {to} has {wanted}")
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name")
    overrides = {name: getattr(config, name) for name in OVERRIDES}
    overrides = {name: value for name, value in overrides.items() if value is not None and value is not False}
    description = pretrained.describe(source, **overrides)
    objective = description.objective
    if to != "ditx" and (objective.schedule, objective.prediction) != ("linear", "eps"):
        raise ValueError(
            f"{source} was trained with schedule {objective.schedule} and prediction {objective.prediction}, which the"
            f" layout of {to} cannot tell; write a .safetensors of ours"
        )
    model, note = pretrained.load(source, description)
    print(f"read     {note}", flush=True)
    width, depth = model.config.hidden_size, model.config.depth
    published = {c.hidden_size: c.depth for c in DIT_CONFIGS.values()}
    if published.get(width, depth) != depth:
        print(f"note     the published network of width {width} has {published[width]} blocks, and this one {depth}")
    if to != "ditx" and model.config.null_label is None:
        print(f"note     it has no null label, which the layout of {to} cannot tell; read it with --num-classes")
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "ditx":
        pretrained.write(target, model, description)
    elif to == "authors":
        _warn(description.model.frequency_shift == 1, "the authors' program")
        state = convert.dit_to_torch(model)
        (files.write_torch if target.suffix == ".pt" else files.write_safetensors)(target, state)
    else:
        _warn(description.model.frequency_shift == 0, "diffusers")
        described = json.dumps(diffusers_config(model.config), indent=2) + "\n"
        state = convert.dit_to_diffusers(model)
        target.mkdir()
        files.write_safetensors(target / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
        (target / "config.json").write_text(described)
    print(f"wrote    {target} in the layout of {to}")
    return 0


def diffusers_config(model: DiTConfig) -> dict[str, object]:
    """What `DiTTransformer2DModel.from_pretrained` reads beside the weights. Raises ValueError for what it lacks."""
    if model.mlp_ratio != 4 or model.null_label is None:
        raise ValueError(
            f"mlp_ratio is {model.mlp_ratio} and label_dropout {model.label_dropout}; diffusers has 4 alone, and"
            " networks with a null label"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "dropout": 0.0,
        "in_channels": model.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": model.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.depth,
        "out_channels": model.out_channels,
        "patch_size": model.patch_size,
        "sample_size": model.input_size,
        "upcast_attention": False,
    }


def _warn(differs: bool, program: str) -> None:
    if differs:
        print(
            f"note     {program} spaces the frequencies of time otherwise than this network was trained with, so that"
            " its outputs there will differ slightly; the weights themselves are kept"
        )
