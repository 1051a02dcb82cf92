"""The four designs of a transformer block in Peebles and Xie 2022, section 3.2, and the last layer of a network.

A block is a module with these members; the rest of ditx uses no others:

* `__init__(hidden_size, num_heads, mlp_size, *, key)`;
* `__call__(x, c) -> x`, for the tokens `x` and the condition `c`;
* `enter(tokens, time, label) -> tokens, c`: how the embeddings of time and label enter the network;
* `final`: the class of the network's last layer;
* `tensor_split`: for each matrix that the block itself owns, how tensor parallelism splits it: by output features
  ("out"), by input features ("in"), or not at all ("whole"). Attention and MLP state their own.

A fifth design is such a class, in `DiTConfig(block=...)` or `DiT(config, block=...)`. To choose it by name on the
command line, add it to `BLOCKS` and `BlockName`. Parameters and multiply-adds are counted from its trace, and
`ditx.kernels.block` runs it as it is.
"""

from typing import ClassVar, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.checks import check_choice
from ditx.nn.layers import MLP, Attention, CrossAttention, LayerNorm, Linear, layer_norm, modulate

Tokens: TypeAlias = Float[Array, "n d"]
Vector: TypeAlias = Float[Array, " d"]


class AdaLNFinalLayer(eqx.Module):
    """Last norm, modulated by the condition, and the map from a token to its output patch. Starts at zero."""

    modulation: Linear
    linear: Linear

    def __init__(self, hidden_size: int, out_size: int, *, key: PRNGKeyArray):
        self.modulation = Linear(hidden_size, 2 * hidden_size, std=0.0, key=key)
        self.linear = Linear(hidden_size, out_size, std=0.0, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n o"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2)
        return self.linear(modulate(layer_norm(x), shift, scale))


class FinalLayer(eqx.Module):
    """Plain last norm and the map from a token to its output patch, which starts at zero. Ignores the condition."""

    norm: LayerNorm
    linear: Linear

    def __init__(self, hidden_size: int, out_size: int, *, key: PRNGKeyArray):
        self.norm = LayerNorm(hidden_size)
        self.linear = Linear(hidden_size, out_size, std=0.0, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, "*m d"] | None = None) -> Float[Array, "n o"]:
        return self.linear(self.norm(x))


class AdaLNZeroBlock(eqx.Module):
    """The condition modulates the norms and gates the residual branches. A new block is the identity."""

    attention: Attention
    mlp: MLP
    modulation: Linear
    mlp_norm_eps: float = eqx.field(static=True)
    final: ClassVar = AdaLNFinalLayer
    tensor_split: ClassVar = {"modulation": "whole"}

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, *, mlp_norm_eps: float = 1e-6, key: PRNGKeyArray
    ):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.modulation = Linear(hidden_size, 6 * hidden_size, std=0.0, key=modulation_key)
        self.mlp_norm_eps = mlp_norm_eps

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(c)), 6)
        x = x + gate1[None] * self.attention(modulate(layer_norm(x), shift1, scale1))
        return x + gate2[None] * self.mlp(modulate(layer_norm(x, self.mlp_norm_eps), shift2, scale2))

    @staticmethod
    def enter(tokens: Tokens, time: Vector, label: Vector) -> tuple[Tokens, Vector]:
        """The condition is the sum of the two embeddings."""
        return tokens, time + label


class AdaLNBlock(eqx.Module):
    """The condition modulates the norms."""

    attention: Attention
    mlp: MLP
    modulation: Linear
    final: ClassVar = AdaLNFinalLayer
    tensor_split: ClassVar = {"modulation": "whole"}
    enter = staticmethod(AdaLNZeroBlock.enter)

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.modulation = Linear(hidden_size, 4 * hidden_size, std=0.0, key=modulation_key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n d"]:
        shift1, scale1, shift2, scale2 = jnp.split(self.modulation(jax.nn.silu(c)), 4)
        x = x + self.attention(modulate(layer_norm(x), shift1, scale1))
        return x + self.mlp(modulate(layer_norm(x), shift2, scale2))


class CrossAttentionBlock(eqx.Module):
    """Self-attention, then cross-attention to the condition, a sequence of two tokens."""

    attention: Attention
    cross_attention: CrossAttention
    mlp: MLP
    norm1: LayerNorm
    norm2: LayerNorm
    norm3: LayerNorm
    final: ClassVar = FinalLayer

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.cross_attention = CrossAttention(hidden_size, num_heads, key=cross_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(hidden_size) for _ in range(3))

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
    mlp: MLP
    norm1: LayerNorm
    norm2: LayerNorm
    final: ClassVar = FinalLayer

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2 = LayerNorm(hidden_size), LayerNorm(hidden_size)

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
