"""ditx: diffusion transformers in JAX and Equinox."""

from ditx import convert, flops, metrics
from ditx.diffusion import flow, gaussian, guidance, samplers
from ditx.diffusion.schedule import Schedule, linear_schedule, respace
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
    "flops",
    "flow",
    "gaussian",
    "guidance",
    "linear_schedule",
    "metrics",
    "respace",
    "samplers",
]
