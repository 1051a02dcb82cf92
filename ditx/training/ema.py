"""Power-function EMAs: averages of the weights, their length chosen after training (Karras et al. 2024, section 3).

At step `t`, the weights of step `s` count in proportion to `s^gamma`. The length of the average is the standard
deviation of this profile divided by `t`, and constant through training. Two such averages are tracked, and stored at
intervals; a weighted sum of the stored ones approximates an average of nearly any other length.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Numbers: TypeAlias = Float[np.ndarray, "*#n"]
LONGEST = 12**-0.5  # gamma 0: the mean of all steps


def gamma_of(length: float) -> float:
    """The power of the profile of a relative length, 0.05 for instance. Raises ValueError for an impossible length."""
    if not 0 < length < LONGEST:
        raise ValueError(f"an average's length is {length} of the run; give a share above 0 and below {LONGEST:.3f}")
    # length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), as a polynomial in gamma.
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def length_of(gamma: float) -> float:
    """The relative length of the profile with power `gamma` (Karras et al. 2024, appendix C.1)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def update_rate(step: Int[Array, ""] | int, gamma: float) -> Float[Array, ""]:
    """The weight of the new weights at update `step`, counted from 1: 1 - beta of Eq. 127.

    With such updates, the average is the integral of the weights over the profile, where the weights of step `s` hold
    from `s - 1` to `s`.
    """
    # 1 - (1 - 1 / step)^(gamma + 1) would lose most of its digits in float32 in long runs.
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / jnp.asarray(step, float)))


def inner_product(step1: Numbers, gamma1: Numbers, step2: Numbers, gamma2: Numbers) -> Float[np.ndarray, "*n"]:
    """The integral of the product of two profiles, seen from two steps (appendix C.2)."""
    # Logarithms, because powers of steps overflow.
    shorter = np.minimum(step1, step2)
    powers = (gamma1 + 1) * np.log(shorter / step1) + (gamma2 + 1) * np.log(shorter / step2)
    return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * np.exp(powers) / shorter


def reconstruction(
    steps: Sequence[int], ema_gammas: Sequence[float], *, step: int, gamma: float
) -> Float[np.ndarray, " n"]:
    """The coefficients of stored averages, each of a step and a power, whose sum is the average of `gamma` at `step`.

    The sum's profile is the nearest in least squares (appendix C.2), and it is near if averages of `step` itself are
    stored. Raises ValueError if none is stored at `step` or later.
    """
    if not len(steps) or max(steps) < step:
        raise ValueError(
            f"no average of step {step} or later is stored (there are {sorted(set(steps))}); keep training"
        )
    t, g = np.asarray(steps, np.float64), np.asarray(ema_gammas, np.float64)
    gram = inner_product(t[:, None], g[:, None], t[None], g[None])
    target = inner_product(t, g, np.full_like(t, step), np.full_like(g, gamma))
    return np.linalg.lstsq(gram, target, rcond=None)[0]
