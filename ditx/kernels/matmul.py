"""The product of tokens with a weight, which takes the tokens of a batch for the rows of one matrix.

Modules see one example. What `jax.vmap` makes of `x @ weight` has three axes, and so a weight's gradient sums over two:
XLA for CPUs then transposes both factors, and computes within these transpositions all that leads up to them (where
blocks are unrolled, the residual sums of all blocks before, once for each weight). So this is a primitive of its own,
of which `jax.vmap` makes a product of matrices.
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
    """`x @ weight`, over the last axis of the one and the first of the other.

    Policies of `jax.checkpoint` see it as "product" in one example, and as "dot_general" in a batch.
    """
    dtype = jnp.result_type(x, weight)
    # That of now, whenever this is lowered or transformed; type checkers do not know the states of JAX's configuration.
    precision = cast(Any, jax.config).jax_default_matmul_precision
    return _product.bind(x.astype(dtype), weight.astype(dtype), precision=precision)


def _plain(x, weight, *, precision):
    return jnp.tensordot(x, weight, 1, precision=precision)


def _of_batch(factors, axes, *, precision):
    plain, (x, weight) = partial(_plain, precision=precision), factors
    if axes[1] is not None:  # each example has a weight of its own
        return jax.vmap(plain, axes)(x, weight), 0
    x = jnp.moveaxis(x, axes[0], 0)
    if any(jax.typeof(x).sharding.spec[1:-1]):  # tokens that lie on several devices are no rows of one matrix
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
