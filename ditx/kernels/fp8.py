"""Products with weights of numbers of 8 bits (FP8, Micikevicius et al. 2022), which tensor cores make twice as fast.

A tensor is rounded to e4m3 (4 significant bits, up to 448) after a division by its scale: the power of two that brings
its largest magnitude at present to between 192 and 384. So nothing overflows, only what is below 2^-14 of the largest
loses more than the rounding to 4 bits, and products are exact where the numbers are. Gradients are rounded likewise: on
the digits, the weights' are nearer to exact ones so than with the wider range and 3 bits of e5m2.

Both factors are widened again: of `widen(round(x)) @ widen(round(w))` XLA makes one product in FP8 with float32 sums
where a GPU has it (if Triton does not take it first; see `ditx.parallel.compile.compiler_options`),
and computes the same in the wider type elsewhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float


def product(x: Float[Array, "... i"], weight: Float[Array, "i *o"]) -> Float[Array, "..."]:
    """`x @ weight`, and its gradients, of factors rounded to FP8; sums in float32, result in the type of `x`.

    Modules see one example, but a weight's gradient sums over all: the scale of what `jax.vmap` batches is one for the
    whole batch (of a device, where several split it). What is not finite shows in the result.
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
