"""Layers of a diffusion transformer. Each acts on one example; `jax.vmap` makes the batch."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray


class Linear(eqx.Module):
    """Affine map of the last axis: `x @ weight + bias`.

    The output may have several axes; `out_size` is then a tuple. Weights start Xavier uniform (Glorot and Bengio 2010)
    or, if `std` is given, normal with that standard deviation (0 gives zeros). Biases start at 0.
    """

    weight: Float[Array, "i *o"]
    bias: Float[Array, "*o"] | None

    def __init__(
        self,
        in_size: int,
        out_size: int | tuple[int, ...],
        *,
        std: float | None = None,
        bias: bool = True,
        key: PRNGKeyArray,
    ):
        shape = (out_size,) if isinstance(out_size, int) else out_size
        if std is None:
            bound = math.sqrt(6 / (in_size + math.prod(shape)))
            self.weight = jax.random.uniform(key, (in_size, *shape), minval=-bound, maxval=bound)
        else:
            self.weight = std * jax.random.normal(key, (in_size, *shape))
        self.bias = jnp.zeros(shape) if bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "..."]:
        y = jnp.tensordot(x, self.weight, 1)
        return y if self.bias is None else with_bias(y, self.bias)


def layer_norm(x: Float[Array, "*n d"], eps: float = 1e-6) -> Float[Array, "*n d"]:
    """LayerNorm without affine parameters (Ba et al. 2016). Statistics in float32, result in the dtype of `x`."""
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class LayerNorm(eqx.Module):
    """LayerNorm, if `affine` with a learned scale, which starts at 1, and a learned shift, which starts at 0."""

    weight: Float[Array, " d"] | None
    bias: Float[Array, " d"] | None
    eps: float = eqx.field(static=True)

    def __init__(self, hidden_size: int, *, affine: bool = True, eps: float = 1e-6):
        self.weight, self.bias = (jnp.ones(hidden_size), jnp.zeros(hidden_size)) if affine else (None, None)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = layer_norm(x, self.eps)
        if self.weight is None or self.bias is None:
            return y
        return with_bias(y * jax.lax.broadcast_to_rank(self.weight, y.ndim), self.bias)


class RMSNorm(eqx.Module):
    """Division by the root mean square, then a learned scale, which starts at 1 (Zhang and Sennrich 2019)."""

    weight: Float[Array, " d"]

    def __init__(self, hidden_size: int):
        self.weight = jnp.ones(hidden_size)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        wide = x.astype(at_least_float32(x.dtype))
        normed = (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return normed * jax.lax.broadcast_to_rank(self.weight, x.ndim)


def modulate(x: Float[Array, "n d"], shift: Float[Array, " d"], scale: Float[Array, " d"]) -> Float[Array, "n d"]:
    """Shift and scale all tokens: `x * (1 + scale) + shift` (Perez et al. 2018, centred on the identity)."""
    return x * (1 + scale)[None] + shift[None]


class Attention(eqx.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    One layer holds the projections to queries, keys and values. They have an axis of their own, so that tensor
    parallelism can split the last axis by heads. `qk_norm` makes a norm of a head's width, one for the queries and one
    for the keys (Henry et al. 2020). With `grid`, the first tokens have rotary positions on this grid; see `rotate`.
    """

    qkv: Linear
    out: Linear
    q_norm: Any
    k_norm: Any
    num_heads: int = eqx.field(static=True)
    grid: tuple[int, int] | None = eqx.field(static=True)
    tensor_split: ClassVar = {"qkv": "out", "out": "in"}

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_norm: Any = None,
        grid: tuple[int, int] | None = None,
        key: PRNGKeyArray,
    ):
        qkv_key, out_key = jax.random.split(key)
        self.qkv = Linear(hidden_size, (3, hidden_size), key=qkv_key)
        self.out = Linear(hidden_size, hidden_size, key=out_key)
        self.q_norm, self.k_norm = (qk_norm and qk_norm(hidden_size // num_heads) for _ in "qk")
        self.num_heads, self.grid = num_heads, grid

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        q, k, v = rearrange(self.qkv(x), "n qkv d -> qkv n d")
        q, k = (head_by_head(*each, self.num_heads, self.grid) for each in ((q, self.q_norm), (k, self.k_norm)))
        return self.out(attend(q, k, v, self.num_heads))


class CrossAttention(eqx.Module):
    """Multi-head attention (Vaswani et al. 2017) from the tokens of an image to the tokens of a context.

    `qk_norm` is as in `Attention`.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    q_norm: Any
    k_norm: Any
    num_heads: int = eqx.field(static=True)
    tensor_split: ClassVar = {"q": "out", "k": "out", "v": "out", "out": "in"}

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: Any = None, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.q, self.k, self.v, self.out = (Linear(hidden_size, hidden_size, key=k) for k in keys)
        self.q_norm, self.k_norm = (qk_norm and qk_norm(hidden_size // num_heads) for _ in "qk")
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "n d"], context: Float[Array, "m d"]) -> Float[Array, "n d"]:
        q = head_by_head(self.q(x), self.q_norm, self.num_heads)
        k = head_by_head(self.k(context), self.k_norm, self.num_heads)
        return self.out(attend(q, k, self.v(context), self.num_heads))


def head_by_head(
    x: Float[Array, "n d"], norm: Any, num_heads: int, grid: tuple[int, int] | None = None
) -> Float[Array, "n d"]:
    """Queries or keys, each head normalised by `norm` and rotated by its position on `grid`, where these are given."""
    if norm is None and grid is None:
        return x
    heads = rearrange(x, "n (heads k) -> n heads k", heads=num_heads)
    heads = heads if norm is None else norm(heads)
    heads = heads if grid is None else rotate(heads, grid)
    return rearrange(heads, "n heads k -> n (heads k)")


def rotary_angles(grid: tuple[int, int], width: int) -> Float[np.ndarray, "n half"]:
    """Angles of the pairs of channels in heads of this width, for the tokens of a grid, in float64.

    The first half turns with the row, the second half with the column. The angle of pair `i` of a half is the position
    times `10000 ** (-4 i / width)`.
    """
    angles = np.indices(grid)[..., None] * 10000.0 ** (-np.arange(width // 4) / (width // 4))
    return rearrange(angles, "two h w pair -> (h w) (two pair)")


def rotate(x: Float[Array, "n heads k"], grid: tuple[int, int]) -> Float[Array, "n heads k"]:
    """Rotary positions in two dimensions (Su et al. 2021): products of rotated vectors depend on offsets only.

    The first tokens fill `grid`, row by row; later tokens are not rotated. Neighbouring channels form a pair,
    which turns by the angle of `rotary_angles`.
    """
    angles = rotary_angles(grid, x.shape[-1])
    angles = np.pad(angles, ((0, len(x) - len(angles)), (0, 0)))[:, None]
    dtype = at_least_float32(x.dtype)
    a, b = jnp.moveaxis(rearrange(x.astype(dtype), "n heads (pair two) -> n heads pair two", two=2), -1, 0)
    cos, sin = jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return rearrange(turned, "n heads pair two -> n heads (pair two)").astype(x.dtype)


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


class SwiGLU(eqx.Module):
    """The product of two linear maps, the first one through SiLU, then a linear map back (Shazeer 2020).

    The two have an axis of their own, so that tensor parallelism can split both alike.
    """

    up: Linear
    down: Linear
    tensor_split: ClassVar = MLP.tensor_split

    def __init__(self, hidden_size: int, mlp_size: int, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(hidden_size, (2, mlp_size), key=up_key)
        self.down = Linear(mlp_size, hidden_size, key=down_key)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        gate, value = rearrange(self.up(x), "n two d -> two n d")
        return self.down(jax.nn.silu(gate) * value)


def with_bias(x: Float[Array, "*n d"], bias: Float[Array, "..."]) -> Float[Array, "*n d"]:
    """`x + bias` along the last axes of `x`."""
    return x + jax.lax.broadcast_to_rank(bias, x.ndim)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums over many elements: float32, or float64 if `dtype` is."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
