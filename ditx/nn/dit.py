"""The diffusion transformer (Peebles and Xie 2022) and its twelve published configurations."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Real

from ditx.checks import any_mesh, check_example
from ditx.nn.blocks import BLOCKS, BlockName, check_block
from ditx.nn.embeddings import LabelEmbedding, TimeEmbedding, grid_positions
from ditx.nn.layers import Linear

ApplyBlock: TypeAlias = Callable[[Any, Float[Array, "n d"], Float[Array, "*m d"]], Float[Array, "n d"]]


def call_block(block: Any, tokens: Float[Array, "n d"], condition: Float[Array, "*m d"]) -> Float[Array, "n d"]:
    """The plain block. `apply_block` arguments default to it; faster or distributed blocks take its place."""
    return block(tokens, condition)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a network. The defaults are DiT-XL/2 on the latents of 256-pixel ImageNet.

    Raises ValueError if the sizes do not fit each other.
    """

    input_size: int = 32
    """side of the square input, in latent or image pixels"""
    patch_size: int = 2
    """side of the square patch that becomes one token"""
    in_channels: int = 4
    """channels of the input: 4 for Stable Diffusion's latents, 3 for colour images, 1 for grey ones"""
    hidden_size: int = 1152
    """width of a token"""
    depth: int = 28
    """number of transformer blocks"""
    num_heads: int = 16
    """attention heads in each block"""
    mlp_ratio: float = 4.0
    """width of the MLP over the width of a token"""
    num_classes: int = 1000
    """labels run from 0 to num_classes - 1; 0 makes an unconditional network, whose only label is the null label"""
    label_dropout: float = 0.1
    """probability of training without the label; above 0, the label table has the null row that guidance needs"""
    learn_sigma: bool = True
    """also output the variance, in as many channels again (the paper's objective)"""
    block: BlockName | type = "adaln-zero"
    """how time and label enter: by norms and gates, by norms only, by cross-attention, or as two more tokens"""
    frequency_shift: int = 0
    """spacing of the time frequencies: 0 as in the authors' code, 1 as in diffusers (from 1 to exactly 1/10000)"""
    sit: bool = False
    """SiT's conventions, for its released weights: layers see 1 - t / 1000 and predict x_0 - noise (Ma et al. 2024)"""
    mlp_norm_eps: float = 1e-6
    """added to the variance by the norm before the MLP (adaln-zero): 1e-6 as in the authors' code, 1e-5 in diffusers"""

    def __post_init__(self):
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_classes < (0 if self.label_dropout > 0 else 1):
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be at least 1, or, for a network without labels, 0 with"
                " label_dropout above 0"
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide input_size {self.input_size}; choose a divisor of it"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; change one of the two"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by 4, as the sine-cosine positions need;"
                f" try {self.hidden_size // 4 * 4 + 4}"
            )
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout is {self.label_dropout}; give a probability of at least 0 and below 1")
        if self.mlp_size < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} gives the MLP a width of 0; the paper uses 4.0")
        if self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift is {self.frequency_shift}; give 0 (the authors') or 1 (diffusers')")
        check_block(self.block)
        if not 0 < self.mlp_norm_eps < 1 or (self.mlp_norm_eps != 1e-6 and self.block != "adaln-zero"):
            name = self.described()["block"]
            raise ValueError(f"mlp_norm_eps is {self.mlp_norm_eps} in blocks {name}; give 1e-6 (the authors')")

    def described(self) -> dict[str, Any]:
        """The fields for a JSON file, a block class by its name."""
        return dataclasses.asdict(self) | {"block": self.own_block.__name__ if self.own_block else self.block}

    @property
    def own_block(self) -> type | None:
        """The class of blocks that are not of ditx, else None."""
        return None if isinstance(self.block, str) else self.block

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None if the network has none."""
        return self.num_classes if self.label_dropout > 0 else None

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise (or velocity) first, then, with `learn_sigma`, the variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_tokens(self) -> int:
        """Number of image tokens, without tokens of the condition."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_size(self) -> int:
        """Width of the MLP in each block."""
        return int(self.hidden_size * self.mlp_ratio)


_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

DIT_CONFIGS = {
    f"DiT-{size}/{patch}": DiTConfig(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)
    for size, (width, depth, heads) in _WIDTHS.items()
    for patch in (8, 4, 2)
}


class DiT(eqx.Module):
    """Class-conditional diffusion transformer over one image or latent.

    Every array is a parameter. The blocks are stacked on a leading axis and run by one scan: their arrays have the
    shapes of a single block's with `depth` in front. `block`, a class as `ditx.nn.blocks` describes it, replaces the
    block of the configuration.
    """

    patch: Linear
    time: TimeEmbedding
    label: LabelEmbedding
    blocks: Any
    final: Any
    config: DiTConfig = eqx.field(static=True)

    def __init__(self, config: DiTConfig, *, block: type | None = None, key: PRNGKeyArray):
        config = config if block is None else dataclasses.replace(config, block=block)
        patch_key, time_key, label_key, blocks_key, final_key = jax.random.split(key, 5)
        width, out_size = config.hidden_size, config.patch_size**2 * config.out_channels
        self.patch = Linear(config.patch_size**2 * config.in_channels, width, key=patch_key)
        self.time = TimeEmbedding(width, frequency_shift=config.frequency_shift, key=time_key)
        self.label = LabelEmbedding(config.num_classes, width, null_label=config.null_label is not None, key=label_key)
        eps = {} if config.mlp_norm_eps == 1e-6 else {"mlp_norm_eps": config.mlp_norm_eps}
        kind: Any = BLOCKS[config.block] if isinstance(config.block, str) else config.block
        create = partial(kind, width, config.num_heads, config.mlp_size, **eps)
        self.blocks = jax.vmap(lambda key: create(key=key))(jax.random.split(blocks_key, config.depth))
        self.final = self.blocks.final(width, out_size, key=final_key)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "h w c"],
        t: Real[ArrayLike, ""],
        y: Int[ArrayLike, ""] | None = None,
        *,
        apply_block: ApplyBlock = call_block,
        unroll: int = 1,
    ) -> Float[Array, "h w o"]:
        """Predict noise (and, with `learn_sigma`, the variance fraction) from `x` at time `t` under label `y`.

        `t` counts training steps from 0 to 999, whole or not. `y` defaults to the null label; raises ValueError if
        there is none. `y` may be traced and is not checked: a label out of range silently reads the last row.
        `apply_block(block, tokens, condition)` computes each block; see `ditx.kernels` and `ditx.parallel`. `unroll` is
        the number of blocks compiled in a row. Neither changes the result beyond rounding.
        """
        tokens, condition = self.embed(x, t, y)
        return self.unembed(self.run(tokens, condition, apply_block=apply_block, unroll=unroll), condition)

    @any_mesh
    def embed(
        self, x: Float[Array, "h w c"], t: Real[ArrayLike, ""], y: Int[ArrayLike, ""] | None = None
    ) -> tuple[Float[Array, "n d"], Float[Array, "*m d"]]:
        """Tokens of the image patches with their positions, and the condition of time and label."""
        config = self.config
        expected = (config.input_size, config.input_size, config.in_channels)
        if x.shape != expected:
            raise ValueError(f"the input has shape {x.shape}, but the network was built for {expected}")
        y = config.null_label if y is None else y
        if y is None:
            raise ValueError("the network was built without a null label (label_dropout 0); give a label")
        p, t = config.patch_size, jnp.asarray(t)
        check_example(0, t=t, y=y)
        tokens = self.patch(rearrange(x, "(h p) (w q) c -> (h w) (p q c)", p=p, q=p))
        tokens = tokens + jnp.asarray(grid_positions(config.input_size // p, config.hidden_size), tokens.dtype)
        return self.blocks.enter(tokens, self.time(1 - t / 1000 if config.sit else t), self.label(jnp.asarray(y)))

    @any_mesh
    def run(
        self,
        tokens: Float[Array, "n d"],
        condition: Float[Array, "*m d"],
        *,
        blocks: slice = slice(None),
        apply_block: ApplyBlock = call_block,
        unroll: int = 1,
    ) -> Float[Array, "n d"]:
        """Run the blocks, or a slice of them, over the tokens."""
        check_example(2, tokens=tokens, condition=condition)
        stack = self.blocks if blocks == slice(None) else jax.tree.map(lambda leaf: leaf[blocks], self.blocks)

        def body(tokens, block):
            return apply_block(block, tokens, condition), None

        return jax.lax.scan(body, tokens, stack, unroll=unroll)[0]

    @any_mesh
    def unembed(self, tokens: Float[Array, "n d"], condition: Float[Array, "*m d"]) -> Float[Array, "h w o"]:
        """The output image of the tokens, by the last layer. Ignores tokens behind the image's own."""
        check_example(2, tokens=tokens, condition=condition)
        config = self.config
        patches = self.final(tokens[: config.num_tokens], condition)
        p, side = config.patch_size, config.input_size // config.patch_size
        output = rearrange(patches, "(h w) (p q o) -> (h p) (w q) o", h=side, p=p, q=p)
        return -output if config.sit else output
