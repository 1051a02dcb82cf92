"""The diffusion transformer (Peebles and Xie 2022) and its twelve published configurations."""

import dataclasses
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ditx.nn.blocks import AdaLNBlock, AdaLNFinalLayer, AdaLNZeroBlock, CrossAttentionBlock, FinalLayer, InContextBlock
from ditx.nn.layers import PLAIN, Compute, LabelEmbedding, Linear, TimeEmbedding, grid_positions

BlockName: TypeAlias = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]
Remat: TypeAlias = Literal["none", "dots", "full"]
"""What the backward pass recomputes: nothing, all of a block but its products with weights, or whole blocks."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The shape of a network; the defaults are DiT-XL/2 on the latents of 256-pixel ImageNet.

    Raises ValueError, before anything is built, where the sizes do not fit one another.
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
    """labels run from 0 to num_classes - 1; 0 is an unconditional network, whose one label is the null label"""
    label_dropout: float = 0.1
    """probability of training without the label; above 0 the label table has a null row, which guidance needs"""
    learn_sigma: bool = True
    """output as many channels again for the variance, as the paper's objective has it"""
    block: BlockName = "adaln-zero"
    """how time and label enter: by norms and gates, by norms alone, by attention to them, or as two more tokens"""
    frequency_shift: int = 0
    """1 spaces the frequencies of time as diffusers does, from 1 to 1/10000; 0 as the paper's authors do"""
    sit: bool = False
    """weights of SiT (Ma et al. 2024), trained to read 1 - t/1000 and to predict data - noise, without a variance"""

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
            raise ValueError(f"label_dropout is {self.label_dropout}; it is a probability from 0 up to, not with, 1")
        if self.mlp_size < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP no width; the paper has 4.0")
        if self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift is {self.frequency_shift}; it is 0 (the authors') or 1 (diffusers')")
        if self.block not in get_args(BlockName):
            raise ValueError(f"there is no block {self.block!r}; choose {', '.join(get_args(BlockName))}")

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None where the network was built without one."""
        return self.num_classes if self.label_dropout > 0 else None

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise (or velocity) first, then, with `learn_sigma`, the variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of one example, less those of the condition."""
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


_BLOCKS = {
    "adaln-zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}


class DiT(eqx.Module):
    """A class-conditional diffusion transformer over one image or latent.

    Every array is a parameter. The blocks are stacked on a leading axis and run by one scan; their arrays hence have
    the shapes of a single block's with `depth` in front.
    """

    patch: Linear
    time: TimeEmbedding
    label: LabelEmbedding
    blocks: AdaLNZeroBlock | AdaLNBlock | CrossAttentionBlock | InContextBlock
    final: AdaLNFinalLayer | FinalLayer
    config: DiTConfig = eqx.field(static=True)

    def __init__(self, config: DiTConfig, *, key: PRNGKeyArray):
        patch_key, time_key, label_key, blocks_key, final_key = jax.random.split(key, 5)
        width, out_size = config.hidden_size, config.patch_size**2 * config.out_channels
        self.patch = Linear(config.patch_size**2 * config.in_channels, width, key=patch_key)
        self.time = TimeEmbedding(width, frequency_shift=config.frequency_shift, key=time_key)
        self.label = LabelEmbedding(config.num_classes, width, null_label=config.null_label is not None, key=label_key)
        block = partial(_BLOCKS[config.block], width, config.num_heads, config.mlp_size)
        self.blocks = jax.vmap(lambda k: block(key=k))(jax.random.split(blocks_key, config.depth))
        final = AdaLNFinalLayer if config.block in ("adaln-zero", "adaln") else FinalLayer
        self.final = final(width, out_size, key=final_key)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "h w c"],
        t: Float[Array, ""] | Int[Array, ""] | float | int,
        y: Int[Array, ""] | int | None = None,
        *,
        compute: Compute = PLAIN,
        unroll: int = 1,
        remat: Remat = "none",
    ) -> Float[Array, "h w o"]:
        """Predict noise (and, with `learn_sigma`, the variance fraction) from `x` at time `t` under label `y`.

        `t` counts training steps from 0 to 999, whole or not. Without `y` it is the null label; raises ValueError where
        there is none. `y` is not checked, since it may be traced: a label out of range would silently read the last
        row. `compute`, `unroll` and `remat` change speed and memory, and nothing of the result but rounding: what
        computes a block, how many are compiled in a row rather than as a loop, and what of them is recomputed in the
        backward pass.
        """
        config = self.config
        expected = (config.input_size, config.input_size, config.in_channels)
        if x.shape != expected:
            raise ValueError(f"the input has shape {x.shape}, the network was built for {expected}")
        y = config.null_label if y is None else y
        if y is None:
            raise ValueError("the network was built without a null label (label_dropout 0); give a label")
        p, side = config.patch_size, config.input_size // config.patch_size
        tokens = self.patch(rearrange(x, "(h p) (w q) c -> (h w) (p q c)", p=p, q=p))
        tokens = tokens + jnp.asarray(grid_positions(side, config.hidden_size), tokens.dtype)
        t = 1 - jnp.asarray(t) / 1000 if config.sit else t
        time, label = self.time(jnp.asarray(t)), self.label(jnp.asarray(y))
        condition = time + label
        if config.block == "cross-attention":
            condition = jnp.stack([time, label])
        elif config.block == "in-context":
            tokens = jnp.concatenate([tokens, time[None], label[None]])

        def body(tokens, block):
            return block(tokens, condition, compute=compute), None

        if remat != "none":
            kept = _products_with_weights if remat == "dots" else None
            # In a loop nothing can be merged with the forward pass, and the barriers against it cost time.
            body = jax.checkpoint(body, policy=kept, prevent_cse=unroll > 1)
        tokens, _ = jax.lax.scan(body, tokens, self.blocks, unroll=unroll)
        patches = self.final(tokens[: config.num_tokens], condition)
        output = rearrange(patches, "(h w) (p q o) -> (h p) (w q) o", h=side, p=p, q=p)
        return -output if config.sit else output


def _products_with_weights(operation: Any, *arguments: Any, **parameters: Any) -> Any:
    """The policy of `--remat dots`."""
    of_batch = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return operation.name == "product" or of_batch(operation, *arguments, **parameters)
