"""Diffusion Transformers in JAX and Equinox (Peebles and Xie 2022, arXiv 2212.09748).

The public names. Every module and formula takes one example; `jax.vmap` makes the batch. Importing ditx imports
neither the data loader nor the optimizer nor the checkpoint library.
"""

from ditx import costs
from ditx.diffusion import flow, gaussian, guidance, likelihood, loss_weights, parameterization, samplers
from ditx.diffusion.schedule import Schedule, cosine_schedule, linear_schedule, respace, sampling_grid
from ditx.evaluation import metrics
from ditx.nn.dit import DIT_CONFIGS, DiT, DiTConfig
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.training import ema
from ditx.weights import convert

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
    "loss_weights",
    "metrics",
    "parameterization",
    "respace",
    "samplers",
    "sampling_grid",
]
