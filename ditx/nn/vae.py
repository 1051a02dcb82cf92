"""The autoencoder of latent diffusion (Rombach et al. 2022): images to latents of an eighth of their side, and back."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.checks import any_mesh, check_example
from ditx.nn.layers import Attention, Linear, at_least_float32, with_bias


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder, by default Stable Diffusion's. Raises ValueError for sizes that do not fit together."""

    in_channels: int = 3
    """channels of an image"""
    latent_channels: int = 4
    """channels of a latent"""
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """channels of each level, from the image to the latent; each level but the last halves the sides"""
    layers_per_block: int = 2
    """residual blocks in each level of the encoder; the decoder has one more per level"""
    norm_groups: int = 32
    """groups of the group normalisation"""
    scale: float = 0.18215
    """factor on latents that gives them about unit variance"""
    mean: tuple[float, ...] = ()
    """mean of each channel of the latents, subtracted before scaling; empty: 0"""
    std: tuple[float, ...] = ()
    """standard deviation of each channel of the latents, which divides them before scaling; empty: 1"""
    quant: bool = True
    """1 x 1 convolutions next to the latent; Stable Diffusion 3 has none"""

    def __post_init__(self):
        for name in ("in_channels", "latent_channels", "layers_per_block", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.block_channels or any(width < 1 or width % self.norm_groups for width in self.block_channels):
            raise ValueError(
                f"block_channels {self.block_channels} are not multiples of norm_groups {self.norm_groups}"
            )
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be positive (Stable Diffusion's is 0.18215)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, self.latent_channels) or (name == "std" and not all(std > 0 for std in values)):
                raise ValueError(f"{name} is {values}; give a number for each of {self.latent_channels} channels")

    @property
    def downsampling(self) -> int:
        """Side of an image divided by the side of its latent."""
        return 2 ** (len(self.block_channels) - 1)

    def normalisation(self, dtype: jnp.dtype) -> tuple[Float[Array, "1 1 z"], Float[Array, "1 1 z"]]:
        """Offset and factor of each channel: a DiT sees `(latent - offset) * factor`."""
        channels = self.latent_channels
        offset, std = (np.array(own or [default] * channels) for own, default in ((self.mean, 0.0), (self.std, 1.0)))
        return jnp.asarray(offset[None, None], dtype), jnp.asarray(self.scale / std[None, None], dtype)


class Conv(eqx.Module):
    """3 x 3 convolution with bias; initial weights are uniform within `1 / sqrt(fan-in)`."""

    weight: Float[Array, "3 3 i o"]
    bias: Float[Array, " o"]

    def __init__(self, in_channels: int, out_channels: int, *, key: PRNGKeyArray):
        bound = (9 * in_channels) ** -0.5
        self.weight = jax.random.uniform(key, (3, 3, in_channels, out_channels), minval=-bound, maxval=bound)
        self.bias = jnp.zeros(out_channels)

    def __call__(self, x: Float[Array, "h w i"], *, halve: bool = False) -> Float[Array, "h2 w2 o"]:
        """With `halve`, stride 2, zero-padded only on the right and at the bottom."""
        stride, padding = (2, (0, 1)) if halve else (1, (1, 1))
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x[None], self.weight, (stride, stride), (padding, padding), dimension_numbers=dimensions
        )
        return with_bias(y[0], self.bias)


class GroupNorm(eqx.Module):
    """Group normalisation (Wu and He 2018) with statistics in float32."""

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int):
        self.weight, self.bias, self.groups = jnp.ones(channels), jnp.zeros(channels), groups

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        wide = rearrange(x, "h w (g c) -> h w g c", g=self.groups).astype(at_least_float32(x.dtype))
        centred = wide - wide.mean((0, 1, 3), keepdims=True)
        variance = jnp.square(centred).mean((0, 1, 3), keepdims=True)
        normal = rearrange(centred * jax.lax.rsqrt(variance + 1e-6), "h w g c -> h w (g c)")
        return with_bias(normal.astype(x.dtype) * self.weight[None, None], self.bias)


class ResBlock(eqx.Module):
    """Twice norm, SiLU and convolution, added to the input; `shortcut` adapts the input's channels if they change."""

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Linear | None

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, key: PRNGKeyArray):
        key1, key2, shortcut_key = jax.random.split(key, 3)
        self.norm1, self.conv1 = GroupNorm(in_channels, groups), Conv(in_channels, out_channels, key=key1)
        self.norm2, self.conv2 = GroupNorm(out_channels, groups), Conv(out_channels, out_channels, key=key2)
        self.shortcut = None if in_channels == out_channels else Linear(in_channels, out_channels, key=shortcut_key)

    def __call__(self, x: Float[Array, "h w i"]) -> Float[Array, "h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Level(eqx.Module):
    """Residual blocks at one resolution, then a convolution that halves the sides, or doubles them (nearest first)."""

    blocks: tuple[ResBlock, ...]
    resample: Conv | None

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, groups: int, resample: bool, *, key: PRNGKeyArray
    ):
        *keys, resample_key = jax.random.split(key, depth + 1)
        widths = [in_channels] + [out_channels] * depth
        self.blocks = tuple(ResBlock(widths[i], widths[i + 1], groups, key=k) for i, k in enumerate(keys))
        self.resample = Conv(out_channels, out_channels, key=resample_key) if resample else None

    def down(self, x: Float[Array, "h w i"]) -> Float[Array, "h2 w2 o"]:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x, halve=True)

    def up(self, x: Float[Array, "h w i"]) -> Float[Array, "h2 w2 o"]:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(repeat(x, "h w c -> (h a) (w b) c", a=2, b=2))


class Middle(eqx.Module):
    """Residual block, self-attention with one head, residual block, at the lowest resolution."""

    block1: ResBlock
    norm: GroupNorm
    attention: Attention
    block2: ResBlock

    def __init__(self, channels: int, groups: int, *, key: PRNGKeyArray):
        key1, attention_key, key2 = jax.random.split(key, 3)
        self.block1, self.block2 = (ResBlock(channels, channels, groups, key=k) for k in (key1, key2))
        self.norm, self.attention = GroupNorm(channels, groups), Attention(channels, 1, key=attention_key)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        x = self.block1(x)
        tokens = self.attention(rearrange(self.norm(x), "h w c -> (h w) c"))
        return self.block2(x + tokens.reshape(x.shape))


class Encoder(eqx.Module):
    """Image to the mean and the log variance of its latent, concatenated along the channels."""

    conv_in: Conv
    levels: tuple[Level, ...]
    middle: Middle
    norm: GroupNorm
    conv_out: Conv

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        widths, groups = config.block_channels, config.norm_groups
        in_key, middle_key, out_key, *keys = jax.random.split(key, 3 + len(widths))
        self.conv_in = Conv(config.in_channels, widths[0], key=in_key)
        self.levels = tuple(
            Level(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, i + 1 < len(widths), key=k)
            for i, k in enumerate(keys)
        )
        self.middle, self.norm = Middle(widths[-1], groups, key=middle_key), GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, key=out_key)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level.down(x)
        return self.conv_out(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(eqx.Module):
    """Latent to image."""

    conv_in: Conv
    middle: Middle
    levels: tuple[Level, ...]
    norm: GroupNorm
    conv_out: Conv

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        widths, groups = config.block_channels[::-1], config.norm_groups
        in_key, middle_key, out_key, *keys = jax.random.split(key, 3 + len(widths))
        self.conv_in = Conv(config.latent_channels, widths[0], key=in_key)
        self.middle = Middle(widths[0], groups, key=middle_key)
        self.levels = tuple(
            Level(widths[max(i - 1, 0)], widths[i], config.layers_per_block + 1, groups, i + 1 < len(widths), key=k)
            for i, k in enumerate(keys)
        )
        self.norm = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], config.in_channels, key=out_key)

    def __call__(self, z: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level.up(x)
        return self.conv_out(jax.nn.silu(self.norm(x)))


class AutoencoderKL(eqx.Module):
    """Stable Diffusion's autoencoder (Rombach et al. 2022, section 3.1) of one image.

    Latents that enter or leave are normalised by `config`'s scale, mean and std, as a DiT sees them. Sides of images
    are multiples of `config.downsampling`.
    """

    encoder: Encoder
    quant: Linear | None
    post_quant: Linear | None
    decoder: Decoder
    config: VAEConfig = eqx.field(static=True)

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        encoder_key, quant_key, post_quant_key, decoder_key = jax.random.split(key, 4)
        channels = config.latent_channels
        self.encoder = Encoder(config, key=encoder_key)
        self.quant = Linear(2 * channels, 2 * channels, key=quant_key) if config.quant else None
        self.post_quant = Linear(channels, channels, key=post_quant_key) if config.quant else None
        self.decoder = Decoder(config, key=decoder_key)
        self.config = config

    @any_mesh
    def encode(self, image: Float[Array, "h w c"]) -> tuple[Float[Array, "h8 w8 z"], Float[Array, "h8 w8 z"]]:
        """Mean and log variance of the latent of an image in [-1, 1], for `sample_posterior`."""
        factor, channels = self.config.downsampling, self.config.in_channels
        check_example(3, image=image)
        if image.ndim < 3 or image.shape[0] % factor or image.shape[1] % factor or image.shape[2] != channels:
            raise ValueError(
                f"the image has shape {image.shape}; its sides must be multiples of {factor}, its channels {channels}"
            )
        moments = self.encoder(image)
        mean, log_variance = jnp.split(self.quant(moments) if self.quant else moments, 2, axis=-1)
        offset, factor = self.config.normalisation(mean.dtype)
        # The reference's bounds, beyond which the standard deviation is meaningless.
        return (mean - offset) * factor, jnp.clip(log_variance, -30, 20) + 2 * jnp.log(factor)

    @any_mesh
    def decode(self, latent: Float[Array, "h8 w8 z"]) -> Float[Array, "h w c"]:
        """Image of a latent, in about [-1, 1]."""
        check_example(3, latent=latent)
        if latent.ndim < 3 or latent.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"the latent has shape {latent.shape}; the autoencoder has {self.config.latent_channels} channels"
            )
        offset, factor = self.config.normalisation(latent.dtype)
        latent = latent / factor + offset
        return self.decoder(self.post_quant(latent) if self.post_quant else latent)


def sample_posterior(
    mean: Float[Array, "*shape"], log_variance: Float[Array, "*shape"], noise: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Sample the latent's distribution, as `AutoencoderKL.encode` returns it, with standard normal `noise`."""
    return mean + jnp.exp(0.5 * log_variance) * noise
