"""Products with weights of numbers of 8 bits (FP8, Micikevicius et al. 2022), by tensor cores twice as fast as of 16.

A tensor is rounded to e4m3 (3 bits of mantissa, from 2^-9 to 448) after a division by its scale: the power of two
that brings its largest magnitude at present to between 192 and 384, so that nothing overflows, nothing but the rounding
to 3 bits touches what is within 2^-14 of the largest, and products are exact where the numbers are.

Both factors and, in the backward pass, the gradient of the product are rounded, and then widened again: XLA makes of
`widen(round(x)) @ widen(round(w))` one product in FP8 with float32 sums wherever the device has it, and computes the same
in the wider type elsewhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float


def product(x: Float[Array, "... i"], weight: Float[Array, "i *o"]) -> Float[Array, "..."]:
    """`x @ weight`, and its gradients, of factors rounded to FP8; sums in float32, result in the type of `x`.

    Modules see one example, but a weight's gradient sums over all: the scale of what `jax.vmap` batches is one for the
    whole batch (of a device, where several split it). What is not finite makes the result not finite.
    """
    return _sent_back_rounded(_product(x, weight))


@jax.custom_jvp
def _product(x, weight):
    return jnp.tensordot(_rounded(x), _rounded(weight), 1)


@_product.defjvp
def _tangent(factors, tangents):
    x, weight = map(_rounded, factors)
    dx, dweight = tangents
    # Tensor cores add FP8 products up with 14 bits or so unless told otherwise. That does for the sums of the forward
    # pass, over channels, but not for a weight's gradient, over all tokens of a batch.
    exact = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    return jnp.tensordot(x, weight, 1), exact(dx, weight) + exact(x, dweight)


@jax.custom_vjp
def _sent_back_rounded(y):
    return y


_sent_back_rounded.defvjp(lambda y: (y, None), lambda _, gradient: (_rounded(gradient),))


def _rounded(x):
    """The nearest numbers of 8 bits, in the type of `x`; straight through for derivatives."""
    # The nearest power of two; the least is for tensors of zeros, which are the gradients of blocks that begin closed.
    largest = jnp.maximum(_largest(x).astype(jnp.float32), 2.0**-100)
    scale = jax.lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=0) / 256
    return (x * (1 / scale).astype(x.dtype)).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale.astype(x.dtype)


@custom_vmap
def _largest(x):
    return jnp.abs(x).max()


@_largest.def_vmap
def _largest_of_all(axis_size, in_batched, x):
    return _largest(x), False
