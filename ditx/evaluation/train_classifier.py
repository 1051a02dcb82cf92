"""Training the classifier whose features compare images with a data set, on that data set."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, UInt8

from ditx.evaluation.classifier import Classifier

MAX_SIDE = 64
_BATCH, _RATE, _WARMUP, _MOMENTUM = 64, 0.1, 50, 0.9


def train_classifier(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, " n"],
    num_classes: int,
    seed: int = 0,
    steps: int = 600,
) -> tuple[Classifier, float]:
    """A classifier of such images, and its accuracy on the tenth of them that it was not trained on.

    By momentum at a rate that falls to 0, within seconds on a CPU. The seed decides weights, order and that tenth.
    Raises ValueError where there is nothing to tell apart.
    """
    if num_classes < 2 or len(images) < 20:
        raise ValueError(
            f"{len(images)} images of {num_classes} classes train no classifier; give at least 20, of 2 classes in a"
            " subfolder each"
        )
    if max(images.shape[1:3]) > MAX_SIDE:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} are more than the small classifier is made for, which is"
            f" {MAX_SIDE}; take the features of inception"
        )
    rng = np.random.default_rng(seed)
    held_out, known = np.split(rng.permutation(len(images)), [len(images) // 10])
    model = Classifier(images.shape[-1], num_classes, key=jax.random.key(seed))
    velocity = jax.tree.map(jnp.zeros_like, model)
    order = rng.permutation(known)
    for step in range(steps):
        if len(order) < _BATCH:
            order = np.concatenate([order, *(rng.permutation(known) for _ in range(1 + _BATCH // len(known)))])
        batch, order = order[:_BATCH], order[_BATCH:]
        rate = _RATE * min(1, (step + 1) / _WARMUP) * np.cos(np.pi / 2 * step / steps) ** 2
        model, velocity = _update(model, velocity, images[batch], labels[batch].astype(np.int32), np.float32(rate))
    right = [
        np.asarray(_predicted(model, images[part])) == labels[part]
        for part in np.array_split(held_out, -(-len(held_out) // 500))
    ]
    return model, float(np.concatenate(right).mean())


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
def _predicted(model: Classifier, images: UInt8[Array, "b h w c"]) -> Int[Array, " b"]:
    return jax.vmap(model)(images).logits.argmax(1)
