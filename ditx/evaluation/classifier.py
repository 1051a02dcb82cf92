"""A small convolutional classifier, whose features replace Inception's where those say little, as on digits."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, UInt8

from ditx.nn.inception import Features

WIDTHS = (32, 64, 128)
MAX_SIDE = 64
_BATCH, _RATE, _WARMUP, _MOMENTUM = 64, 0.1, 50, 0.9


class Classifier(eqx.Module):
    """3 x 3 convolutions of stride 2, each with a ReLU, then the mean over positions, then a linear layer."""

    kernels: tuple[Float[Array, "3 3 i o"], ...]
    biases: tuple[Float[Array, " o"], ...]
    logits: Float[Array, "128 classes"]

    def __init__(self, channels: int, num_classes: int, *, key: PRNGKeyArray):
        *keys, last = jax.random.split(key, len(WIDTHS) + 1)
        init, sizes = jax.nn.initializers.he_normal(), zip((channels, *WIDTHS), WIDTHS, keys, strict=False)
        self.kernels = tuple(init(key, (3, 3, i, o)) for i, o, key in sizes)
        self.biases = tuple(jnp.zeros(width) for width in WIDTHS)
        self.logits = jax.random.normal(last, (WIDTHS[-1], num_classes)) / WIDTHS[-1] ** 0.5

    def __call__(self, image: Float[Array, "h w c"] | UInt8[Array, "h w c"]) -> Features:
        """Features of an image in 0..255; none are spatial."""
        highest = jax.lax.Precision.HIGHEST  # so that all devices give the same features
        x = (image.astype(jnp.float32) - 127.5)[None] / 127.5
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout, precision=highest)
            x = jax.nn.relu(x + bias)
        pool = reduce(x[0], "h w c -> c", "mean")
        return Features(pool, None, jnp.matmul(pool, self.logits, precision=highest))


def train_classifier(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, " n"],
    num_classes: int,
    seed: int = 0,
    steps: int = 600,
) -> tuple[Classifier, float]:
    """Train a classifier on nine tenths of the images; returns it and its accuracy on the other tenth.

    SGD with momentum and a rate that falls to 0 takes seconds on a CPU. The seed decides weights, order and split.
    Raises ValueError for too few images or classes, or too large images.
    """
    if num_classes < 2 or len(images) < 20:
        raise ValueError(
            f"{len(images)} images of {num_classes} classes cannot train a classifier; give at least 20, with a"
            " subfolder for each of at least 2 classes"
        )
    if max(images.shape[1:3]) > MAX_SIDE:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} are too large for the small classifier, which takes up to"
            f" {MAX_SIDE}x{MAX_SIDE}; use --features inception"
        )
    rng = np.random.default_rng(seed)
    held_out, training = np.split(rng.permutation(len(images)), [len(images) // 10])
    model = Classifier(images.shape[-1], num_classes, key=jax.random.key(seed))
    velocity = jax.tree.map(jnp.zeros_like, model)
    order = rng.permutation(training)
    for step in range(steps):
        if len(order) < _BATCH:
            order = np.concatenate([order, *(rng.permutation(training) for _ in range(1 + _BATCH // len(training)))])
        batch, order = order[:_BATCH], order[_BATCH:]
        rate = _RATE * min(1, (step + 1) / _WARMUP) * np.cos(np.pi / 2 * step / steps) ** 2
        model, velocity = _update(model, velocity, images[batch], labels[batch].astype(np.int32), np.float32(rate))
    parts = np.array_split(held_out, -(-len(held_out) // 500))
    correct = [np.asarray(_classify(model, images[part])) == labels[part] for part in parts]
    return model, float(np.concatenate(correct).mean())


@jax.jit
def _update(
    model: Classifier,
    velocity: Classifier,
    images: UInt8[Array, "b h w c"],
    labels: Int[Array, " b"],
    rate: Float[Array, ""],
) -> tuple[Classifier, Classifier]:
    def loss(model):
        log_p = jax.nn.log_softmax(jax.vmap(model)(images).logits)
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, jax.grad(loss)(model))
    return jax.tree.map(lambda w, v: w - rate * v, model, velocity), velocity


@jax.jit
def _classify(model: Classifier, images: UInt8[Array, "b h w c"]) -> Int[Array, " b"]:
    logits: Any = jax.vmap(model)(images).logits
    return logits.argmax(1)
