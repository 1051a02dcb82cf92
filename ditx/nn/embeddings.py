"""Embeddings of time, class labels and positions."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ditx.checks import any_mesh
from ditx.nn.layers import Linear, at_least_float32


class TimeEmbedding(eqx.Module):
    """Vector of a time in training steps (0 to 999, fractions allowed): sinusoids, then an MLP with SiLU."""

    up: Linear
    down: Linear
    frequency_shift: int = eqx.field(static=True)

    def __init__(self, hidden_size: int, *, width: int = 256, frequency_shift: int = 0, key: PRNGKeyArray):
        self.frequency_shift = frequency_shift
        up_key, down_key = jax.random.split(key)
        self.up = Linear(width, hidden_size, std=0.02, key=up_key)
        self.down = Linear(hidden_size, hidden_size, std=0.02, key=down_key)

    def __call__(self, t: Float[Array, ""] | Int[Array, ""]) -> Float[Array, " d"]:
        waves = sinusoids(t, self.up.weight.shape[0], self.frequency_shift).astype(self.up.weight.dtype)
        return self.down(jax.nn.silu(self.up(waves)))


class LabelEmbedding(eqx.Module):
    """Table of class vectors. With `null_label`, one more row at the end stands for "no class"."""

    table: Float[Array, "rows d"]

    def __init__(self, num_classes: int, hidden_size: int, *, null_label: bool, key: PRNGKeyArray):
        self.table = 0.02 * jax.random.normal(key, (num_classes + null_label, hidden_size))

    @any_mesh
    def __call__(self, y: Int[Array, ""]) -> Float[Array, " d"]:
        return self.table[y]


def sinusoids(t: Float[Array, ""] | Int[Array, ""], width: int, shift: int = 0) -> Float[Array, " width"]:
    """Cosines, then sines, of `t` at `width / 2` frequencies from 1 down to nearly 1/10000 (Vaswani et al. 2017).

    With a `shift` of 1 the last frequency is exactly 1/10000, as in diffusers.
    """
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - shift))
    dtype = at_least_float32(t.dtype)  # 999 has no exact bfloat16
    angles = t.astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def grid_positions(grid: int | tuple[int, int], hidden_size: int) -> Float[np.ndarray, "n d"]:
    """Fixed sine-cosine positions of a grid of tokens in row-major order, in float64.

    `grid` is the side of a square, or rows and columns. The first half of the channels encodes the column, the second
    half the row. Each half holds sines, then cosines, at frequencies `10000 ** (-i / (d / 4))` (the two-dimensional
    form of Vaswani et al. 2017).
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    frequencies = 10000.0 ** (-np.arange(hidden_size // 4) / (hidden_size // 4))
    angles = np.arange(max(rows, columns))[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column = np.tile(axis[:columns], (rows, 1))
    row = np.repeat(axis[:rows], columns, axis=0)
    return np.concatenate([column, row], axis=1)
