"""`ditx ema RUN TARGET --length 0.08`: an average of a run's weights, of any length, after training."""

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
    """An average of the weights of a run that was trained with --ema-every. Existing files are never overwritten."""

    run: tyro.conf.Positional[str]
    """folder of the run"""
    target: tyro.conf.Positional[str]
    """a new .safetensors file, which sample.py reads like a run"""
    length: float
    """standard deviation of the average's profile, as a fraction of the training so far, such as 0.05"""
    step: int = 0
    """a step at which the run stored averages; 0: the last"""


def main(argv: list[str]) -> int:
    """Reconstruct the average (Karras et al. 2024) and write it; returns the exit code."""
    description = "Make an average of a run's weights, of any length, from the averages that the run stored."
    config = tyro.cli(Config, args=argv, prog="ditx ema", description=description)
    run, target, gamma = Path(config.run), Path(config.target), ema.gamma_of(config.length)
    stored = runs.stored_averages(run)
    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"the target is {target}; give a new name that ends in .safetensors")
    if not stored:
        runs.read_config(run)  # raises for a folder that is no run
        raise ValueError(f"{run} has no stored averages; train with --ema-every in another --run")
    steps = sorted({step for step, _ in stored})
    step = config.step or steps[-1]
    if step not in steps:
        raise ValueError(f"step is {step}; averages are stored at {', '.join(map(str, steps))}")
    gammas = [ema.gamma_of(length) for _, length in stored]
    weights = ema.reconstruction([step for step, _ in stored], gammas, step=step, gamma=gamma)
    files = [runs.average_file(run, *each) for each in stored]
    described = pretrained.describe(files[0])
    total: Any = jax.tree.map(jnp.zeros_like, pretrained.load(files[0], described)[0])
    for weight, file in zip(weights.tolist(), files, strict=True):
        average = pretrained.load(file, described)[0]
        total = jax.tree.map(lambda sum, leaf, weight=weight: sum + weight * leaf, total, average)
    target.parent.mkdir(parents=True, exist_ok=True)
    pretrained.write(target, total, described)
    print(f"wrote    {target}: length {config.length} at step {step:,}, from {len(files)} stored averages")
    return 0
