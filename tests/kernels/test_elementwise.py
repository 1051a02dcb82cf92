"""Our kernels, run by Pallas' interpreter, against the functions that they stand for; and lowered for a GPU."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import BLOCKS, example, random_dit
from references import assert_close

import ditx
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.kernels.block import KernelConfig, operations
from ditx.nn.blocks import AdaLNZeroBlock
from ditx.training.step import TrainState, adamw, recompute, train_step

# By name: which arguments are tokens (t), and which vectors that each example has its own of (v) or all share (w).
KINDS = {"norm_modulate": "tvv", "gate_norm_modulate": "tvtwvv", "gate_residual": "tvtw", "bias_gelu": "tw"}
NAMES = pytest.mark.parametrize("name", KINDS)


def draw(name, batch, n, d, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"t": (batch, n, d), "v": (batch, d), "w": (d,)}
    return [jnp.asarray(rng.standard_normal(shapes[kind]), dtype) for kind in KINDS[name]]


def batched(name, kernels):
    function = getattr(operations(KernelConfig(kernels)), name)
    return jax.vmap(function, [None if kind == "w" else 0 for kind in KINDS[name]])


def pull_back(function, arguments, seed=1):
    """Results, and what random gradients of these, in their own type, send back."""
    results, back = jax.vjp(function, *arguments)
    rng = np.random.default_rng(seed)
    sent = jax.tree.map(lambda result: jnp.asarray(rng.standard_normal(result.shape), result.dtype), results)
    return jax.tree.leaves((results, back(sent)))


# Widths that are no powers of two, in one part and in several; tokens that do not fill the last block.
@NAMES
@pytest.mark.parametrize(("n", "d"), [(49, 1152), (258, 72)])
def test_values_and_gradients_equal_the_plain_ones(name, n, d):
    arguments = draw(name, 2, n, d)
    ours = jax.jit(lambda *a: pull_back(batched(name, "fused"), a))(*arguments)
    plain = jax.jit(lambda *a: pull_back(batched(name, "xla"), a))(*arguments)
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        assert_close(one, other, 1e-5)


def exact(name, *arguments):
    """The plain function in float32, but that sums are stored in bfloat16, as both networks store them."""
    if name == "gate_norm_modulate":
        x, gate, branch, bias, shift, scale = arguments
        total = x + gate[:, None] * (branch + bias)
        stored = total + jax.lax.stop_gradient(total.astype(jnp.bfloat16).astype(jnp.float32) - total)
        return total, batched("norm_modulate", "xla")(stored, shift, scale)[1]
    return batched(name, "xla")(*arguments)


@NAMES
def test_in_bfloat16_only_results_are_rounded(name):
    arguments = draw(name, 2, 33, 72, jnp.bfloat16)
    ours = pull_back(batched(name, "fused"), arguments)
    wide = [argument.astype(jnp.float32) for argument in arguments]
    results, back = jax.vjp(partial(exact, name), *wide)
    rng = np.random.default_rng(1)
    sent = [jnp.asarray(rng.standard_normal(leaf.shape), jnp.bfloat16) for leaf in jax.tree.leaves(results)]
    gradients = back(jax.tree.unflatten(jax.tree.structure(results), [leaf.astype(jnp.float32) for leaf in sent]))
    for one, other in zip(ours, jax.tree.leaves((results, gradients)), strict=True):
        assert one.dtype == jnp.bfloat16
        other = np.asarray(other)
        # Half a unit in the last of 8 bits; a bias's gradient is rounded once for each example, too.
        atol = 2**-8 * np.abs(other).max() if other.ndim == 1 else 1e-5
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8, atol=atol)


def test_gelu_is_finite_far_from_zero():
    x = jnp.asarray([[-1e4, -60.0, 60.0, 1e4]])
    ours = pull_back(operations(KernelConfig("fused")).bias_gelu, (x, jnp.zeros(4)))
    plain = pull_back(operations(KernelConfig()).bias_gelu, (x, jnp.zeros(4)))
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "remat"), [("adaln-zero", "dots"), *((block, "full" if block == "adaln" else "none") for block in BLOCKS)]
)
def test_networks_equal_plain_ones_recomputed_or_not(block, remat):
    config = ditx.DiTConfig(6, 2, 3, 24, 2, 2, num_classes=10, block=block)
    model, (x, t, y) = random_dit(config), example(config)

    @partial(jax.jit, static_argnames=("kernels", "remat"))
    def gradient(model, kernels, remat="none"):
        apply_block = recompute(KernelConfig(kernels).apply_block(), remat)

        def loss(model):
            return jnp.square(jax.vmap(lambda x: model(x, t, y, apply_block=apply_block))(x[None])).mean()

        return jax.value_and_grad(loss)(model)

    expected = jax.tree.leaves(gradient(model, "xla"))
    largest = max(np.abs(leaf).max() for leaf in expected[1:])
    for one, other in zip(jax.tree.leaves(gradient(model, "fused", remat)), expected, strict=True):
        # The gradient of a key's bias is 0 but for rounding, since it moves all logits of a query alike.
        np.testing.assert_allclose(one, other, rtol=0, atol=max(1e-5 * np.abs(other).max(), 1e-7 * largest))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-B/2", "DiT-S/2"])
def test_a_block_and_its_gradient_lower_to_eight_launches_for_all_examples(name):
    config, batch = ditx.DIT_CONFIGS[name], 128
    width = config.hidden_size
    block = partial(AdaLNZeroBlock, width, config.num_heads, config.mlp_size)
    shapes = jax.eval_shape(lambda key: block(key=key), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    x, c = (jax.ShapeDtypeStruct((batch, *shape, width), jnp.bfloat16) for shape in [(config.num_tokens,), ()])

    apply_block = KernelConfig("fused").apply_block()

    def loss(block, x, c):
        return jnp.square(jax.vmap(lambda x, c: apply_block(block, x, c))(x, c).astype(jnp.float32)).sum()

    # Newer versions of JAX ask which GPU it is to be for.
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shapes, x, c)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    grids = re.findall(r"grid_x = (\d+) : i32, grid_y = (\d+) : i32, grid_z = (\d+) : i32", lowered)
    hidden = -(-config.mlp_size // 512)
    assert sorted(grids) == sorted([("8", "1", "128")] * 6 + [("8", str(hidden), "128")] * 2)


def test_norms_with_weights_stay_plain():
    config = dataclasses.replace(ditx.DIT_CONFIGS["DiT-S/8"], depth=1, block="in-context")
    shapes = jax.eval_shape(lambda key: ditx.DiT(config, key=key), jax.random.key(0))
    x, t, y = jax.ShapeDtypeStruct((32, 32, 4), jnp.float32), 0.0, 0
    traced = str(
        jax.make_jaxpr(partial(ditx.DiT.__call__, apply_block=KernelConfig("fused").apply_block()))(shapes, x, t, y)
    )
    assert traced.count("platform_index") == 1


@pytest.mark.slow
def test_losses_agree_over_200_steps_in_bfloat16(optimized):
    config = ditx.DiTConfig(8, 2, 3, 24, 2, 2, num_classes=10)
    optimizer, objective = adamw(1e-3), make_objective(ObjectiveConfig())
    key = jax.random.key(0)
    x = jnp.tanh(jax.random.normal(key, (8, 8, 8, 3)))
    batch = {"x": x, "y": jnp.arange(8)}

    def losses(kernels, dtype):
        step = partial(train_step, objective=objective, optimizer=optimizer, ema_decay=0.9, dtype=jnp.dtype(dtype))

        @jax.jit
        def run(state):
            def body(state, _):
                state, terms = step(state, batch, key, apply_block=kernels.apply_block())
                return state, terms["loss"]

            return jax.lax.scan(body, state, length=200)[1]

        return np.asarray(run(TrainState.create(config, optimizer, key=key)))

    exact, plain = losses(KernelConfig(), jnp.float32), losses(KernelConfig(), jnp.bfloat16)
    fused = losses(KernelConfig("fused", "fused"), jnp.bfloat16)
    assert plain[-20:].mean() < 0.6 * plain[:20].mean()
    # No further from plain bfloat16 than twice what that is from float32, by its typical step.
    noise = np.abs(plain - exact)
    assert np.abs(fused - plain).mean() <= 2 * noise.mean()
    assert abs((fused - plain).mean()) <= noise.mean()
