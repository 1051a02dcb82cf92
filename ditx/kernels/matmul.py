"""The product of tokens with a weight, with the tokens of a batch as the rows of one matrix.

Modules see one example. `jax.vmap` turns `x @ weight` into a product of three axes, whose gradient for the weight sums
over two of them. XLA for CPUs then transposes both factors and recomputes inside each transposition everything that
leads to it (with unrolled blocks, the residual sums of all earlier blocks, once for each weight). This product is a
primitive of its own, which `jax.vmap` turns into a product of two matrices.
"""

import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def product(x: Float[Array, "... i"], weight: Float[Array, "i *o"]) -> Float[Array, "..."]:
    """`x @ weight`, summed over the last axis of `x` and the first axis of `weight`.

    Policies of `jax.checkpoint` see the primitive "product" for a single example, and "dot_general" for a batch.
    """
    dtype = jnp.result_type(x, weight)
    # The current setting, kept for lowering and transformation. Type checkers do not know JAX's configuration states.
    precision = cast(Any, jax.config).jax_default_matmul_precision
    return _product.bind(x.astype(dtype), weight.astype(dtype), precision=precision)


def _plain(x, weight, *, precision):
    return jnp.tensordot(x, weight, 1, precision=precision)


def _of_batch(factors, axes, *, precision):
    plain, (x, weight) = partial(_plain, precision=precision), factors
    if axes[1] is not None:  # a weight for each example
        return jax.vmap(plain, axes)(x, weight), 0
    x = jnp.moveaxis(x, axes[0], 0)
    if any(jax.typeof(x).sharding.spec[1:-1]):  # tokens split over devices cannot be the rows of one matrix
        return jax.vmap(plain, (0, None))(x, weight), 0
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return plain(rows, weight).reshape(*x.shape[:-1], *weight.shape[1:]), 0


def _towards_x(gradient, _, weight, *, precision):
    out = list(range(1 - weight.ndim, 0))
    return jnp.tensordot(gradient, weight, (out, out), precision=precision)


def _towards_weight(gradient, x, _, *, precision):
    rows = list(range(x.ndim - 1))
    return jnp.tensordot(x, gradient, (rows, rows), precision=precision)


def _typed(x, weight, *, precision):
    return jax.make_jaxpr(partial(_plain, precision=precision))(x, weight).out_avals[0]


_product = Primitive("product")
_product.def_impl(_plain)
_product.def_abstract_eval(_typed)
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))
ad.defbilinear(_product, _towards_x, _towards_weight)
batching.primitive_batchers[_product] = _of_batch
