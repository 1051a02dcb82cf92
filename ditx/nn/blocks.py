"""The four designs of a transformer block in Peebles and Xie 2022, section 3.2, and the layers that end a network.

They differ in how the condition, an embedding `c` of time and label, reaches the tokens.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ditx.nn.layers import (
    MLP,
    PLAIN,
    Attention,
    Compute,
    CrossAttention,
    LayerNorm,
    Linear,
    gate_norm_modulate,
    gate_residual,
    norm_modulate,
)


class AdaLNZeroBlock(eqx.Module):
    """The condition steers norms and residual branches, whose gates start at zero: a new block is the identity."""

    attention: Attention
    mlp: MLP
    modulation: Linear

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.modulation = Linear(hidden_size, 6 * hidden_size, std=0.0, key=modulation_key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"], compute: Compute = PLAIN) -> Float[Array, "n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(c)), 6)
        x, y = norm_modulate(x, shift1, scale1, compute)
        x, y = gate_norm_modulate(x, gate1, *self.attention.unbiased(y, compute), shift2, scale2, compute)
        return gate_residual(x, gate2, *self.mlp.unbiased(y, compute), compute)


class AdaLNBlock(eqx.Module):
    """The condition steers the norms."""

    attention: Attention
    mlp: MLP
    modulation: Linear

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.modulation = Linear(hidden_size, 4 * hidden_size, std=0.0, key=modulation_key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"], compute: Compute = PLAIN) -> Float[Array, "n d"]:
        shift1, scale1, shift2, scale2 = jnp.split(self.modulation(jax.nn.silu(c)), 4)
        x, y = norm_modulate(x, shift1, scale1, compute)
        x, y = norm_modulate(x + self.attention(y, compute), shift2, scale2, compute)
        return x + self.mlp(y, compute)


class CrossAttentionBlock(eqx.Module):
    """The condition is a sequence of its own, to which the tokens attend after they attended to each other."""

    attention: Attention
    cross_attention: CrossAttention
    mlp: MLP
    norm1: LayerNorm
    norm2: LayerNorm
    norm3: LayerNorm

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.cross_attention = CrossAttention(hidden_size, num_heads, key=cross_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(hidden_size) for _ in range(3))

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, "m d"], compute: Compute = PLAIN) -> Float[Array, "n d"]:
        x = x + self.attention(self.norm1(x), compute)
        x = x + self.cross_attention(self.norm2(x), c, compute)
        return x + self.mlp(self.norm3(x), compute)


class InContextBlock(eqx.Module):
    """The condition is among the tokens, and the block a plain one (Dosovitskiy et al. 2021); `c` is not used."""

    attention: Attention
    mlp: MLP
    norm1: LayerNorm
    norm2: LayerNorm

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = Attention(hidden_size, num_heads, key=attention_key)
        self.mlp = MLP(hidden_size, mlp_size, key=mlp_key)
        self.norm1, self.norm2 = LayerNorm(hidden_size), LayerNorm(hidden_size)

    def __call__(
        self, x: Float[Array, "n d"], c: Float[Array, " d"] | None = None, compute: Compute = PLAIN
    ) -> Float[Array, "n d"]:
        x = x + self.attention(self.norm1(x), compute)
        return x + self.mlp(self.norm2(x), compute)


class AdaLNFinalLayer(eqx.Module):
    """The last norm, steered by the condition, and the map from a token to its output patch; starts at zero."""

    modulation: Linear
    linear: Linear

    def __init__(self, hidden_size: int, out_size: int, *, key: PRNGKeyArray):
        self.modulation = Linear(hidden_size, 2 * hidden_size, std=0.0, key=key)
        self.linear = Linear(hidden_size, out_size, std=0.0, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n o"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2)
        return self.linear(norm_modulate(x, shift, scale)[1])


class FinalLayer(eqx.Module):
    """A plain last norm and the map from a token to its output patch, which starts at zero; `c` is not used."""

    norm: LayerNorm
    linear: Linear

    def __init__(self, hidden_size: int, out_size: int, *, key: PRNGKeyArray):
        self.norm = LayerNorm(hidden_size)
        self.linear = Linear(hidden_size, out_size, std=0.0, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, "*m d"] | None = None) -> Float[Array, "n o"]:
        return self.linear(self.norm(x))
