"""ditx: diffusion transformers in JAX and Equinox."""

from ditx import convert, ema, flops, metrics
from ditx.diffusion import flow, gaussian, guidance, likelihood, predictions, samplers, weightings
from ditx.diffusion.schedule import Schedule, cosine_schedule, linear_schedule, respace, spaced
from ditx.nn.dit import DIT_CONFIGS, DiT, DiTConfig
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig

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
    "ema",
    "flops",
    "flow",
    "gaussian",
    "guidance",
    "likelihood",
    "linear_schedule",
    "metrics",
    "predictions",
    "respace",
    "samplers",
    "spaced",
    "weightings",
]
