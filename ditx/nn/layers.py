"""Layers that a diffusion transformer is made of, each acting on one example."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ditx.kernels import fp8
from ditx.kernels.matmul import product as plain_product


@dataclass(frozen=True)
class Compute:
    """What computes a block: a matter of speed and of rounding."""

    kernels: Literal["plain", "fused"] = "plain"
    """what computes norms, gates and GELUs: XLA (plain), or, on GPUs, kernels of ditx that need fewer passes (fused)"""
    attention: Literal["auto", "xla", "cudnn", "fused"] = "auto"
    """what computes attention: XLA, cuDNN, or, on GPUs, kernels of ditx (fused); auto is cuDNN where it can be"""
    matmul_dtype: Literal["plain", "fp8"] = "plain"
    """what the products with a block's weights are of: numbers of the network's type (plain), or of 8 bits, which GPUs
    from Ada and Hopper on multiply twice as fast, and with which it learns otherwise (fp8)"""


PLAIN = Compute()


class Linear(eqx.Module):
    """An affine map of the last axis, `x @ weight + bias`; its output may have several axes, `out_size` a tuple then.

    Weights start Xavier uniform (Glorot and Bengio 2010), or normal with standard deviation `std` where it is given
    (0 gives zeros); biases start at 0.
    """

    weight: Float[Array, "i *o"]
    bias: Float[Array, "*o"]

    def __init__(self, in_size: int, out_size: int | tuple[int, ...], *, std: float | None = None, key: PRNGKeyArray):
        shape = (out_size,) if isinstance(out_size, int) else out_size
        if std is None:
            bound = math.sqrt(6 / (in_size + math.prod(shape)))
            self.weight = jax.random.uniform(key, (in_size, *shape), minval=-bound, maxval=bound)
        else:
            self.weight = std * jax.random.normal(key, (in_size, *shape))
        self.bias = jnp.zeros(shape)

    def __call__(self, x: Float[Array, "... i"], compute: Compute = PLAIN) -> Float[Array, "..."]:
        return product(x, self.weight, compute) + self.bias


def product(x: Float[Array, "... i"], weight: Float[Array, "i *o"], compute: Compute = PLAIN) -> Float[Array, "..."]:
    """`x @ weight`, over the last axis of the one and the first of the other."""
    return fp8.product(x, weight) if compute.matmul_dtype == "fp8" else plain_product(x, weight)


# Of a few operations on each token, the backward pass computes anew what it needs: reading more would take longer.
_keeping_inputs = partial(jax.checkpoint, prevent_cse=False)


def layer_norm(x: Float[Array, "*n d"], eps: float = 1e-6) -> Float[Array, "*n d"]:
    """LayerNorm without affine parameters (Ba et al. 2016), statistics in float32, result in the type of `x`."""
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class LayerNorm(eqx.Module):
    """LayerNorm with a learned scale, which starts at 1, and a learned shift, which starts at 0."""

    weight: Float[Array, " d"]
    bias: Float[Array, " d"]

    def __init__(self, hidden_size: int):
        self.weight, self.bias = jnp.ones(hidden_size), jnp.zeros(hidden_size)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return _keeping_inputs(lambda x, weight, bias: layer_norm(x) * weight + bias)(x, self.weight, self.bias)


def modulate(x: Float[Array, "n d"], shift: Float[Array, " d"], scale: Float[Array, " d"]) -> Float[Array, "n d"]:
    """Shift and scale every token alike: `x * (1 + scale) + shift` (Perez et al. 2018, centred on the identity)."""
    return x * (1 + scale) + shift


def norm_modulate(
    x: Float[Array, "n d"], shift: Float[Array, " d"], scale: Float[Array, " d"], compute: Compute = PLAIN
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """`x` as it is, for the way around a branch, and `modulate(layer_norm(x), shift, scale)`, for the branch."""
    if compute.kernels == "fused":
        return _kernels().norm_modulate(x, shift, scale)
    return x, _keeping_inputs(lambda x, shift, scale: modulate(layer_norm(x), shift, scale))(x, shift, scale)


def gate_norm_modulate(
    x: Float[Array, "n d"],
    gate: Float[Array, " d"],
    branch: Float[Array, "n d"],
    bias: Float[Array, " d"],
    shift: Float[Array, " d"],
    scale: Float[Array, " d"],
    compute: Compute = PLAIN,
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """`norm_modulate(x + gate * (branch + bias), shift, scale)`: the end of a branch and the beginning of the next."""
    if compute.kernels == "fused":
        return _kernels().gate_norm_modulate(x, gate, branch, bias, shift, scale)
    return norm_modulate(gate_residual(x, gate, branch, bias), shift, scale)


def gate_residual(
    x: Float[Array, "n d"],
    gate: Float[Array, " d"],
    branch: Float[Array, "n d"],
    bias: Float[Array, " d"],
    compute: Compute = PLAIN,
) -> Float[Array, "n d"]:
    """`x + gate * (branch + bias)`: the end of a branch."""
    if compute.kernels == "fused":
        return _kernels().gate_residual(x, gate, branch, bias)
    return _keeping_inputs(lambda x, gate, branch, bias: x + gate * (branch + bias))(x, gate, branch, bias)


def bias_gelu(x: Float[Array, "n d"], bias: Float[Array, " d"], compute: Compute = PLAIN) -> Float[Array, "n d"]:
    """GELU in its tanh form (Hendrycks and Gimpel 2016) of `x + bias`."""
    if compute.kernels == "fused":
        return _kernels().bias_gelu(x, bias)
    # Only its input is kept: XLA would write what the derivative needs in the forward pass, and read it again.
    return jax.checkpoint(lambda x, bias: jax.nn.gelu(x + bias, approximate=True))(x, bias)


def _kernels() -> Any:
    from ditx.kernels import (
        elementwise as kernels,  # for those alone who use them, since Pallas takes a while to import
    )

    return kernels


class Attention(eqx.Module):
    """Multi-head self-attention (Vaswani et al. 2017), its projections to queries, keys and values stacked in one.

    These are an axis of the layer's output, so that its last axis is that of the heads and can be split by them.
    """

    qkv: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, hidden_size: int, num_heads: int, *, key: PRNGKeyArray):
        qkv_key, out_key = jax.random.split(key)
        self.qkv = Linear(hidden_size, (3, hidden_size), key=qkv_key)
        self.out = Linear(hidden_size, hidden_size, key=out_key)
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "n d"], compute: Compute = PLAIN) -> Float[Array, "n d"]:
        branch, bias = self.unbiased(x, compute)
        return branch + bias

    def unbiased(
        self, x: Float[Array, "n d"], compute: Compute = PLAIN
    ) -> tuple[Float[Array, "n d"], Float[Array, " d"]]:
        """The result without its bias, and that bias."""

        # Three products, since parts of a weight are cheaper to come by than parts of what is made of all tokens; not
        # kept for the backward pass, to which the weight itself is at hand.
        @partial(jax.checkpoint, prevent_cse=False)
        def project(weight, bias, x):
            q, k, v = (product(x, weight[:, part], compute) for part in range(3))
            return q + bias, k, v

        # Two biases need no pass over the tokens: that of the keys moves all logits of a query alike, which softmax
        # does not see, and that of the values passes through it, since its weights add up to 1.
        q_bias, _, v_bias = self.qkv.bias
        q, k, v = project(self.qkv.weight, q_bias, x)
        mixed = attend(q, k, v, self.num_heads, compute)
        return product(mixed, self.out.weight, compute), v_bias @ self.out.weight + self.out.bias


class CrossAttention(eqx.Module):
    """Multi-head attention (Vaswani et al. 2017) from the tokens of an image to those of a context."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, hidden_size: int, num_heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.q, self.k, self.v, self.out = (Linear(hidden_size, hidden_size, key=k) for k in keys)
        self.num_heads = num_heads

    def __call__(
        self, x: Float[Array, "n d"], context: Float[Array, "m d"], compute: Compute = PLAIN
    ) -> Float[Array, "n d"]:
        q, k, v = self.q(x, compute), self.k(context, compute), self.v(context, compute)
        return self.out(attend(q, k, v, self.num_heads, compute), compute)


def attend(
    q: Float[Array, "n d"], k: Float[Array, "m d"], v: Float[Array, "m d"], num_heads: int, compute: Compute = PLAIN
) -> Float[Array, "n d"]:
    """Scaled dot-product attention (Vaswani et al. 2017, Eq. 1) in each of `num_heads` equal parts of the channels."""
    width, choice = q.shape[-1] // num_heads, compute.attention
    if choice == "auto":
        # Not by jax.lax.platform_dependent: all branches are traced, which fails for cuDNN where that is missing,
        # and the backward pass would keep what any of them needs.
        choice = "cudnn" if jax.default_backend() == "gpu" and cudnn_takes(q.dtype, width) else "xla"
    if choice == "fused":
        from ditx.kernels import attention as attention_kernel  # as _kernels does

        return attention_kernel.attend(q, k, v, num_heads)
    if choice == "cudnn":
        q, k, v = (rearrange(part, "n (heads k) -> n heads k", heads=num_heads) for part in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return rearrange(mixed, "n heads k -> n (heads k)")
    q, k, v = (rearrange(part, "n (heads k) -> heads n k", heads=num_heads) for part in (q, k, v))
    wide = at_least_float32(q.dtype)
    logits = jnp.einsum("hnk,hmk->hnm", q * width**-0.5, k, preferred_element_type=wide)
    mixed = jnp.einsum("hnm,hmk->hnk", jax.nn.softmax(logits).astype(v.dtype), v)
    return rearrange(mixed, "heads n k -> n (heads k)")


def cudnn_takes(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN's attention computes in that type, with heads of that width."""
    return dtype in (jnp.bfloat16, jnp.float16) and width <= 128 and width % 8 == 0


class MLP(eqx.Module):
    """Two linear maps around a GELU."""

    up: Linear
    down: Linear

    def __init__(self, hidden_size: int, mlp_size: int, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(hidden_size, mlp_size, key=up_key)
        self.down = Linear(mlp_size, hidden_size, key=down_key)

    def __call__(self, x: Float[Array, "n d"], compute: Compute = PLAIN) -> Float[Array, "n d"]:
        branch, bias = self.unbiased(x, compute)
        return branch + bias

    def unbiased(
        self, x: Float[Array, "n d"], compute: Compute = PLAIN
    ) -> tuple[Float[Array, "n d"], Float[Array, " d"]]:
        """The result without its bias, and that bias."""
        hidden = bias_gelu(product(x, self.up.weight, compute), self.up.bias, compute)
        return product(hidden, self.down.weight, compute), self.down.bias


class TimeEmbedding(eqx.Module):
    """A time in units of training steps (0 to 999, fractions allowed) as a vector: sinusoids, then an MLP with SiLU."""

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
    """A table of class vectors; with `null_label` it has one row more, the last, that stands for "no class"."""

    table: Float[Array, "rows d"]

    def __init__(self, num_classes: int, hidden_size: int, *, null_label: bool, key: PRNGKeyArray):
        self.table = 0.02 * jax.random.normal(key, (num_classes + null_label, hidden_size))

    def __call__(self, y: Int[Array, ""]) -> Float[Array, " d"]:
        return self.table[y]


def sinusoids(t: Float[Array, ""] | Int[Array, ""], width: int, shift: int = 0) -> Float[Array, " width"]:
    """Cosines, then sines, of `t` at `width / 2` frequencies from 1 down to nearly 1/10000 (Vaswani et al. 2017).

    The last frequency is 1/10000 itself with a `shift` of 1, as diffusers has it.
    """
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - shift))
    dtype = at_least_float32(t.dtype)  # 999 has no exact bfloat16
    angles = t.astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def grid_positions(side: int, hidden_size: int) -> Float[np.ndarray, "n d"]:
    """Fixed sine-cosine positions of a square grid of tokens in row-major order, in float64.

    The first half of the channels encodes the column and the second the row, each as sines, then cosines, at
    frequencies `10000 ** (-i / (d / 4))` (the two-dimensional form of Vaswani et al. 2017).
    """
    frequencies = 10000.0 ** (-np.arange(hidden_size // 4) / (hidden_size // 4))
    angles = np.arange(side)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column = np.tile(axis, (side, 1))
    row = np.repeat(axis, side, axis=0)
    return np.concatenate([column, row], axis=1)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which sums over many elements are taken."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
