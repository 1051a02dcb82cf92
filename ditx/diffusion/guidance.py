"""Guidance: predictors in, a predictor out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ditx.diffusion.gaussian import Image, Predict


def classifier_free(
    predict: Callable[[Image, Float[Array, ""], Int[Array, ""]], Float[Array, "h w o"]],
    y: int | Int[Array, ""],
    *,
    null_label: int | None,
    scale: int | float | Float[Array, ""],
    channels: int | None = None,
) -> Predict:
    """Move a prediction for label `y` away from that for no label (Ho and Salimans 2022, Eq. 6).

    The result is `without + scale * (with - without)` on the first `channels` channels, and the labelled prediction on
    the others. By default these are all channels of the noise (or velocity) and never those of the variance; the
    authors' released code guides the first 3 of 4, and the paper's numbers with guidance are made so. A Python
    `scale` of 1 is no guidance and costs no second evaluation.

    Raises ValueError where the network has no null label (`null_label` None) and the scale is not 1.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: predict(x, t, jnp.asarray(y))
    if null_label is None:
        raise ValueError(
            f"guidance with scale {scale} needs a network with a null label, and this one was trained with"
            " label_dropout 0; use scale 1"
        )

    def guided(x: Image, t: Float[Array, ""]) -> Float[Array, "h w o"]:
        labels = jnp.array([y, null_label], jnp.int32)
        conditional, unconditional = jax.vmap(lambda label: predict(x, t, label))(labels)
        count = x.shape[-1] if channels is None else channels
        moved = unconditional + scale * (conditional - unconditional)
        return jnp.where(jnp.arange(conditional.shape[-1]) < count, moved, conditional)

    return guided
