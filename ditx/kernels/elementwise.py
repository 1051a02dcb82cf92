"""Element-wise passes of a transformer block as fused GPU kernels, in Pallas for Triton.

XLA needs several passes over the tokens where one of these kernels needs one. A kernel reads its inputs once, computes
in float32 and writes its results in the dtype of the tokens. In the same pass it sums over tokens, for the gradients of
shifts, scales, gates and biases. A kernel sees one example; `jax.vmap` puts the batch into the grid of one launch.
Without a GPU, Pallas interprets the kernels, slowly, for tests.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

# Number of tokens that a program loops over, and number of channels in a part of a split token. With eight elements a
# thread, Triton loads 16 bytes at a time, and no kernel below needs more than 100 registers.
_TOKENS, _PART = 32, 512
_EPS = 1e-6


@jax.custom_vjp
def norm_modulate(
    x: Float[Array, "n d"], shift: Float[Array, " d"], scale: Float[Array, " d"]
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """`x`, and its modulated layer norm `norm(x) * (1 + scale) + shift`.

    Returning `x` lets the pass for the norm's gradient also add the gradient of its later uses.
    """
    return _norm_modulate_forward(x, shift, scale)[0]


def _norm_modulate_forward(x, shift, scale):
    def body(mean, x, shift, scale):
        return (_norm(mean, x)[0] * (1 + scale) + shift,), ()

    (y,), _ = _pass(body, [x], [shift, scale], outputs=1)
    return (x, y), (x, scale)


def _norm_modulate_backward(saved, gradients):
    def body(mean, x, dx, dy, scale):
        more, normed = _norm_gradient(mean, x, dy, scale)
        return (dx + more,), (dy, dy * normed)

    x, scale = saved
    (dx,), (dshift, dscale) = _pass(body, [x, *gradients], [scale], outputs=1, sums=2)
    return dx, *_as_type(scale.dtype, dshift, dscale)


norm_modulate.defvjp(_norm_modulate_forward, _norm_modulate_backward)


@jax.custom_vjp
def gate_norm_modulate(
    x: Float[Array, "n d"],
    gate: Float[Array, " d"],
    branch: Float[Array, "n d"],
    bias: Float[Array, " d"],
    shift: Float[Array, " d"],
    scale: Float[Array, " d"],
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """`x + gate * (branch + bias)`, and its modulated layer norm."""
    return _gate_norm_modulate_forward(x, gate, branch, bias, shift, scale)[0]


def _gate_norm_modulate_forward(x, gate, branch, bias, shift, scale):
    dtype = x.dtype

    def body(mean, x, branch, gate, bias, shift, scale):
        # Normalise the sum as stored, since the backward pass reads the stored one.
        x = (x + gate * (branch + bias)).astype(dtype).astype(jnp.float32)
        return (x, _norm(mean, x)[0] * (1 + scale) + shift), ()

    (x, y), _ = _pass(body, [x, branch], [gate, bias, shift, scale], outputs=2)
    return (x, y), (x, branch, gate, bias, scale)


def _gate_norm_modulate_backward(saved, gradients):
    def body(mean, x, branch, dx, dy, gate, scale):
        more, normed = _norm_gradient(mean, x, dy, scale)
        dx = dx + more
        return (dx, gate * dx), (dx, dx * branch, dy, dy * normed)

    x, branch, gate, bias, scale = saved
    tokens = [x, branch, *gradients]
    (dx, dbranch), (total, by_branch, dshift, dscale) = _pass(body, tokens, [gate, scale], outputs=2, sums=4)
    dgate, dbias, dshift, dscale = _as_type(gate.dtype, by_branch + bias * total, gate * total, dshift, dscale)
    return dx, dgate, dbranch, dbias, dshift, dscale


gate_norm_modulate.defvjp(_gate_norm_modulate_forward, _gate_norm_modulate_backward)


@jax.custom_vjp
def gate_residual(
    x: Float[Array, "n d"], gate: Float[Array, " d"], branch: Float[Array, "n d"], bias: Float[Array, " d"]
) -> Float[Array, "n d"]:
    """`x + gate * (branch + bias)`."""
    return _gate_residual_forward(x, gate, branch, bias)[0]


def _gate_residual_forward(x, gate, branch, bias):
    def body(mean, x, branch, gate, bias):
        return (x + gate * (branch + bias),), ()

    (y,), _ = _pass(body, [x, branch], [gate, bias], outputs=1)
    return y, (branch, gate, bias)


def _gate_residual_backward(saved, gradient):
    def body(mean, branch, dx, gate):
        return (gate * dx,), (dx, dx * branch)

    branch, gate, bias = saved
    (dbranch,), (total, by_branch) = _pass(body, [branch, gradient], [gate], outputs=1, sums=2)
    dgate, dbias = _as_type(gate.dtype, by_branch + bias * total, gate * total)
    return gradient, dgate, dbranch, dbias


gate_residual.defvjp(_gate_residual_forward, _gate_residual_backward)


@jax.custom_vjp
def bias_gelu(x: Float[Array, "n d"], bias: Float[Array, " d"]) -> Float[Array, "n d"]:
    """The GELU of `x + bias` in its tanh form (Hendrycks and Gimpel 2016)."""
    return _bias_gelu_forward(x, bias)[0]


def _bias_gelu_forward(x, bias):
    def body(mean, x, bias):
        x = x + bias
        return (x * _gelu_parts(x)[0],), ()

    (y,), _ = _pass(body, [x], [bias], outputs=1, split=True)
    return y, (x, bias)


def _bias_gelu_backward(saved, gradient):
    def body(mean, x, dy, bias):
        x = x + bias
        share, slope = _gelu_parts(x)
        dx = dy * (share + x * 2 * share * (1 - share) * slope)
        return (dx,), (dx,)

    x, bias = saved
    (dx,), (dbias,) = _pass(body, [x, gradient], [bias], outputs=1, sums=1, split=True)
    return dx, dbias.astype(bias.dtype)


bias_gelu.defvjp(_bias_gelu_forward, _bias_gelu_backward)


def _as_type(dtype, *vectors):
    return [vector.astype(dtype) for vector in vectors]


def _norm(mean, x):
    """The layer norm of a token, and the inverse of its standard deviation."""
    centred = x - mean(x)
    inverse = jax.lax.rsqrt(mean(centred * centred) + _EPS)
    return centred * inverse, inverse


def _norm_gradient(mean, x, dy, scale):
    """The gradient of `norm(x) * (1 + scale)` with respect to `x`, and the norm."""
    normed, inverse = _norm(mean, x)
    dnormed = dy * (1 + scale)
    return inverse * (dnormed - mean(dnormed) - normed * mean(dnormed * normed)), normed


def _gelu_parts(x):
    """The factor `(1 + tanh u) / 2` of GELU, and the derivative of `u`.

    Computed as a logistic function of `2 u`, since Triton has no fast hyperbolic tangent that is exact to float32.
    """
    a, b = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    return 1 / (1 + jnp.exp(-2 * x * (a + b * x * x))), a + 3 * b * x * x


def _pass(
    body: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]],
    tokens: Sequence[Float[Array, "n d"]],
    vectors: Sequence[Float[Array, " d"]],
    *,
    outputs: int,
    sums: int = 0,
    split: bool = False,
) -> tuple[Sequence[Float[Array, "n d"]], list[Float[Array, " d"]]]:
    """Outputs of `body` for every token, and float32 sums of its summands over all tokens.

    `body(mean, *tokens, *vectors) -> outputs, summands` sees one token at a time in float32 or, with `split`, a part of
    its channels. `mean` is over all channels; do not use it with `split`.
    """
    (n, d), dtype = tokens[0].shape, tokens[0].dtype
    # Triton's arrays have sizes that are powers of two; the surplus is masked.
    width = min(pl.next_power_of_2(d), _PART) if split else pl.next_power_of_2(d)
    blocks, parts = pl.cdiv(n, _TOKENS), pl.cdiv(d, width)

    def kernel(*refs):
        ins, outs = refs[: len(tokens) + len(vectors)], refs[len(tokens) + len(vectors) :]
        inside = pl.program_id(1) * width + jnp.arange(width) < d

        def mean(token):
            return jnp.where(inside, token, 0).sum() / d

        def load_tokens(k):
            return [triton.load(ref.at[k], mask=inside, other=0) for ref in ins[: len(tokens)]]

        def step(k, carry):
            totals, current = carry
            following = load_tokens(jnp.minimum(k + 1, count - 1))  # loads while the current token is computed
            results, summands = body(mean, *(token.astype(jnp.float32) for token in current), *fixed)
            for ref, result in zip(outs[:outputs], results, strict=True):
                triton.store(ref.at[k], result.astype(dtype), mask=inside)
            return [total + summand for total, summand in zip(totals, summands, strict=True)], following

        fixed = [triton.load(ref, mask=inside, other=0).astype(jnp.float32) for ref in ins[len(tokens) :]]
        count = jnp.minimum(_TOKENS, n - pl.program_id(0) * _TOKENS)
        zeros = [jnp.zeros(width, jnp.float32)] * sums
        first = jnp.minimum(0, count)  # a traced 0, which Pallas' interpreter needs
        totals, _ = jax.lax.fori_loop(0, count, step, (zeros, load_tokens(first)))
        for ref, total in zip(outs[outputs:], totals, strict=True):
            triton.store(ref, total, mask=inside)

    block = pl.BlockSpec((_TOKENS, width), lambda i, j: (i, j))
    vector = pl.BlockSpec((width,), lambda i, j: (j,))
    partial_sum = pl.BlockSpec((None, width), lambda i, j: (i, j))
    call = partial(
        pl.pallas_call,
        kernel,
        grid=(blocks, parts),
        in_specs=[block] * len(tokens) + [vector] * len(vectors),
        out_specs=[block] * outputs + [partial_sum] * sums,
        out_shape=[jax.ShapeDtypeStruct((n, d), dtype)] * outputs
        + [jax.ShapeDtypeStruct((blocks, d), jnp.float32)] * sums,
        compiler_params=triton.CompilerParams(num_warps=min(8, max(1, width // 256))),
    )
    results = on_gpu(call, *tokens, *vectors)
    return results[:outputs], [part.sum(0) for part in results[outputs:]]


def on_gpu(call: Callable[..., Any], *arguments: Array) -> Any:
    """Results of the kernel `call()(*arguments)`. Without a GPU, of `call(interpret=True)`, for tests."""
    return jax.lax.platform_dependent(*arguments, cuda=call(), rocm=call(), default=call(interpret=True))
