"""The tuned block: the same weights and mathematics as `ditx.nn.blocks`, in fewer passes over the tokens.

Pass it to a network: `model(x, t, y, apply_block=KernelConfig().apply_block())`. It differs from the
plain block in four ways:

* queries, keys and values are three products, because slicing a weight is cheaper than slicing a product;
* biases are added where they cost no pass of their own;
* norms, gates and GELUs are recomputed in the backward pass, because loading saved values would take longer;
* the tokens of a batch are the rows of one matrix in products with weights (`ditx.kernels.matmul`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ditx.checks import check_names
from ditx.kernels import fp8, matmul
from ditx.nn import layers
from ditx.nn.blocks import AdaLNBlock, AdaLNZeroBlock, CrossAttentionBlock, InContextBlock, split_modulation
from ditx.nn.dit import ApplyBlock, DiTConfig

Tokens: TypeAlias = Float[Array, "n d"]


@dataclass(frozen=True)
class KernelConfig:
    """Implementation of a network's blocks: speed and rounding."""

    kernels: Literal["xla", "fused"] = "xla"
    """norms, gates and GELUs by XLA, or by fused Pallas kernels on GPUs"""
    attention: Literal["auto", "xla", "cudnn", "fused"] = "auto"
    """attention by XLA, by cuDNN, or by fused Pallas kernels on GPUs; auto is cuDNN where it works, else XLA"""
    matmul_dtype: Literal["compute", "fp8"] = "compute"
    """precision of the block matmuls: the compute dtype, or FP8 (Ada, Hopper and later; up to twice the throughput,
    slightly different training)"""

    def apply_block(self) -> ApplyBlock:
        """The function of a block, its tokens and its condition. Raises ValueError for an unknown name."""
        own = KernelConfig(self.kernels, self.attention, self.matmul_dtype)  # hashable, unlike some subclasses
        check_names(own)
        return partial(_apply_block, config=own)

    def check_forward_derivative(self) -> None:
        """Raise ValueError for kernels that have no forward-mode derivative; that of auto depends on the device."""
        for name in ("kernels", "attention", "matmul_dtype"):
            value = getattr(self, name)
            if value in ("fused", "cudnn", "fp8"):
                raise ValueError(
                    f"{name} is {value}, which has no forward derivative, as prediction mean-velocity needs; leave it"
                    " out"
                )

    def check_kernels(self, mesh: Mesh, dtype: str, model: DiTConfig) -> None:
        """Raise ValueError if the devices of `mesh` cannot compute the blocks of `model` like this in `dtype`."""
        if self.kernels == "fused" and (model.norm, model.mlp) != ("layer", "gelu"):
            raise _no_fused_layers(f"norm {model.norm} and mlp {model.mlp}")
        device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
        for name, choice, other in (("kernels", self.kernels, "xla"), ("attention", self.attention, "auto")):
            if choice == "fused" and tensor > 1:
                raise ValueError(f"{name} is fused, which does not support mesh.tensor {tensor}; use {other}")
            if choice in ("fused", "cudnn") and device.platform != "gpu":
                raise ValueError(f"{name} is {choice}, which needs GPUs, not {device.platform}; use {other}")
        if self.matmul_dtype == "fp8":
            _check_fp8(device)
        width = model.hidden_size // model.num_heads
        supported = {"cudnn": cudnn_supports(jnp.dtype(dtype), width), "fused": dtype != "float32" and width <= 128}
        if not supported.get(self.attention, True):
            limits = {"cudnn": "whose width is a multiple of 8 up to 128", "fused": "up to 128 wide"}[self.attention]
            raise ValueError(
                f"attention is {self.attention}, which needs bfloat16 and heads {limits}, but the network computes in"
                f" {dtype} with heads {width} wide; use auto"
            )


def _apply_block(block: Any, x: Float[Array, "n d"], c: Float[Array, "*m d"], config: KernelConfig) -> Tokens:
    function = _BLOCKS.get(type(block))
    modern = isinstance(block.mlp, layers.SwiGLU) or isinstance(block.norm1, layers.RMSNorm) if function else False
    if modern and config.kernels == "fused":
        raise _no_fused_layers(f"a {type(block.norm1).__name__} and a {type(block.mlp).__name__}")
    if function:
        return function(block, x, c, operations(config))
    if config.kernels == "fused" or config.attention == "fused" or config.matmul_dtype == "fp8":
        raise ValueError(
            f"{type(block).__name__} has no fused or FP8 implementation; use kernels xla and attention xla"
        )
    return block(x, c)


def _no_fused_layers(layers: str) -> ValueError:
    return ValueError(f"kernels is fused, which has layer norms and MLPs with a GELU, not {layers}; use xla")


def _adaln_zero(block, x, c, ops):
    shift1, scale1, gate1, shift2, scale2, gate2 = split_modulation(_modulation(block, c), 6, c.size)
    x, y = ops.norm_modulate(x, shift1, scale1, norm=block.norm1)
    branch = _attention(block.attention, y, ops)
    x, y = ops.gate_norm_modulate(x, gate1, *branch, shift2, scale2, norm=block.norm2)
    return ops.gate_residual(x, gate2, *_mlp(block.mlp, y, ops))


def _adaln(block, x, c, ops):
    shift1, scale1, shift2, scale2 = split_modulation(_modulation(block, c), 4, c.size)
    x, y = ops.norm_modulate(x, shift1, scale1, norm=block.norm1)
    x, y = ops.norm_modulate(x + _summed(*_attention(block.attention, y, ops)), shift2, scale2, norm=block.norm2)
    return x + _summed(*_mlp(block.mlp, y, ops))


def _cross_attention(block, x, c, ops):
    x = x + _summed(*_attention(block.attention, _norm(block.norm1, x), ops))
    y, layer = _norm(block.norm2, x), block.cross_attention
    q, k, v = (
        _summed(ops.product(z, part.weight), part.bias) for z, part in ((y, layer.q), (c, layer.k), (c, layer.v))
    )
    q, k = (_head_by_head(z, norm, layer.num_heads) for z, norm in ((q, layer.q_norm), (k, layer.k_norm)))
    x = x + _summed(ops.product(ops.attend(q, k, v, layer.num_heads), layer.out.weight), layer.out.bias)
    return x + _summed(*_mlp(block.mlp, _norm(block.norm3, x), ops))


def _in_context(block, x, c, ops):
    x = x + _summed(*_attention(block.attention, _norm(block.norm1, x), ops))
    return x + _summed(*_mlp(block.mlp, _norm(block.norm2, x), ops))


_BLOCKS = {
    AdaLNZeroBlock: _adaln_zero,
    AdaLNBlock: _adaln,
    CrossAttentionBlock: _cross_attention,
    InContextBlock: _in_context,
}


def _summed(x, bias):
    return x + bias[None]


def _modulation(block, c):
    return matmul.product(jax.nn.silu(c), block.modulation.weight) + block.modulation.bias


def _attention(layer, x, ops):
    """Self-attention before its output bias is added, and that bias (with the values' bias folded in)."""

    # The projections are not saved for the backward pass, which has the weight itself.
    @partial(jax.checkpoint, prevent_cse=False)
    def project(weight, bias, x):
        q, k, v = (ops.product(x, weight[:, part]) for part in range(3))
        return q + bias[None], k, v

    # Two biases need no pass over the tokens. The keys' bias moves all logits of a query alike, and softmax ignores
    # it, unless a norm or a rotation is between the two. The values' bias passes through softmax, whose weights add up
    # to 1.
    q_bias, k_bias, v_bias = layer.qkv.bias
    q, k, v = project(layer.qkv.weight, q_bias, x)
    k = k if layer.k_norm is None and layer.grid is None else _summed(k, k_bias)
    q, k = (_head_by_head(z, norm, layer.num_heads, layer.grid) for z, norm in ((q, layer.q_norm), (k, layer.k_norm)))
    mixed = ops.attend(q, k, v, layer.num_heads)
    return ops.product(mixed, layer.out.weight), v_bias @ layer.out.weight + layer.out.bias


def _mlp(layer, x, ops):
    """The MLP before its output bias is added, and that bias."""
    if isinstance(layer, layers.SwiGLU):
        hidden = _swiglu(*(ops.product(x, layer.up.weight[:, half]) for half in range(2)), layer.up.bias)
    else:
        hidden = ops.bias_gelu(ops.product(x, layer.up.weight), layer.up.bias)
    return ops.product(hidden, layer.down.weight), layer.down.bias


# Element-wise passes by XLA. Each saves its inputs only.
_saving_inputs = partial(jax.checkpoint, prevent_cse=False)
_PLAIN_NORM = layers.LayerNorm(0, affine=False)


@_saving_inputs
def _norm(norm, x):
    return norm(x)


def _head_by_head(x, norm, num_heads, grid=None):
    if norm is None and grid is None:
        return x
    return partial(_saving_inputs, static_argnums=(2, 3))(layers.head_by_head)(x, norm, num_heads, grid)


@_saving_inputs
def _modulated(x, shift, scale, norm):
    return layers.modulate(norm(x), shift, scale)


def _norm_modulate(x, shift, scale, norm=_PLAIN_NORM):
    """The residual input and the modulated branch input."""
    return x, _modulated(x, shift, scale, norm)


def _gate_norm_modulate(x, gate, branch, bias, shift, scale, norm=_PLAIN_NORM):
    return _norm_modulate(_gate_residual(x, gate, branch, bias), shift, scale, norm)


@_saving_inputs
def _gate_residual(x, gate, branch, bias):
    return x + gate[None] * (branch + bias[None])


@jax.checkpoint  # with its barrier: XLA would otherwise save the derivative's parts in the forward pass
def _bias_gelu(x, bias):
    return jax.nn.gelu(x + bias[None], approximate=True)


@jax.checkpoint
def _swiglu(gate, value, bias):
    return jax.nn.silu(gate + bias[0][None]) * (value + bias[1][None])


_XLA = SimpleNamespace(
    norm_modulate=_norm_modulate,
    gate_norm_modulate=_gate_norm_modulate,
    gate_residual=_gate_residual,
    bias_gelu=_bias_gelu,
)


def operations(config: KernelConfig) -> SimpleNamespace:
    """The functions that a block is composed of. Imports Pallas, which takes a while, only for fused kernels."""
    passes: Any = _XLA
    if config.kernels == "fused":
        from ditx.kernels import elementwise

        def fused(name):  # with the norm of the paper only; diffusers' eps is computed by XLA
            pair = getattr(elementwise, name), getattr(_XLA, name)
            return lambda *xs, norm=_PLAIN_NORM: pair[0](*xs) if norm == _PLAIN_NORM else pair[1](*xs, norm)

        norms = {name: fused(name) for name in ("norm_modulate", "gate_norm_modulate")}
        passes = SimpleNamespace(gate_residual=elementwise.gate_residual, bias_gelu=elementwise.bias_gelu, **norms)
    product = fp8.product if config.matmul_dtype == "fp8" else matmul.product
    return SimpleNamespace(**vars(passes), product=product, attend=_attend(config.attention))


def _attend(choice: str) -> Callable[..., Any]:
    if choice == "xla":
        return layers.attend
    if choice == "fused":
        from ditx.kernels import attention

        return attention.attend

    def attend(q, k, v, num_heads):
        # jax.lax.platform_dependent would trace both branches, which fails where cuDNN is missing.
        on_gpu = jax.default_backend() == "gpu" and cudnn_supports(q.dtype, q.shape[-1] // num_heads)
        if choice == "auto" and not on_gpu:
            return layers.attend(q, k, v, num_heads)
        q, k, v = (rearrange(part, "n (heads k) -> n heads k", heads=num_heads) for part in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return rearrange(mixed, "n heads k -> n (heads k)")

    return attend


def cudnn_supports(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN's attention supports this dtype and heads of this width."""
    return dtype in (jnp.bfloat16, jnp.float16) and width <= 128 and width % 8 == 0


def _check_fp8(device: Any) -> None:
    if device.platform == "cpu":  # rounds as GPUs do, so that the loss in accuracy can be tried anywhere
        return
    if device.platform != "gpu":
        raise ValueError(f"matmul_dtype is fp8, which needs GPUs, not {device.platform}; use compute")
    major, _, minor = device.compute_capability.partition(".")
    if not major.isdecimal() or (int(major), int(minor or 0)) < (8, 9):  # AMD's has letters
        raise ValueError(
            "matmul_dtype is fp8, which needs NVIDIA GPUs of compute capability 8.9 or later (Ada, Hopper), not"
            f" {device.compute_capability} ({device.device_kind}); use compute"
        )
