"""The four designs of a transformer block in Peebles and Xie 2022, section 3.2, and the last layer of a network.

A block is a module with these members; the rest of ditx uses no others:

* `__init__(hidden_size, num_heads, mlp_size, *, key)`, and `style=BlockStyle()` if it has layers beyond the paper's;
* `__call__(x, c) -> x`, for the tokens `x` and the condition `c`;
* `enter(tokens, time, label) -> tokens, c`: how the embeddings of time and label enter the network;
* `final`: the class of the network's last layer;
* `tensor_split`: for each matrix that the block itself owns, how tensor parallelism splits it: by output features
  ("out"), by input features ("in"), or not at all ("whole"). Attention and MLP state their own.

A fifth design is such a class, in `DiTConfig(block=...)` or `DiT(config, block=...)`. To choose it by name on the
command line, add it to `BLOCKS` and `BlockName`. Parameters and multiply-adds are counted from its trace, and
`ditx.kernels.block` runs it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.checks import check_choice
from ditx.nn.layers import MLP, Attention, CrossAttention, LayerNorm, Linear, RMSNorm, SwiGLU, modulate

Tokens: TypeAlias = Float[Array, "n d"]
Vector: TypeAlias = Float[Array, " d"]
NormName: TypeAlias = Literal["layer", "rms"]
MLPName: TypeAlias = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class BlockStyle:
    """The kinds of layers in a block; the defaults are the paper's. `DiTConfig` explains the fields."""

    norm_kind: NormName = "layer"
    qk_norm: bool = False
    mlp_kind: MLPName = "gelu"
    grid: tuple[int, int] | None = None
    """rows and columns of the tokens with rotary positions"""
    modulation_shift: bool = True
    mlp_norm_eps: float = 1e-6

    def norm(self, hidden_size: int, *, affine: bool = True, eps: float = 1e-6) -> LayerNorm | RMSNorm:
        """A norm. RMSNorm always has a weight."""
        return LayerNorm(hidden_size, affine=affine, eps=eps) if self.norm_kind == "layer" else RMSNorm(hidden_size)

    def head_norm(self) -> Callable[[int], LayerNorm | RMSNorm] | None:
        """The norm of queries and keys, from the width of a head."""
        return partial(self.norm, eps=1e-5) if self.qk_norm else None

    def attention(self, hidden_size: int, num_heads: int, *, key: PRNGKeyArray) -> Attention:
        """Self-attention."""
        return Attention(hidden_size, num_heads, qk_norm=self.head_norm(), grid=self.grid, key=key)

    def mlp(self, hidden_size: int, mlp_size: int, *, key: PRNGKeyArray) -> MLP | SwiGLU:
        """The MLP."""
        return (MLP if self.mlp_kind == "gelu" else SwiGLU)(hidden_size, mlp_size, key=key)

    def modulation(self, hidden_size: int, count: int, *, key: PRNGKeyArray) -> Linear:
        """The map from the condition to the `count` vectors of `split_modulation`, two of which are shifts."""
        return Linear(hidden_size, (count if self.modulation_shift else count - 2) * hidden_size, std=0.0, key=key)


def split_modulation(vector: Float[Array, " m"], count: int, width: int) -> list[Float[Array, " d"]]:
    """The `count` vectors of a block's modulation; shifts are zeros in a block without them."""
    parts = jnp.split(vector, vector.size // width)
    if len(parts) < count:
        zeros, half = jnp.zeros_like(parts[0]), len(parts) // 2
        parts = [zeros, *parts[:half], zeros, *parts[half:]]
    return parts


class AdaLNFinalLayer(eqx.Module):
    """Last norm, modulated by the condition, and the map from a token to its output patch. Starts at zero."""

    norm: LayerNorm | RMSNorm
    modulation: Linear
    linear: Linear

    def __init__(self, hidden_size: int, out_size: int, *, style: BlockStyle = BlockStyle(), key: PRNGKeyArray):
        self.norm = style.norm(hidden_size, affine=False)
        self.modulation = Linear(hidden_size, 2 * hidden_size, std=0.0, key=key)
        self.linear = Linear(hidden_size, out_size, std=0.0, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n o"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2)
        return self.linear(modulate(self.norm(x), shift, scale))


class FinalLayer(eqx.Module):
    """Plain last norm and the map from a token to its output patch, which starts at zero. Ignores the condition."""

    norm: LayerNorm | RMSNorm
    linear: Linear

    def __init__(self, hidden_size: int, out_size: int, *, style: BlockStyle = BlockStyle(), key: PRNGKeyArray):
        self.norm = style.norm(hidden_size)
        self.linear = Linear(hidden_size, out_size, std=0.0, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, "*m d"] | None = None) -> Float[Array, "n o"]:
        return self.linear(self.norm(x))


class AdaLNZeroBlock(eqx.Module):
    """The condition modulates the norms and gates the residual branches. A new block is the identity."""

    attention: Attention
    mlp: MLP | SwiGLU
    norm1: LayerNorm | RMSNorm
    norm2: LayerNorm | RMSNorm
    modulation: Linear
    final: ClassVar = AdaLNFinalLayer
    tensor_split: ClassVar = {"modulation": "whole"}

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, *, style: BlockStyle = BlockStyle(), key: PRNGKeyArray
    ):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = style.attention(hidden_size, num_heads, key=attention_key)
        self.mlp = style.mlp(hidden_size, mlp_size, key=mlp_key)
        self.norm1 = style.norm(hidden_size, affine=False)
        self.norm2 = style.norm(hidden_size, affine=False, eps=style.mlp_norm_eps)
        self.modulation = style.modulation(hidden_size, 6, key=modulation_key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = split_modulation(self.modulation(jax.nn.silu(c)), 6, c.size)
        x = x + gate1[None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    @staticmethod
    def enter(tokens: Tokens, time: Vector, label: Vector) -> tuple[Tokens, Vector]:
        """The condition is the sum of the two embeddings."""
        return tokens, time + label


class AdaLNBlock(eqx.Module):
    """The condition modulates the norms."""

    attention: Attention
    mlp: MLP | SwiGLU
    norm1: LayerNorm | RMSNorm
    norm2: LayerNorm | RMSNorm
    modulation: Linear
    final: ClassVar = AdaLNFinalLayer
    tensor_split: ClassVar = {"modulation": "whole"}
    enter = staticmethod(AdaLNZeroBlock.enter)

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, *, style: BlockStyle = BlockStyle(), key: PRNGKeyArray
    ):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = style.attention(hidden_size, num_heads, key=attention_key)
        self.mlp = style.mlp(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2 = (style.norm(hidden_size, affine=False) for _ in range(2))
        self.modulation = style.modulation(hidden_size, 4, key=modulation_key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        shift1, scale1, shift2, scale2 = split_modulation(self.modulation(jax.nn.silu(c)), 4, c.size)
        x = x + self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class CrossAttentionBlock(eqx.Module):
    """Self-attention, then cross-attention to the condition, a sequence of two tokens."""

    attention: Attention
    cross_attention: CrossAttention
    mlp: MLP | SwiGLU
    norm1: LayerNorm | RMSNorm
    norm2: LayerNorm | RMSNorm
    norm3: LayerNorm | RMSNorm
    final: ClassVar = FinalLayer

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, *, style: BlockStyle = BlockStyle(), key: PRNGKeyArray
    ):
        attention_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.attention = style.attention(hidden_size, num_heads, key=attention_key)
        self.cross_attention = CrossAttention(hidden_size, num_heads, qk_norm=style.head_norm(), key=cross_key)
        self.mlp = style.mlp(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2, self.norm3 = (style.norm(hidden_size) for _ in range(3))

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, "m d"]) -> Float[Array, "n d"]:
        x = x + self.attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), c)
        return x + self.mlp(self.norm3(x))

    @staticmethod
    def enter(tokens: Tokens, time: Vector, label: Vector) -> tuple[Tokens, Float[Array, "2 d"]]:
        """The condition is the sequence of the two embeddings."""
        return tokens, jnp.stack([time, label])


class InContextBlock(eqx.Module):
    """A plain block (Dosovitskiy et al. 2021). The condition is among the tokens; `c` is not used."""

    attention: Attention
    mlp: MLP | SwiGLU
    norm1: LayerNorm | RMSNorm
    norm2: LayerNorm | RMSNorm
    final: ClassVar = FinalLayer

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, *, style: BlockStyle = BlockStyle(), key: PRNGKeyArray
    ):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = style.attention(hidden_size, num_heads, key=attention_key)
        self.mlp = style.mlp(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2 = style.norm(hidden_size), style.norm(hidden_size)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"] | None = None) -> Float[Array, "n d"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    @staticmethod
    def enter(tokens: Tokens, time: Vector, label: Vector) -> tuple[Float[Array, "m d"], Vector]:
        """The two embeddings are appended to the tokens of the image."""
        return jnp.concatenate([tokens, time[None], label[None]]), time + label


BlockName: TypeAlias = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]
BLOCKS = dict(zip(get_args(BlockName), (AdaLNZeroBlock, AdaLNBlock, CrossAttentionBlock, InContextBlock), strict=True))


def check_block(block: str | type) -> None:
    """Raise ValueError unless `block` is a name of `BLOCKS` or a class with the members of a block."""
    if isinstance(block, str):
        return check_choice("block", block, BLOCKS)
    missing = [name for name in ("enter", "final") if not hasattr(block, name)]
    if missing:
        remedy = "derive it from AdaLNBlock or another class of ditx/nn/blocks.py, or add them"
        raise ValueError(f"block {block.__name__} has no {' and no '.join(missing)}; {remedy}")


def find_block(name: str, block: type | None, source: object) -> str | type:
    """The block of a stored network: `name`, or the class `block` of that name.

    Raises ValueError if the class is missing, or is another one.
    """
    own = name not in BLOCKS
    if own and (block is None or block.__name__ != name):
        raise ValueError(
            f"{source} has blocks of your own class {name}; load it in Python: ditx.load(..., block={name})"
        )
    if block and not own:
        raise ValueError(f"{source} has blocks {name}; leave block={block.__name__} out")
    return block or name
