"""`ditx ema RUN TARGET --length 0.08`: an average of the weights of any length, after training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from ditx.training import ema
from ditx.training import run as runs
from ditx.weights import pretrained


@dataclass(frozen=True)
class Config:
    """Which average to make, of a run that was trained with --ema-every. Nothing that exists is overwritten."""

    run: tyro.conf.Positional[str]
    """folder of the run"""
    target: tyro.conf.Positional[str]
    """a new .safetensors file, which sample.py takes in place of a run"""
    length: float
    """standard deviation of the average's profile, as a share of the training up to its step: 0.05, say"""
    step: int = 0
    """one at which averages are stored; the last if not given"""


def main(argv: list[str]) -> int:
    """Reconstruct and write; returns the exit code."""
    description = "Make an average of the weights of any length from those that a run has stored."
    config = tyro.cli(Config, args=argv, prog="ditx ema", description=description)
    run, target, gamma = Path(config.run), Path(config.target), ema.gamma_of(config.length)
    kept = runs.stored_averages(run)
    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"the target is {target}; give a new name that ends in .safetensors")
    if not kept:
        raise ValueError(f"{run} has stored no averages; train it with --ema-every")
    steps = sorted({step for step, _ in kept})
    step = config.step or steps[-1]
    if step not in steps:
        raise ValueError(f"step is {step}; averages are stored of {', '.join(map(str, steps))}")
    powers = [ema.gamma_of(length) for _, length in kept]
    shares = ema.reconstruction([step for step, _ in kept], powers, step=step, gamma=gamma)
    files = [runs.average_file(run, *each) for each in kept]
    described = pretrained.describe(files[0])
    total: Any = jax.tree.map(jnp.zeros_like, pretrained.load(files[0], described)[0])
    for share, file in zip(shares.tolist(), files, strict=True):
        stored, _ = pretrained.load(file, described)
        total = jax.tree.map(lambda sum, leaf, share=share: sum + share * leaf, total, stored)
    target.parent.mkdir(parents=True, exist_ok=True)
    pretrained.write(target, total, described)
    print(f"wrote    {target}: length {config.length} at step {step:,}, of {len(files)} stored averages")
    return 0
