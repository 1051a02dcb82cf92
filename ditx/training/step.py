"""The training step: an objective over a batch, the optimizer, and running averages of the weights."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from ditx.checks import any_mesh, check_choice
from ditx.diffusion.objective import Objective, Terms
from ditx.nn.dit import ApplyBlock, DiT, DiTConfig, call_block
from ditx.parallel import fsdp
from ditx.training.ema import update_rate

Remat: TypeAlias = Literal["none", "dots", "full"]
Optimizer: TypeAlias = optax.GradientTransformation


class TrainState(eqx.Module):
    """State that a run carries from one step to the next. Randomness and data follow from `step`."""

    step: Int[Array, ""]
    """number of updates so far"""
    model: DiT
    ema: DiT
    """exponential moving average of the weights, starting at the initial weights"""
    opt_state: optax.OptState
    power_emas: tuple[DiT, ...] = ()
    """averages with power profiles (`ditx.training.ema`), from which averages of any length are reconstructed"""

    @classmethod
    def create(cls, config: DiTConfig, optimizer: Optimizer, *, power_emas: int = 0, key: PRNGKeyArray) -> "TrainState":
        """The state before the first step."""
        model: Any = DiT(config, key=key)
        # Copies, because each step donates the whole state to the next.
        ema, *others = (jax.tree.map(jnp.copy, model) for _ in range(1 + power_emas))
        return cls(jnp.zeros((), jnp.int32), model, ema, optimizer.init(model), tuple(others))


def adamw(
    learning_rate: float, *, warmup: int = 0, decay_steps: int = 0, beta2: float = 0.999, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), with the paper's beta1 and epsilon.

    The learning rate rises linearly over `warmup` steps and then stays constant. With `decay_steps`, it is also
    multiplied by a half cosine that falls from 1 at step 0 to 0 at step `decay_steps`.
    """
    decay = optax.cosine_decay_schedule(1.0, decay_steps) if decay_steps else optax.constant_schedule(1.0)

    def rate(step):
        return learning_rate * decay(step) * jnp.minimum(1, (step + 1) / max(warmup, 1))

    return optax.adamw(rate, b1=0.9, b2=beta2, eps=1e-8, weight_decay=weight_decay)


def drop_label(y: Int[Array, ""], config: DiTConfig, *, key: PRNGKeyArray) -> Int[Array, ""]:
    """The null label with probability `label_dropout`, else `y` (Ho and Salimans 2022, Algorithm 1).

    An unconditional network always gets its null label.
    """
    if config.null_label is None:
        return y
    if config.num_classes == 0:
        return jnp.zeros_like(y)
    return jnp.where(jax.random.bernoulli(key, config.label_dropout), config.null_label, y)


def recompute(apply_block: ApplyBlock, kind: Remat, *, unroll: int = 1) -> ApplyBlock:
    """Recompute a block in the backward pass: nothing, all but its products with weights ("dots"), or all ("full")."""
    check_choice("remat", kind, get_args(Remat))
    if kind == "none":
        return apply_block
    policy = _is_product if kind == "dots" else None
    # Within a loop nothing can be merged with the forward pass, and barriers against merging cost time.
    return jax.checkpoint(apply_block, policy=policy, prevent_cse=unroll > 1)


def _is_product(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    of_batch = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "product" or of_batch(primitive, *arguments, **parameters)


@any_mesh
def train_step(
    state: TrainState,
    batch: dict[str, Array],
    key: PRNGKeyArray,
    *,
    objective: Objective,
    optimizer: Optimizer,
    ema_decay: float,
    ema_warmup: bool = False,
    ema_gammas: tuple[float, ...] = (),
    dtype: jnp.dtype = jnp.float32,
    accumulate: int = 1,
    apply_block: ApplyBlock = call_block,
    remat: Remat = "none",
    unroll: int = 1,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Terms]:
    """One update from `batch` (`x`, float `b h w c` in [-1, 1]; `y`, integer `b`). `key` is the key of the whole run.

    If the batch has `std`, `x` is the mean of latents, and each step draws a fresh sample. The network computes in
    `dtype`; weights, averages, moments, losses and results stay in float32. Gradients of `accumulate` parts of the
    batch are averaged. On a `mesh`, state and batch have the shardings of `ditx.parallel`. Neither changes the result.
    With `ema_warmup` the decay after `t` updates is at most (1 + t) / (10 + t). `ema_gammas` belong to `power_emas`.

    Returns the new state and the terms of the objective as means over the batch, with `grad_norm` and `skipped`. A step
    whose loss or gradient is not finite changes nothing but `step`, and its `skipped` is 1.
    """
    config = state.model.config
    batch_keys = jax.random.split(jax.random.fold_in(key, state.step), batch["y"].shape[0])
    gather = fsdp.make_gather(state.model, mesh)
    apply_block = fsdp.gather_blocks(apply_block, state.model, mesh, recomputed=remat != "none")
    network = {"apply_block": recompute(apply_block, remat, unroll=unroll), "unroll": unroll}

    def mean_loss(model, rows):
        model = gather(jax.tree.map(lambda leaf: _materialize_gradient(leaf.astype(dtype)), model))

        def predict_as(y):
            return lambda x, t, *duration: model(x.astype(dtype), t, y, *duration, **network).astype(jnp.float32)

        def example(x0, std, y, key):
            x0, y, key = _draw_example(x0, std, y, config, key)
            return objective(predict_as(y), x0, key, *_unconditional(objective, predict_as, y, config.null_label))

        batch, keys = rows
        terms = jax.tree.map(lambda a: a.mean(0), jax.vmap(example)(batch["x"], batch.get("std"), batch["y"], keys))
        return terms["loss"], terms

    gradients = _accumulated(jax.grad(mean_loss, has_aux=True), accumulate)
    model: Any = state.model  # optax's type annotations exclude modules
    if mesh is not None:
        gradients = fsdp.data_parallel_mean(gradients, model, mesh)
    grads, terms = gradients(model, (batch, batch_keys))
    updates, opt_state = optimizer.update(grads, state.opt_state, model)
    model = optax.apply_updates(model, updates)
    after = (model, *_move_averages(state, model, ema_decay, ema_warmup, ema_gammas), opt_state)
    before = (state.model, state.ema, state.power_emas, state.opt_state)
    terms |= {"grad_norm": optax.tree.norm(grads)}
    finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(terms["grad_norm"])
    model, ema, power_emas, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return TrainState(state.step + 1, model, ema, opt_state, power_emas), terms | {"skipped": 1.0 - finite}


def _unconditional(objective: Objective, predict_as: Any, y: Array, null_label: int | None) -> tuple[Any, ...]:
    """The arguments of an objective that trains guidance in: the prediction without the label, and y has none."""
    if "unconditional" not in inspect.signature(objective).parameters:
        return ()
    return None if null_label is None else predict_as(null_label), y == null_label


def _move_averages(
    state: TrainState, model: Any, ema_decay: float, ema_warmup: bool, ema_gammas: tuple[float, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """The exponential moving average and the power EMAs after an update to `model`."""

    def move(average, rate):
        return jax.tree.map(lambda average, new: average + rate * (new - average), average, model)

    rates = [update_rate(state.step + 1, gamma) for gamma in ema_gammas]
    power_emas = tuple(move(average, rate) for average, rate in zip(state.power_emas, rates, strict=True))
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)) if ema_warmup else ema_decay
    return move(state.ema, 1 - decay), power_emas


def _draw_example(x0, std, y, config: DiTConfig, key: PRNGKeyArray):
    """The image, the label or the null label, and the key of the objective, for one example of a batch."""
    label_key, key = jax.random.split(key)
    y = drop_label(y, config, key=label_key)
    if std is not None:
        posterior_key, key = jax.random.split(key)
        noise = jax.random.normal(posterior_key, x0.shape)
        x0 = x0.astype(jnp.float32) + std.astype(jnp.float32) * noise
    return x0, y, key


def _accumulated(gradients: Callable[[Any, Any], Any], count: int) -> Callable[[Any, Any], Any]:
    """`gradients(model, batch)` as the mean over `count` equal parts of the batch, one after another."""
    if count == 1:
        return gradients

    def accumulated(model, rows):
        parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), rows)
        shapes = jax.eval_shape(gradients, model, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(model, part)), None), zeros, parts
        )
        return jax.tree.map(lambda leaf: leaf / count, total)

    return accumulated


@jax.custom_vjp
def _materialize_gradient(leaf):
    """Identity whose gradient is materialised by an optimization barrier.

    With unrolled blocks, XLA would otherwise collect their gradients inside the optimizer, once for each array that it
    updates: 60 bytes a weight instead of 38, and copies of the state.
    """
    return leaf


_materialize_gradient.defvjp(lambda leaf: (leaf, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))
