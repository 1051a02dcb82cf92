"""Guidance: a predictor made of two others."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ditx.checks import branch, check_example
from ditx.diffusion.parameterization import Predict, Scalar

Interval: TypeAlias = tuple[Scalar, Scalar]


def guide(
    predict: Predict, weaker: Predict, *, scale: Scalar, channels: int | None = None, interval: Interval | None = None
) -> Predict:
    """Move a prediction away from a weaker predictor's (autoguidance, Karras et al. 2024a, Eq. 4).

    `weaker` makes the same errors, but larger ones: a smaller or an earlier network, or the same network without the
    label. The result is `weaker + scale * (predict - weaker)` on the first `channels` channels, and `predict` on the
    others. The default is all channels of the prediction; the variance is never guided.

    Outside the `interval` of times (ends included; Kynkaanniemi et al. 2024), `weaker` is not evaluated;
    `ditx.diffusion.schedule.time_at` converts that paper's noise levels to times. A Python `scale` of 1 is no guidance
    and costs no second evaluation.
    """
    return _guided(predict, lambda x, *t: (predict(x, *t), weaker(x, *t)), scale, channels, interval)


def classifier_free(
    predict: Callable[..., Float[Array, "h w o"]],
    y: Int[ArrayLike, ""],
    *,
    null_label: Int[ArrayLike, ""] | None,
    scale: Scalar,
    channels: int | None = None,
    interval: Interval | None = None,
) -> Predict:
    """Move the prediction for label `y` away from the unconditional one (Ho and Salimans 2022, Eq. 6); see `guide`.

    `predict(x, t, y)` may take more arguments, such as a duration. Evaluates both as a batch of two. The paper's
    numbers with guidance come from the authors' released code, which guides the first 3 of 4 channels.

    Raises ValueError if the network has no null label (`null_label` None) and the scale is not 1.
    """
    if null_label is None and not _is_one(scale):
        raise ValueError(
            f"guidance with scale {scale} needs a network with a null label, and this one was trained with"
            " label_dropout 0; use scale 1"
        )

    check_example(0, y=y)

    def both(x, t, *duration):
        labels = jnp.array([y, null_label], jnp.int32)
        return tuple(jax.vmap(lambda label: predict(x, t, label, *duration))(labels))

    return _guided(lambda x, t, *duration: predict(x, t, jnp.asarray(y), *duration), both, scale, channels, interval)


def _is_one(scale: Scalar) -> bool:
    return isinstance(scale, int | float) and scale == 1


def _guided(plain: Predict, both: Callable, scale: Scalar, channels: int | None, interval: Interval | None) -> Predict:
    if _is_one(scale):
        return plain

    def guided(x, *t):
        strong, weak = both(x, *t)
        # The weaker network may lack the variance channels.
        count = x.shape[-1] if channels is None else channels
        first = weak[..., :count] + scale * (strong[..., :count] - weak[..., :count])
        return jnp.concatenate([first.astype(strong.dtype), strong[..., count:]], -1)

    def of_one_example(x, t, *duration):
        check_example(3, x=x)
        check_example(0, t=t)
        if interval is None:
            return guided(x, t, *duration)
        return branch((interval[0] <= t) & (t <= interval[1]), guided, plain, x, t, *duration)

    return of_one_example
