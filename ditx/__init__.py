"""Diffusion Transformers in JAX and Equinox (Peebles and Xie 2022, arXiv 2212.09748).

The public names. Every module and formula takes one example; `jax.vmap` makes the batch. Importing ditx imports
neither the data loader nor the optimizer nor the checkpoint library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ditx import costs
from ditx.diffusion import flow, gaussian, guidance, likelihood, loss_weights, parameterization, samplers
from ditx.diffusion.schedule import Schedule, cosine_schedule, linear_schedule, respace, sampling_grid
from ditx.evaluation import metrics
from ditx.nn.dit import DIT_CONFIGS, DiT, DiTConfig
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.training import ema
from ditx.weights import convert

if TYPE_CHECKING:
    from ditx.weights.api import load, sample, save

__version__ = "0.2.0"

__all__ = [
    "DIT_CONFIGS",
    "AutoencoderKL",
    "DiT",
    "DiTConfig",
    "Inception",
    "Schedule",
    "VAEConfig",
    "convert",
    "cosine_schedule",
    "costs",
    "ema",
    "flow",
    "gaussian",
    "guidance",
    "likelihood",
    "linear_schedule",
    "load",
    "loss_weights",
    "metrics",
    "parameterization",
    "respace",
    "sample",
    "samplers",
    "sampling_grid",
    "save",
]


def __getattr__(name: str) -> Any:
    # These three import what a run needs, the checkpoint library among it.
    if name in ("load", "sample", "save"):
        return getattr(importlib.import_module("ditx.weights.api"), name)
    raise AttributeError(f"module 'ditx' has no attribute {name!r}")
