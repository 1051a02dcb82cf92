"""Attention as fused GPU kernels, in Pallas for Triton (Dao 2023).

A program loops over blocks of keys for one block of queries. Scores are never stored, and are recomputed for the
gradients. The kernels read queries, keys and values in the layout of the projections, each head by its own columns.
Heads whose width is not a power of two are multiplied in parts: 72 as 64 and 16, with half of the second part masked. A
kernel sees one example; `jax.vmap` puts the batch into the grid of one launch. Without a GPU, Pallas interprets the
kernels, slowly, for tests.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from ditx.kernels.elementwise import on_gpu

# Number of queries or keys of a program, and of one step of its loop. An H100's products of 64 rows want four warps; no
# kernel then exceeds the registers (125 to 185 a thread for heads of width 72) or 64 KiB of shared memory.
_ROWS, _STEP = 64, 64


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    q: Float[Array, "n d"], k: Float[Array, "m d"], v: Float[Array, "m d"], num_heads: int
) -> Float[Array, "n d"]:
    """Scaled dot-product attention, each of `num_heads` heads on its share of the channels; float32 inside."""
    return _forward(q, k, v, num_heads)[0]


def _forward(q, k, v, num_heads):
    n, m, width = q.shape[0], k.shape[0], q.shape[1] // num_heads
    rows, step = _block(n, _ROWS), _block(m, _STEP)

    def kernel(q, k, v, out, log):
        start = pl.program_id(0) * rows
        queries = q.load(start, rows)

        def add(j, carry):
            top, total, mixed = carry
            scores = _only(j * step, m, _scale(width) * _dot(queries, k.load(j * step, step)), -jnp.inf)
            new = jnp.maximum(top, scores.max(1))
            shrink, weights = jnp.exp2(top - new), jnp.exp2(scores - new[:, None])
            mixed = [part * shrink[:, None] for part in mixed]
            return new, total * shrink + weights.sum(1), _add(mixed, weights, v.load(j * step, step))

        carry = jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), _zeros(queries)
        top, total, mixed = jax.lax.fori_loop(0, pl.cdiv(m, step), add, carry)
        out.store(start, [part / total[:, None] for part in mixed])
        log.store(start, top + jnp.log2(total))  # base-2 logarithm of the sum of exponentials

    like = _split(q, num_heads)
    out, log = _call(kernel, pl.cdiv(n, rows), [*_split((q, k, v), num_heads)], [like, _vector(num_heads, n)])
    return _merge(out), (q, k, v, _merge(out), log)


def _backward(num_heads, saved, gradient):
    q, k, v, out, log = saved
    n, m, width = q.shape[0], k.shape[0], q.shape[1] // num_heads

    def for_queries(q, k, v, dout, out, log, dq, delta):
        rows, step = _block(n, _ROWS), _block(m, _STEP)
        start = pl.program_id(0) * rows
        queries, sent, logs = q.load(start, rows), dout.load(start, rows), log.load(start, rows)
        pairs = zip(sent, out.load(start, rows), strict=True)
        deltas = sum(((one.astype(jnp.float32) * other).sum(1) for one, other in pairs), jnp.zeros(rows, jnp.float32))
        delta.store(start, deltas)

        def add(j, total):
            keys = k.load(j * step, step)
            weights = jnp.exp2(_scale(width) * _dot(queries, keys) - logs[:, None])
            slopes = weights * (_dot(sent, v.load(j * step, step)) - deltas[:, None])
            return _add(total, _only(j * step, m, slopes, 0), keys)

        total = jax.lax.fori_loop(0, pl.cdiv(m, step), add, _zeros(queries))
        dq.store(start, [part * width**-0.5 for part in total])

    def for_keys(q, k, v, dout, log, delta, dk, dv):
        rows, step = _block(m, _ROWS), _block(n, _STEP)
        start = pl.program_id(0) * rows
        keys, values = k.load(start, rows), v.load(start, rows)

        def add(i, totals):
            queries, sent = q.load(i * step, step), dout.load(i * step, step)
            weights = jnp.exp2(_scale(width) * _dot(keys, queries) - log.load(i * step, step))
            slopes = weights * (_dot(values, sent) - delta.load(i * step, step))
            return _add(totals[0], slopes, queries), _add(totals[1], weights, sent)

        totals = jax.lax.fori_loop(0, pl.cdiv(n, step), add, (_zeros(keys), _zeros(values)))
        dk.store(start, [part * width**-0.5 for part in totals[0]])
        dv.store(start, totals[1])

    q, k, v, gradient, out = _split((q, k, v, gradient, out), num_heads)
    tokens = [q, k, v, gradient]
    dq, delta = _call(for_queries, pl.cdiv(n, _block(n, _ROWS)), [*tokens, out, log], [q, _vector(num_heads, n)])
    dk, dv = _call(for_keys, pl.cdiv(m, _block(m, _ROWS)), [*tokens, log, delta], [k, v])
    return _merge(dq), _merge(dk), _merge(dv)


attend.defvjp(_forward, _backward)


def _split(tree, num_heads):
    return jax.tree.map(lambda x: rearrange(x, "n (heads k) -> n heads k", heads=num_heads), tree)


def _merge(x):
    return rearrange(x, "n heads k -> n (heads k)")


def _vector(num_heads, n):
    return jax.ShapeDtypeStruct((num_heads, n), jnp.float32)


def _scale(width):
    """Factor from scores to base-2 logits; GPUs compute powers of 2."""
    return width**-0.5 * math.log2(math.e)


def _block(count, most):
    """Rows per block: Triton multiplies blocks whose sides are powers of 2, at least 16."""
    return min(most, max(16, pl.next_power_of_2(count)))


def _parts(width):
    """Starts and sizes of a head's parts: the largest power of 2 that fits, then one power of 2 over the rest."""
    first = max(16, pl.next_power_of_2(width + 1) // 2)
    return [(0, first)] if width <= first else [(0, first), (first, _block(width - first, first))]


@dataclass(frozen=True)
class _Head:
    """A head's rows in memory, in parts of its `width` columns; with width 0, one number a row."""

    ref: Any
    count: int
    width: int

    def load(self, start, rows):
        """The parts of a block of rows, zeros beyond the last row."""
        loaded = [triton.load(ref, mask=mask, other=None if mask is None else 0) for ref, mask in self._at(start, rows)]
        return loaded if self.width else loaded[0]

    def store(self, start, parts):
        """Write a block of rows up to the last row."""
        parts = parts if self.width else [parts]
        for (ref, mask), part in zip(self._at(start, parts[0].shape[0]), parts, strict=True):
            triton.store(ref, part.astype(ref.dtype), mask=mask)

    def _at(self, start, rows):
        inside = None if self.count % rows == 0 else start + jnp.arange(rows) < self.count
        if self.width == 0:
            return [(self.ref.at[pl.ds(start, rows)], inside)]
        parts = []
        for first, size in _parts(self.width):
            mask = None if inside is None else inside[:, None]
            if first + size > self.width:
                across = (first + jnp.arange(size) < self.width)[None]
                mask = across if mask is None else mask & across
            parts.append((self.ref.at[pl.ds(start, rows), pl.ds(first, size)], mask))
        return parts


def _call(kernel, blocks, arguments, results):
    """Run `kernel(*arguments, *results)` on the arrays of one head (`_Head`), for each block of each head."""
    arrays = [*arguments, *results]

    def sides(array):
        return (array.shape[1], 0) if array.ndim == 2 else (array.shape[0], array.shape[2])

    def spec(array):
        count, width = sides(array)
        padded = pl.cdiv(count, max(_ROWS, _STEP)) * max(_ROWS, _STEP)  # blocks may reach beyond the last row
        if width == 0:
            return pl.BlockSpec((None, padded), lambda i, head: (head, 0))
        return pl.BlockSpec((padded, None, sum(_parts(width)[-1])), lambda i, head: (0, head, 0))

    def of_heads(*refs):
        kernel(*(_Head(ref, *sides(array)) for ref, array in zip(refs, arrays, strict=True)))

    specs = [spec(array) for array in arrays]
    call = partial(
        pl.pallas_call,
        of_heads,
        grid=(blocks, arrays[0].shape[1]),
        in_specs=specs[: len(arguments)],
        out_specs=specs[len(arguments) :],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )
    return on_gpu(call, *arguments)


def _only(start, count, scores, other):
    """`scores`, with `other` in the columns beyond the last key."""
    size = scores.shape[1]
    return scores if count % size == 0 else jnp.where((start + jnp.arange(size) < count)[None], scores, other)


def _zeros(parts):
    return [jnp.zeros(part.shape, jnp.float32) for part in parts]


def _product(a, b, axis):
    exact = jax.lax.Precision.HIGHEST  # matters for float32 only
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)


def _dot(a, b):
    """Scores of rows with rows."""
    return sum(_product(one, other, 1) for one, other in zip(a, b, strict=True))


def _add(totals, weights, parts):
    """`totals` plus weighted sums of rows. Weights are rounded to the dtype of the rows."""
    weights = weights.astype(parts[0].dtype)
    return [total + _product(weights, part, 0) for total, part in zip(totals, parts, strict=True)]
