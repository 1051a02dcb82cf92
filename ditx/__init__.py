"""ditx: diffusion transformers in JAX and Equinox."""

from ditx import costs
from ditx.diffusion import flow, gaussian, guidance, likelihood, loss_weights, parameterization, samplers
from ditx.diffusion.schedule import Schedule, cosine_schedule, linear_schedule, respace, sampling_grid
from ditx.evaluation import metrics
from ditx.nn.dit import DIT_CONFIGS, DiT, DiTConfig
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.training import ema
from ditx.weights import convert

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
