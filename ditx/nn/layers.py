"""Layers of a diffusion transformer. Each acts on one example; `jax.vmap` makes the batch."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray


class Linear(eqx.Module):
    """Affine map of the last axis: `x @ weight + bias`.

    The output may have several axes; `out_size` is then a tuple. Weights start Xavier uniform (Glorot and Bengio 2010)
    or, if `std` is given, normal with that standard deviation (0 gives zeros). Biases start at 0.
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

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "..."]:
        return with_bias(jnp.tensordot(x, self.weight, 1), self.bias)


def layer_norm(x: Float[Array, "*n d"], eps: float = 1e-6) -> Float[Array, "*n d"]:
    """LayerNorm without affine parameters (Ba et al. 2016). Statistics in float32, result in the dtype of `x`."""
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
        y = layer_norm(x)
        return with_bias(y * jax.lax.broadcast_to_rank(self.weight, y.ndim), self.bias)


def modulate(x: Float[Array, "n d"], shift: Float[Array, " d"], scale: Float[Array, " d"]) -> Float[Array, "n d"]:
    """Shift and scale all tokens: `x * (1 + scale) + shift` (Perez et al. 2018, centred on the identity)."""
    return x * (1 + scale)[None] + shift[None]


class Attention(eqx.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    One layer holds the projections to queries, keys and values. They have an axis of their own, so that tensor
    parallelism can split the last axis by heads.
    """

    qkv: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    tensor_split: ClassVar = {"qkv": "out", "out": "in"}

    def __init__(self, hidden_size: int, num_heads: int, *, key: PRNGKeyArray):
        qkv_key, out_key = jax.random.split(key)
        self.qkv = Linear(hidden_size, (3, hidden_size), key=qkv_key)
        self.out = Linear(hidden_size, hidden_size, key=out_key)
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        q, k, v = rearrange(self.qkv(x), "n qkv d -> qkv n d")
        return self.out(attend(q, k, v, self.num_heads))


class CrossAttention(eqx.Module):
    """Multi-head attention (Vaswani et al. 2017) from the tokens of an image to the tokens of a context."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    tensor_split: ClassVar = {"q": "out", "k": "out", "v": "out", "out": "in"}

    def __init__(self, hidden_size: int, num_heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.q, self.k, self.v, self.out = (Linear(hidden_size, hidden_size, key=k) for k in keys)
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "n d"], context: Float[Array, "m d"]) -> Float[Array, "n d"]:
        return self.out(attend(self.q(x), self.k(context), self.v(context), self.num_heads))


def attend(
    q: Float[Array, "n d"], k: Float[Array, "m d"], v: Float[Array, "m d"], num_heads: int
) -> Float[Array, "n d"]:
    """Scaled dot-product attention (Vaswani et al. 2017, Eq. 1), each head on its share of the channels.

    Logits and softmax are at least float32.
    """
    q, k, v = (rearrange(part, "n (heads k) -> heads n k", heads=num_heads) for part in (q, k, v))
    scaled, dtype = q * q.shape[-1] ** -0.5, at_least_float32(q.dtype)
    logits = jnp.einsum("hnk,hmk->hnm", scaled, k, preferred_element_type=dtype)
    mixed = jnp.einsum("hnm,hmk->hnk", jax.nn.softmax(logits).astype(v.dtype), v)
    return rearrange(mixed, "heads n k -> n (heads k)")


class MLP(eqx.Module):
    """Two linear maps with a GELU between them, in its tanh form (Hendrycks and Gimpel 2016)."""

    up: Linear
    down: Linear
    tensor_split: ClassVar = {"up": "out", "down": "in"}

    def __init__(self, hidden_size: int, mlp_size: int, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(hidden_size, mlp_size, key=up_key)
        self.down = Linear(mlp_size, hidden_size, key=down_key)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


def with_bias(x: Float[Array, "*n d"], bias: Float[Array, "..."]) -> Float[Array, "*n d"]:
    """`x + bias` along the last axes of `x`."""
    return x + jax.lax.broadcast_to_rank(bias, x.ndim)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums over many elements: float32, or float64 if `dtype` is."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
