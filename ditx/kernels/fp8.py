"""Products with weights in FP8 (Micikevicius et al. 2022), which tensor cores compute at twice the throughput.

A tensor is divided by its scale and rounded to e4m3 (4 significant bits, up to 448). The scale is a power of two that
brings the largest current magnitude to between 192 and 384. So nothing overflows, and products of numbers that e4m3
represents are exact; only values below 2^-14 of the largest lose more than the rounding to 4 bits. Gradients are
rounded in the same way: on the digits, e4m3 gives gradients of the weights that are nearer to the exact ones than
e5m2, which has a wider range and 3 bits.

Both factors are widened again. On a GPU with FP8, XLA turns `widen(round(x)) @ widen(round(w))` into one FP8 product
with float32 sums, unless Triton takes it first (`ditx.parallel.compile.compiler_options`). Elsewhere it computes the
same result in the wider dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float


def product(x: Float[Array, "... i"], weight: Float[Array, "i *o"]) -> Float[Array, "..."]:
    """`x @ weight` of factors rounded to FP8, as are the factors of its gradients. Result in the dtype of `x`.

    Sums are float32. Under `jax.vmap` the scale is common to the whole batch (of one device, if several split it),
    because a weight's gradient sums over the batch. Values that are not finite give results that are not finite.
    """
    return _round_gradient(_product(x, weight))


@jax.custom_jvp
def _product(x, weight):
    return jnp.tensordot(_rounded(x), _rounded(weight), 1)


@_product.defjvp
def _tangent(factors, tangents):
    x, weight = map(_rounded, factors)
    dx, dweight = tangents
    # By default, tensor cores sum FP8 products with about 14 bits. That is enough for the forward pass, which sums over
    # channels, but not for a weight's gradient, which sums over all tokens of a batch.
    exact = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    return jnp.tensordot(x, weight, 1), exact(dx, weight) + exact(x, dweight)


@jax.custom_vjp
def _round_gradient(y):
    return y


_round_gradient.defvjp(lambda y: (y, None), lambda _, gradient: (_rounded(gradient),))


def _rounded(x):
    """The nearest FP8 numbers, in the dtype of `x`. Derivatives pass straight through."""
    # Scale to a power of two. The lower bound is for zeros, such as gradients behind gates that start at 0.
    largest = jnp.maximum(_largest(x).astype(jnp.float32), 2.0**-100)
    scale = jax.lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=0) / 256
    return (x * (1 / scale).astype(x.dtype)).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale.astype(x.dtype)


@custom_vmap
def _largest(x):
    return jnp.abs(x).max()


@_largest.def_vmap
def _largest_of_all(axis_size, in_batched, x):
    return _largest(x), False
