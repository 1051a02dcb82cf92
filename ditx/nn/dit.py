"""The diffusion transformer (Peebles and Xie 2022) and its twelve published configurations."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Real

from ditx.checks import any_mesh, check_choice, check_example
from ditx.nn.blocks import BLOCKS, BlockName, BlockStyle, MLPName, NormName, check_block
from ditx.nn.embeddings import LabelEmbedding, TimeEmbedding, grid_positions
from ditx.nn.layers import Linear

Positions: TypeAlias = Literal["sincos", "rotary", "both"]
Convention: TypeAlias = Literal["dit", "sit", "repa", "jit"]
ApplyBlock: TypeAlias = Callable[[Any, Float[Array, "n d"], Float[Array, "*m d"]], Float[Array, "n d"]]


def call_block(block: Any, tokens: Float[Array, "n d"], condition: Float[Array, "*m d"]) -> Float[Array, "n d"]:
    """The plain block. `apply_block` arguments default to it; faster or distributed blocks take its place."""
    return block(tokens, condition)


# Fields for kinds of layers, with the paper's as defaults.
LAYER_FIELDS = (
    *("block", "norm", "qk_norm", "mlp", "positions", "modulation_shift"),
    *("context_tokens", "context_start", "patch_bottleneck"),
)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a network. The defaults are DiT-XL/2 on the latents of 256-pixel ImageNet.

    Raises ValueError if the sizes do not fit each other.
    """

    input_size: int | tuple[int, int] = 32
    """side of a square input, or height and width, in latent or image pixels"""
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
    convention: Convention = "dit"
    """time that the layers see and what they predict: t (dit, and what ditx trains); 1 - t / 1000 and x_0 - noise (sit,
    also LightningDiT); t / 1000 and noise - x_0 (repa); 1 - t / 1000 and x_0 (jit)"""
    mean_velocity: bool = False
    """a second embedding, of the duration over which a velocity is averaged (MeanFlow)"""
    mlp_norm_eps: float = 1e-6
    """added to the variance by the norm before the MLP (adaln-zero): 1e-6 as in the authors' code, 1e-5 in diffusers"""
    norm: NormName = "layer"
    """layer norms, or RMS norms with a learned scale (rms)"""
    qk_norm: bool = False
    """normalise the queries and keys of each head"""
    mlp: MLPName = "gelu"
    """MLP with a GELU, or SwiGLU of two thirds of the width"""
    positions: Positions = "sincos"
    """fixed sine-cosine positions added to the tokens, rotary positions in the attention, or both"""
    modulation_shift: bool = True
    """the condition shifts the normalised tokens of a block; without it, it only scales them (adaln-zero and adaln)"""
    context_tokens: int = 0
    """tokens of the label that enter at block context_start (32 in JiT)"""
    context_start: int = 0
    """block, counted from 0, before which the context tokens enter"""
    patch_bottleneck: int = 0
    """width of a linear map between patch and token (128 in JiT); 0: none"""

    def __post_init__(self):
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.input_shape) < 1:
            raise ValueError(f"input_size is {self.input_size}; it must be at least 1")
        if self.num_classes < (0 if self.label_dropout > 0 else 1):
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be at least 1, or, for a network without labels, 0 with"
                " label_dropout above 0"
            )
        if any(side % self.patch_size for side in self.input_shape[:2]):
            raise ValueError(
                f"patch_size {self.patch_size} does not divide input_size {self.input_size}; choose a divisor of it"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; change one of the two"
            )
        if self.hidden_size % 4 and self.positions != "rotary":
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
        self._check_layers()

    def _check_layers(self) -> None:
        """Raise ValueError for kinds of layers that are unknown or do not fit each other."""
        check_block(self.block)
        choices = {"convention": Convention, "norm": NormName, "mlp": MLPName, "positions": Positions}
        for name, options in choices.items():
            check_choice(name, getattr(self, name), get_args(options))
        plain = self.block == "adaln-zero" and self.norm == "layer"
        if not 0 < self.mlp_norm_eps < 1 or (self.mlp_norm_eps != 1e-6 and not plain):
            kind = "adaln-zero with layer norms"
            raise ValueError(f"mlp_norm_eps is {self.mlp_norm_eps}; give 1e-6 (the authors'), or a value for {kind}")
        if self.positions != "sincos" and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"positions are {self.positions}, which needs heads whose width is a multiple of 4, and"
                f" {self.num_heads} heads of hidden_size {self.hidden_size} are {self.hidden_size // self.num_heads}"
                " wide; change one of the two"
            )
        if not self.modulation_shift and self.block in ("cross-attention", "in-context"):
            raise ValueError(f"modulation_shift is off, but blocks {self.block} have no modulation; leave it on")
        if min(self.context_tokens, self.patch_bottleneck) < 0:
            raise ValueError(
                f"context_tokens is {self.context_tokens} and patch_bottleneck {self.patch_bottleneck}; give at least 0"
            )
        if self.context_tokens and self.block == "in-context":
            raise ValueError(
                f"context_tokens is {self.context_tokens}, but in blocks in-context the label is a token already; give"
                " 0, or another block"
            )
        if not 0 <= self.context_start < (self.depth if self.context_tokens else 1):
            raise ValueError(
                f"context_start is {self.context_start} in {self.depth} blocks with {self.context_tokens} context"
                " tokens; give 0 to depth - 1, and 0 without context tokens"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the input."""
        height, width = (self.input_size,) * 2 if isinstance(self.input_size, int) else self.input_size
        return height, width, self.in_channels

    @property
    def side(self) -> int:
        """Side of a square input. Raises ValueError for a rectangle."""
        height, width, _ = self.input_shape
        if height != width:
            raise ValueError(
                f"input_size is {height} x {width}, but data sets have square images; give one side, or use ditx.DiT in"
                " a program of your own"
            )
        return height

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        height, width, _ = self.input_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def style(self) -> BlockStyle:
        """The kinds of layers in the blocks."""
        grid = None if self.positions == "sincos" else self.grid
        return BlockStyle(self.norm, self.qk_norm, self.mlp, grid, self.modulation_shift, self.mlp_norm_eps)

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
    def trains_variance(self) -> bool:
        """Whether training uses the channels of `learn_sigma`, which released flows have but never trained."""
        return self.learn_sigma and self.convention == "dit"

    @property
    def num_tokens(self) -> int:
        """Number of image tokens, without tokens of the condition."""
        return self.grid[0] * self.grid[1]

    @property
    def mlp_size(self) -> int:
        """Width of the MLP in each block. SwiGLU has two thirds of it, for as many weights."""
        size = int(self.hidden_size * self.mlp_ratio)
        return size if self.mlp == "gelu" else int(2 / 3 * size)


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
    bottleneck: Linear | None
    context: Float[Array, "m d"] | None
    duration: TimeEmbedding | None
    config: DiTConfig = eqx.field(static=True)

    def __init__(self, config: DiTConfig, *, block: type | None = None, key: PRNGKeyArray):
        config = config if block is None else dataclasses.replace(config, block=block)
        patch_key, time_key, label_key, blocks_key, final_key = jax.random.split(key, 5)
        width, out_size = config.hidden_size, config.patch_size**2 * config.out_channels
        in_size, narrow = config.patch_size**2 * config.in_channels, config.patch_bottleneck
        self.patch = Linear(narrow or in_size, width, key=patch_key)
        embedding = partial(TimeEmbedding, width, frequency_shift=config.frequency_shift)
        self.time = embedding(key=time_key)
        self.label = LabelEmbedding(config.num_classes, width, null_label=config.null_label is not None, key=label_key)
        kind: Any = BLOCKS[config.block] if isinstance(config.block, str) else config.block
        style: Any = {} if config.style == BlockStyle() else {"style": config.style}
        if style and "style" not in inspect.signature(kind).parameters:
            raise ValueError(f"{kind.__name__} takes no style, so it has the paper's layers only, not {config.style}")
        create = partial(kind, width, config.num_heads, config.mlp_size, **style)
        self.blocks = jax.vmap(lambda key: create(key=key))(jax.random.split(blocks_key, config.depth))
        self.final = self.blocks.final(width, out_size, **style, key=final_key)
        narrow_key, context_key = jax.random.fold_in(key, 5), jax.random.fold_in(key, 6)
        shape = (config.context_tokens, width)
        self.bottleneck = Linear(in_size, narrow, bias=False, key=narrow_key) if narrow else None
        self.context = 0.02 * jax.random.normal(context_key, shape) if config.context_tokens else None
        self.duration = embedding(key=jax.random.fold_in(key, 7)) if config.mean_velocity else None
        self.config = config

    def __call__(
        self,
        x: Float[Array, "h w c"],
        t: Real[ArrayLike, ""],
        y: Int[ArrayLike, ""] | None = None,
        duration: Real[ArrayLike, ""] | None = None,
        *,
        apply_block: ApplyBlock = call_block,
        unroll: int = 1,
    ) -> Float[Array, "h w o"]:
        """Predict noise (and, with `learn_sigma`, the variance fraction) from `x` at time `t` under label `y`.

        `t` counts training steps from 0 to 999, whole or not. `y` defaults to the null label; raises ValueError if
        there is none. `y` may be traced and is not checked: a label out of range silently reads the last row.
        A network with `mean_velocity` predicts the mean velocity over `duration` steps before `t`, by default 0.
        `apply_block(block, tokens, condition)` computes each block; see `ditx.kernels` and `ditx.parallel`. `unroll` is
        the number of blocks compiled in a row. Neither changes the result beyond rounding.
        """
        tokens, condition = self.embed(x, t, y, duration)
        return self.unembed(self.run(tokens, condition, apply_block=apply_block, unroll=unroll), condition)

    @any_mesh
    def embed(
        self,
        x: Float[Array, "h w c"],
        t: Real[ArrayLike, ""],
        y: Int[ArrayLike, ""] | None = None,
        duration: Real[ArrayLike, ""] | None = None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "*m d"]]:
        """Tokens of the image patches with their positions, and the condition of time and label.

        Context tokens follow the image tokens, and `run` leaves them unchanged up to block `context_start`.
        """
        config = self.config
        if x.shape != config.input_shape:
            raise ValueError(f"the input has shape {x.shape}, but the network was built for {config.input_shape}")
        y = config.null_label if y is None else y
        if y is None:
            raise ValueError("the network was built without a null label (label_dropout 0); give a label")
        p, t = config.patch_size, jnp.asarray(t)
        check_example(0, t=t, y=y)
        patches = rearrange(x, "(h p) (w q) c -> (h w) (p q c)", p=p, q=p)
        tokens = self.patch(patches if self.bottleneck is None else self.bottleneck(patches))
        if config.positions != "rotary":
            tokens = tokens + jnp.asarray(grid_positions(config.grid, config.hidden_size), tokens.dtype)
        thousands = config.convention == "repa" or config.mean_velocity
        time = self.time(t / 1000 if thousands else t if config.convention == "dit" else 1 - t / 1000)
        if self.duration is not None:
            time = time + self.duration(jnp.asarray(0.0 if duration is None else duration) / 1000)
        elif duration is not None:
            raise ValueError("the network has no embedding of a duration; build it with DiTConfig(mean_velocity=True)")
        label = self.label(jnp.asarray(y))
        tokens, condition = self.blocks.enter(tokens, time, label)
        return tokens if self.context is None else jnp.concatenate([tokens, label[None] + self.context]), condition

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

        def body(tokens, block):
            return apply_block(block, tokens, condition), None

        def run(tokens, blocks):
            stack = self.blocks if blocks == slice(None) else jax.tree.map(lambda leaf: leaf[blocks], self.blocks)
            return jax.lax.scan(body, tokens, stack, unroll=unroll)[0]

        start, order = self.config.context_start, range(self.config.depth)[blocks]
        if start <= order.start:
            return run(tokens, blocks)
        image, context = jnp.split(tokens, [len(tokens) - self.config.context_tokens])
        tokens = jnp.concatenate([run(image, slice(order.start, min(start, order.stop))), context])
        return run(tokens, slice(start, order.stop))

    @any_mesh
    def unembed(self, tokens: Float[Array, "n d"], condition: Float[Array, "*m d"]) -> Float[Array, "h w o"]:
        """The output image of the tokens, by the last layer. Ignores tokens behind the image's own."""
        check_example(2, tokens=tokens, condition=condition)
        config = self.config
        patches = self.final(tokens[: config.num_tokens], condition)
        p, rows = config.patch_size, config.grid[0]
        output = rearrange(patches, "(h w) (p q o) -> (h p) (w q) o", h=rows, p=p, q=p)
        return -output if config.convention == "sit" else output
