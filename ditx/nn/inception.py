"""Inception-v3 (Szegedy et al. 2015) as released on 2015-12-05: the network behind FID and related metrics.

It differs from the published network: average pools ignore the border, and the last block has a max pool instead of an
average pool. Layers have the names of the TensorFlow graph, which torch's files use as well.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from ditx.checks import any_mesh, check_choice, check_example
from ditx.nn.layers import at_least_float32, with_bias

Resize = Literal["adm", "pytorch-fid"]
Pool = Literal["avg", "max", "max/2"]

SIDE = 299  # side of the network's input


def _a(pool: int) -> dict[str, str]:
    return {
        "branch1x1": "64:1x1",
        "branch5x5": "48:1x1 64:5x5",
        "branch3x3dbl": "64:1x1 96:3x3 96:3x3",
        "branch_pool": f"avg {pool}:1x1",
    }


def _c(c: int) -> dict[str, str]:
    return {
        "branch1x1": "192:1x1",
        "branch7x7": f"{c}:1x1 {c}:1x7 192:7x1",
        "branch7x7dbl": f"{c}:1x1 {c}:7x1 {c}:1x7 {c}:7x1 192:1x7",
        "branch_pool": "avg 192:1x1",
    }


def _e(pool: Pool) -> dict[str, str]:
    return {
        "branch1x1": "320:1x1",
        "branch3x3": "384:1x1 384:1x3+384:3x1",
        "branch3x3dbl": "448:1x1 384:3x3 384:1x3+384:3x1",
        "branch_pool": f"{pool} 192:1x1",
    }


# The branches of each block, whose outputs are concatenated in this order. A branch is an optional pool, then
# convolutions "channels:height x width", with "/2" for stride 2; two convolutions joined by "+" have the same input.
_BLOCKS: dict[str, dict[str, str]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": {"branch3x3": "384:3x3/2", "branch3x3dbl": "64:1x1 96:3x3 96:3x3/2", "branch_pool": "max/2"},
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": {
        "branch3x3": "192:1x1 320:3x3/2",
        "branch7x7x3": "192:1x1 192:1x7 192:7x1 192:3x3/2",
        "branch_pool": "max/2",
    },
    "Mixed_7b": _e("avg"),
    "Mixed_7c": _e("max"),
}


class ConvUnit(eqx.Module):
    """Convolution, batch normalisation with fixed statistics (Ioffe and Szegedy 2015), ReLU."""

    weight: Float[Array, "h w i o"]
    scale: Float[Array, " o"]
    bias: Float[Array, " o"]
    mean: Float[Array, " o"]
    variance: Float[Array, " o"]
    name: str = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    padding: Literal["SAME", "VALID"] = eqx.field(static=True)

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: Literal["SAME", "VALID"] = "SAME",
        *,
        key: PRNGKeyArray,
    ):
        self.weight = jax.nn.initializers.he_normal()(key, (*kernel, in_channels, out_channels))
        self.scale, self.variance = jnp.ones(out_channels), jnp.ones(out_channels)
        self.bias, self.mean = jnp.zeros(out_channels), jnp.zeros(out_channels)
        self.name, self.stride, self.padding = name, stride, padding

    def __call__(self, x: Float[Array, "h w i"]) -> Float[Array, "h2 w2 o"]:
        scale = self.scale * jax.lax.rsqrt(self.variance + 1e-3)
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight * scale[None, None, None],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,  # Features are compared with other programs' features.
        )
        return jax.nn.relu(with_bias(y[0], self.bias - self.mean * scale))


class Branch(eqx.Module):
    """Optional pool, then steps of one convolution or of two with concatenated outputs, as in the table of blocks."""

    steps: tuple[tuple[ConvUnit, ...], ...]
    pool: Pool | None = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)

    def __init__(self, name: str, description: str, in_channels: int, *, key: PRNGKeyArray):
        """A single convolution has the name of the branch, others a number and, if two share an input, a letter."""
        words, steps = description.split(), []
        self.pool = next((pool for pool in get_args(Pool) if pool == words[0]), None)
        words = words[self.pool is not None :]
        for number, word in enumerate(words, 1):
            step, parts = [], word.split("+")
            for letter, part in zip("ab", parts, strict=False):
                channels, height, width, *stride = map(int, re.split("[:x/]", part))
                unit = name + f"_{number}" * (len(words) > 1) + letter * (len(parts) > 1)
                padding = (stride[0], "VALID") if stride else (1, "SAME")
                key, unit_key = jax.random.split(key)
                step.append(ConvUnit(unit, in_channels, channels, (height, width), *padding, key=unit_key))
            steps.append(tuple(step))
            in_channels = sum(unit.bias.size for unit in step)
        self.steps, self.out_channels = tuple(steps), in_channels

    def __call__(self, x: Float[Array, "h w i"]) -> Float[Array, "h2 w2 o"]:
        if self.pool == "avg":
            x = average_pool(x)
        elif self.pool is not None:
            x = max_pool(x, 2 if self.pool == "max/2" else 1)
        for step in self.steps:
            x = jnp.concatenate([unit(x) for unit in step], axis=-1)
        return x


class Features(NamedTuple):
    """The features from which the metrics are computed."""

    pool: Float[Array, "*n d"]
    """for FID, precision and recall: mean of the last block's output over positions; Inception's 2048"""
    spatial: Float[Array, "*n s"] | None
    """for sFID: the first 7 channels of Mixed_6d's 1 x 1 branch at 17 x 17 positions, channels last: 2023"""
    logits: Float[Array, "*n classes"] | None
    """for the Inception Score: without bias, as in the ADM suite; 1008"""


class Inception(eqx.Module):
    """The FID network for one image of any size; `logits=False` omits the layer that only the Inception Score needs."""

    stem: tuple[ConvUnit, ...]
    blocks: tuple[tuple[Branch, ...], ...]
    logits: Float[Array, "2048 1008"] | None

    def __init__(self, *, logits: bool = True, key: PRNGKeyArray):
        stem_key, blocks_key, logits_key = jax.random.split(key, 3)
        keys = jax.random.split(stem_key, 5)
        self.stem = (
            ConvUnit("Conv2d_1a_3x3", 3, 32, (3, 3), 2, "VALID", key=keys[0]),
            ConvUnit("Conv2d_2a_3x3", 32, 32, (3, 3), 1, "VALID", key=keys[1]),
            ConvUnit("Conv2d_2b_3x3", 32, 64, (3, 3), key=keys[2]),
            ConvUnit("Conv2d_3b_1x1", 64, 80, (1, 1), key=keys[3]),
            ConvUnit("Conv2d_4a_3x3", 80, 192, (3, 3), 1, "VALID", key=keys[4]),
        )
        channels, blocks = 192, []
        for name, branches in _BLOCKS.items():
            block = []
            for branch, description in branches.items():
                blocks_key, branch_key = jax.random.split(blocks_key)
                block.append(Branch(f"{name}.{branch}", description, channels, key=branch_key))
            blocks.append(tuple(block))
            channels = sum(branch.out_channels for branch in block)
        self.blocks = tuple(blocks)
        self.logits = jax.random.normal(logits_key, (channels, 1008)) / channels**0.5 if logits else None

    @any_mesh
    def __call__(self, image: Float[Array, "h w c"] | UInt8[Array, "h w c"], *, resize: Resize = "adm") -> Features:
        """Features of an image in 0..255; `resize` as in `prepare`."""
        x = prepare(image, resize).astype(self.stem[0].weight.dtype)
        for unit in self.stem[:3]:
            x = unit(x)
        x = max_pool(x, 2)
        for unit in self.stem[3:]:
            x = unit(x)
        x = max_pool(x, 2)
        outputs = {}
        for name, block in zip(_BLOCKS, self.blocks, strict=True):
            outputs[name] = x = jnp.concatenate([branch(x) for branch in block], axis=-1)
        pool, spatial = reduce(x, "h w c -> c", "mean"), outputs["Mixed_6d"][..., :7]
        highest = jax.lax.Precision.HIGHEST
        logits = None if self.logits is None else jnp.matmul(pool, self.logits, precision=highest)
        return Features(pool, spatial.reshape(-1), logits)


def prepare(image: Float[Array, "h w c"] | UInt8[Array, "h w c"], resize: Resize = "adm") -> Float[Array, "299 299 3"]:
    """Resize an image in 0..255 to the network's input by linear interpolation without antialiasing, and scale it.

    "adm" is the TensorFlow graph's resize, also used by the ADM suite: output position i is input position i h / 299,
    and values become (x - 128) / 128. "pytorch-fid" aligns pixel centres and scales to (x - 127.5) / 127.5.
    """
    check_example(3, image=image)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"the image has shape {image.shape}; give height, width and 3 channels (repeat a grey one)")
    check_choice("resize", resize, get_args(Resize))
    x = jnp.asarray(image).astype(at_least_float32(image.dtype))
    for axis in (1, 0):
        x = _resized(x, axis, shift=0.0 if resize == "adm" else 0.5)
    middle = 128 if resize == "adm" else 127.5
    return (x - middle) / middle


def _resized(x: Float[Array, "h w c"], axis: int, shift: float) -> Float[Array, "h2 w2 c"]:
    size = x.shape[axis]
    position = np.clip((np.arange(SIDE) + shift) * (size / SIDE) - shift, 0, size - 1)
    low = np.floor(position).astype(int)
    fraction = np.expand_dims(position - low, [other for other in range(3) if other != axis])
    start = jnp.take(x, low, axis)
    return start + (jnp.take(x, np.minimum(low + 1, size - 1), axis) - start) * fraction.astype(x.dtype)


def max_pool(x: Float[Array, "h w c"], stride: int = 1) -> Float[Array, "h2 w2 c"]:
    """3 x 3 max pool: padded with stride 1, unpadded with others."""
    return _windows(x, jax.lax.max, -jnp.inf, stride)


def average_pool(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """3 x 3 average pool with stride 1 that counts only positions within the image."""
    return _windows(x, jax.lax.add, 0.0, 1) / _windows(jnp.ones((*x.shape[:2], 1), x.dtype), jax.lax.add, 0.0, 1)


def _windows(
    x: Float[Array, "h w c"], combine: Callable[[Array, Array], Array], border: float, stride: int
) -> Float[Array, "h2 w2 c"]:
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, jnp.asarray(border, x.dtype), combine, (3, 3, 1), (stride, stride, 1), padding)
