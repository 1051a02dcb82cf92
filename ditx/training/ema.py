"""Averages of the weights whose length is chosen after training (Karras et al. 2024, section 3).

Such an average weighs the weights of step `s`, seen from step `t`, in proportion to `s^gamma`; its length is the
standard deviation of that profile over `t`, which stays the same all along. Two of them, kept while training and stored
now and then, span nearly any other: a weighted sum of the stored ones.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Numbers: TypeAlias = Float[np.ndarray, "*#n"]
LONGEST = 12**-0.5  # of gamma 0: all steps alike


def gamma_of(length: float) -> float:
    """The power of a profile of relative length `length`, 0.05 or 0.10 say. Raises ValueError outside its range."""
    if not 0 < length < LONGEST:
        raise ValueError(f"an average's length is {length} of the run; give a share above 0 and below {LONGEST:.3f}")
    # length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), as a polynomial in gamma.
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def length_of(gamma: float) -> float:
    """The relative length of the profile with power `gamma` (Karras et al. 2024, appendix C.1)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def update_rate(step: Int[Array, ""] | int, gamma: float) -> Float[Array, ""]:
    """By what share the average moves to the new weights at update `step`, the first being 1 (1 - beta of Eq. 127).

    So updated, it is the mean of the weights over the profile, the weights of step `s` standing from `s - 1` to `s`.
    """
    # Not 1 - (1 - 1 / step)^(gamma + 1), of which float32 leaves little in long runs.
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / jnp.asarray(step, float)))


def inner_product(step1: Numbers, gamma1: Numbers, step2: Numbers, gamma2: Numbers) -> Float[np.ndarray, "*n"]:
    """The integral of the product of two profiles, seen from two steps (appendix C.2)."""
    # Logarithms, since powers of steps overflow.
    shorter = np.minimum(step1, step2)
    powers = (gamma1 + 1) * np.log(shorter / step1) + (gamma2 + 1) * np.log(shorter / step2)
    return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * np.exp(powers) / shorter


def reconstruction(
    steps: Sequence[int], ema_gammas: Sequence[float], *, step: int, gamma: float
) -> Float[np.ndarray, " n"]:
    """The weights with which stored averages, each of a step and a power, sum to that of `gamma` at `step`.

    Those whose profile is nearest to the wanted one in least squares (appendix C.2), which is near at a `step` of which
    there are some. Raises ValueError where there are none, or none so late.
    """
    if not len(steps) or max(steps) < step:
        raise ValueError(
            f"no average of step {step} or later is stored (there are {sorted(set(steps))}); keep training"
        )
    t, g = np.asarray(steps, np.float64), np.asarray(ema_gammas, np.float64)
    gram = inner_product(t[:, None], g[:, None], t[None], g[None])
    wanted = inner_product(t, g, np.full_like(t, step), np.full_like(g, gamma))
    return np.linalg.lstsq(gram, wanted, rcond=None)[0]
