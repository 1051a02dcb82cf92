"""The training step: an objective over a batch, the optimizer, and running averages of the weights."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from ditx.diffusion.objective import Objective, Terms
from ditx.nn.dit import DiT, DiTConfig, Remat
from ditx.nn.layers import PLAIN, Compute
from ditx.parallel import mesh as sharding
from ditx.training.ema import update_rate


class TrainState(eqx.Module):
    """All that a run carries from one step to the next; randomness and data follow from `step`."""

    step: Int[Array, ""]
    """updates made so far"""
    model: DiT
    ema: DiT
    """exponential moving average of the weights, from the initial ones on"""
    opt_state: optax.OptState
    power_emas: tuple[DiT, ...] = ()
    """averages by power profiles (`ditx.training.ema`), from which those of other lengths are made"""

    @classmethod
    def create(
        cls, config: DiTConfig, optimizer: optax.GradientTransformation, *, power_emas: int = 0, key: PRNGKeyArray
    ) -> "TrainState":
        """The state before the first step."""
        model: Any = DiT(config, key=key)
        # Copies, since the step donates all to the next.
        ema, *others = (jax.tree.map(jnp.copy, model) for _ in range(1 + power_emas))
        return cls(jnp.zeros((), jnp.int32), model, ema, optimizer.init(model), tuple(others))


def adamw(
    learning_rate: float | optax.Schedule, *, beta2: float = 0.999, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), with what the paper leaves at its usual values."""
    return optax.adamw(learning_rate, b1=0.9, b2=beta2, eps=1e-8, weight_decay=weight_decay)


def drop_label(y: Int[Array, ""], config: DiTConfig, *, key: PRNGKeyArray) -> Int[Array, ""]:
    """The null label with probability `label_dropout`, else `y` (Ho and Salimans 2022, Algorithm 1).

    Where there are no classes, the null label.
    """
    if config.null_label is None:
        return y
    if config.num_classes == 0:
        return jnp.zeros_like(y)
    return jnp.where(jax.random.bernoulli(key, config.label_dropout), config.null_label, y)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    key: PRNGKeyArray,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_gammas: tuple[float, ...] = (),
    dtype: jnp.dtype = jnp.float32,
    accumulate: int = 1,
    unroll: int = 1,
    remat: Remat = "none",
    compute: Compute = PLAIN,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Terms]:
    """One update from `batch` (`x`, float `b h w c` in [-1, 1]; `y`, integer `b`); `key` is that of the whole run.

    With `std` beside it, `x` is the mean of latents, of which every step draws a fresh sample. The network computes in
    `dtype`; weights, average, moments, objective and everything returned stay in float32. `accumulate` parts of the
    batch follow each other, and their gradients are added up; on a `mesh`, state and batch lie as `ditx.parallel.mesh`
    has them. Neither changes the result. `gammas` are the powers of the state's `profiles`. A step whose loss or gradient
    is not finite leaves all but `step` as it was.
    Returns the terms of the objective as means over the batch, `grad_norm`, and `skipped`: 1 after such a step, else 0.
    """
    config = state.model.config
    gather = sharding.make_gather(state.model, mesh, recomputed=remat != "none")
    keys = jax.random.split(jax.random.fold_in(key, state.step), batch["y"].shape[0])

    def mean_loss(model, rows):
        batch, keys = rows
        model = gather(jax.tree.map(lambda leaf: _gradient_at_once(leaf.astype(dtype)), model))

        def example(x0, std, y, key):
            label_key, key = jax.random.split(key)
            y = drop_label(y, config, key=label_key)
            if std is not None:
                posterior_key, key = jax.random.split(key)
                noise = jax.random.normal(posterior_key, x0.shape)
                x0 = x0.astype(jnp.float32) + std.astype(jnp.float32) * noise

            def predict(x, t):
                output = model(x.astype(dtype), t, y, compute=compute, unroll=unroll, remat=remat)
                return output.astype(jnp.float32)

            return objective(predict, x0, key)

        terms = jax.vmap(example)(batch["x"], batch.get("std"), batch["y"], keys)
        terms = jax.tree.map(lambda term: term.mean(0), terms)
        return terms["loss"], terms

    def mean_gradients(model, rows):
        gradients = jax.grad(mean_loss, has_aux=True)
        if accumulate == 1:
            return gradients(model, rows)
        parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), rows)
        shapes = jax.eval_shape(gradients, model, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(model, part)), None), zeros, parts
        )
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    model: Any = state.model  # optax's annotations know no modules
    shared = mean_gradients if mesh is None else sharding.data_parallel_mean(mean_gradients, model, mesh)
    grads, terms = shared(model, (batch, keys))
    updates, opt_state = optimizer.update(grads, state.opt_state, model)
    model = optax.apply_updates(model, updates)

    def moved(average, rate):
        return jax.tree.map(lambda average, new: average + rate * (new - average), average, model)

    ema, rates = moved(state.ema, 1 - ema_decay), [update_rate(state.step + 1, gamma) for gamma in ema_gammas]
    power_emas = tuple(moved(average, rate) for average, rate in zip(state.power_emas, rates, strict=True))
    terms |= {"grad_norm": optax.tree.norm(grads)}
    finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(terms["grad_norm"])
    before = (state.model, state.ema, state.opt_state, state.power_emas)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (model, ema, opt_state, power_emas), before)
    return TrainState(state.step + 1, *after), terms | {"skipped": 1.0 - finite}


@jax.custom_vjp
def _gradient_at_once(leaf):
    """`leaf`, whose gradient is written before it is used.

    Where blocks are unrolled, XLA would otherwise gather their gradients within the optimizer, once for each of the
    arrays that this updates: 60 bytes a weight rather than 38, and copies of the state.
    """
    return leaf


_gradient_at_once.defvjp(lambda leaf: (leaf, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))
