"""`ditx likelihood SOURCE DATA`: bits per dimension of images, by two bounds."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ditx.cli import at_least
from ditx.data.sources import open_images
from ditx.diffusion import likelihood
from ditx.sampling import sample_keys
from ditx.weights import pretrained


@dataclass(frozen=True)
class Config:
    """The network and the images. Each image is given with its label, if the network has labels."""

    source: tyro.conf.Positional[str]
    """folder of a run, or weights, of a network of pixels"""
    data: tyro.conf.Positional[str]
    """images, best ones not trained on: an .npz of images and labels, a folder with a subfolder for each class, or
    digits (the embedded ones)"""
    num_samples: int = 100
    """number of images, spread evenly over the data; 0 takes all"""
    steps: int = 250
    """noise levels, equally spaced in log-SNR; more make both bounds tighter"""
    probes: int = 1
    """random directions that estimate the divergence of the ODE"""
    batch: int = 50
    """images at a time; only memory and speed depend on it"""
    seed: int = 0
    json: bool = False
    """print JSON, for programs"""


def main(argv: list[str]) -> int:
    """Estimate and print; returns the exit code."""
    description = "Bits per dimension of images, by the variational bound and by the probability-flow ODE."
    config = tyro.cli(Config, args=argv, prog="ditx likelihood", description=description)
    at_least(config, 0, "num_samples", "seed")
    at_least(config, 1, "probes", "batch")
    at_least(config, 2, "steps")
    described = pretrained.describe(Path(config.source))
    model = described.model
    source = open_images(config.data, model.side)
    if source.image_shape != model.input_shape:
        sizes = ["x".join(map(str, each)) for each in (source.image_shape, model.input_shape)]
        raise ValueError(f"the images are {sizes[0]}, but the network's are {sizes[1]}; give images of that size")
    if model.num_classes and source.class_names != described.class_names:
        raise ValueError(f"the classes of {config.data} are not those of {config.source}; give images of the same")
    network, note = pretrained.load(Path(config.source), described)
    if not config.json:
        print(f"weights  {note}", flush=True)
    grid = described.objective.sampler_grid(config.steps, "log-snr")

    @jax.jit
    def both(network, x, y, keys):
        def one(x, y, key):
            def predict(x, t):
                return network(x, t, y if model.num_classes else None)

            ode = likelihood.ode_bpd(grid, predict, x, key=key, probes=config.probes)
            return likelihood.variational_bpd(grid, predict, x, key=key)["total"], ode

        return jax.vmap(one)(x, y, keys)

    chosen = np.linspace(0, len(source) - 1, min(config.num_samples or len(source), len(source))).astype(int)
    size, bounds = min(config.batch, len(chosen)), np.empty((0, 2))
    for first in range(0, len(chosen), size):
        padded = np.resize(chosen[first : first + size], size)  # so that one program serves the last batch, too
        batch = source.take(padded, np.zeros(size, bool))
        result = both(network, batch["x"], batch["y"], sample_keys(config.seed, first, size))
        bounds = np.concatenate([bounds, np.stack(result, 1)[: len(chosen) - first]])
    means, errors = bounds.mean(0), bounds.std(0) / np.sqrt(len(bounds))
    report = {"variational": means[0], "variational_error": errors[0], "ode": means[1], "ode_error": errors[1]}
    if config.json:
        print(json.dumps({"images": len(bounds), "steps": config.steps, **report}, indent=2))
    else:
        print(f"{len(bounds):,} images, {config.steps} noise levels; bits per dimension, and standard errors")
        print("  variational bound  {variational:.4f} +- {variational_error:.4f}".format(**report))
        print("  bound by the ODE   {ode:.4f} +- {ode_error:.4f}".format(**report))
    return 0
