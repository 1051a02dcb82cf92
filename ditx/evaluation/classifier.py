"""A small convolutional classifier, whose features stand in for those of Inception where these say little."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

WIDTHS = (32, 64, 128)


class ClassifierFeatures(NamedTuple):
    """What the metrics are computed from; there is nothing for sFID."""

    pool: Float[Array, "*n 128"]
    """means over the positions of the last convolution's output"""
    spatial: None
    logits: Float[Array, "*n classes"]


class Classifier(eqx.Module):
    """Convolutions of 3 x 3 at every second position, each with a ReLU, the mean over positions, and a linear layer."""

    kernels: tuple[Float[Array, "3 3 i o"], ...]
    biases: tuple[Float[Array, " o"], ...]
    logits: Float[Array, "128 classes"]

    def __init__(self, channels: int, num_classes: int, *, key: PRNGKeyArray):
        *keys, last = jax.random.split(key, len(WIDTHS) + 1)
        init, sizes = jax.nn.initializers.he_normal(), zip((channels, *WIDTHS), WIDTHS, keys, strict=False)
        self.kernels = tuple(init(key, (3, 3, i, o)) for i, o, key in sizes)
        self.biases = tuple(jnp.zeros(width) for width in WIDTHS)
        self.logits = jax.random.normal(last, (WIDTHS[-1], num_classes)) / WIDTHS[-1] ** 0.5

    def __call__(self, image: Float[Array, "h w c"] | UInt8[Array, "h w c"]) -> ClassifierFeatures:
        """Features of an image in 0..255."""
        highest = jax.lax.Precision.HIGHEST  # so that all devices give the same features
        x = (image.astype(jnp.float32) - 127.5)[None] / 127.5
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            places = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=places, precision=highest)
            x = jax.nn.relu(x + bias)
        pool = reduce(x[0], "h w c -> c", "mean")
        return ClassifierFeatures(pool, None, jnp.matmul(pool, self.logits, precision=highest))
