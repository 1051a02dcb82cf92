"""Products in FP8: how far they are from exact ones, and where they are exact. CPUs round as GPUs do."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import BLOCKS, example, random_dit

import ditx
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.kernels import fp8
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import call_block
from ditx.parallel import fsdp
from ditx.parallel import mesh as sharding
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training.step import TrainState, recompute, train_step

FP8 = KernelConfig(matmul_dtype="fp8").apply_block()


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@jax.jit
def pulled_back(x, w, gradient):
    """The products of examples with one weight, and what the gradient of these sends back to both."""
    y, back = jax.vjp(lambda x, w: jax.vmap(fp8.product, (0, None))(x, w), x, w)
    return y, *back(gradient)


def exact(x, w, gradient):
    """The same of float64 arrays, unrounded."""
    x, w, gradient = (np.asarray(array, np.float64) for array in (x, w, gradient))
    return x @ w, gradient @ w.T, np.einsum("bni,bno->io", x, gradient)


def rounded(x):
    """The rounding, once more, in NumPy."""
    x = np.asarray(x, np.float64)
    scale = 2.0 ** np.round(np.log2(np.abs(x).max())) / 256
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def arguments(dtype=jnp.float32):
    return draw(4, 32, 48, dtype=dtype), draw(48, 80, seed=1, dtype=dtype), draw(4, 32, 80, seed=2, dtype=dtype)


# In bfloat16, results are rounded once more, to 8 bits.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_products_and_both_gradients_are_of_rounded_factors_and_else_exact(dtype, tolerance):
    ours = pulled_back(*arguments(dtype))
    for one, other in zip(ours, exact(*map(rounded, arguments(dtype))), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=tolerance, atol=1e-6 * np.abs(other).max())


def test_products_and_both_gradients_are_off_by_less_than_the_rounding_of_one_factor():
    for one, other in zip(pulled_back(*arguments()), exact(*arguments()), strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        # Half a unit in the last of 4 bits is at most 2^-4 of a number, and 2^-4 / sqrt(6) or so in the mean; there are
        # two factors, and of many terms the errors are of any sign.
        assert 2**-6 < error < 2**-4


FLOATS = st.floats(-4, 4, width=32)


@given(hnp.arrays(np.float32, (3, 5), elements=FLOATS), hnp.arrays(np.float32, (5, 2), elements=FLOATS))
def test_no_product_is_further_off_than_the_rounding_of_its_factors(x, w):
    def bound(x):  # half a unit in the last of 4 bits, or of the smallest numbers that there are
        return np.maximum(2.0**-4 * np.abs(x), np.abs(x).max() * 2.0**-10 / 192 + 2.0**-117)

    allowed = bound(x) @ np.abs(w) + np.abs(x) @ bound(w) + bound(x) @ bound(w)
    error = np.abs(np.float64(jax.jit(fp8.product)(x, w)) - np.float64(x) @ np.float64(w))
    assert (error <= allowed + 1e-5).all()


def test_what_eight_bits_hold_is_multiplied_exactly():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-15, 16, shape).astype(np.float32) for shape in [(4, 32, 48), (48, 80), (4, 32, 80)]]
    for one, other in zip(pulled_back(*arrays), exact(*arrays), strict=True):
        np.testing.assert_array_equal(one, other)


@given(st.lists(st.integers(-30, 30), min_size=3, max_size=3))
def test_powers_of_two_go_through(powers):
    scaled = pulled_back(*(array * 2.0**power for array, power in zip(arguments(), powers, strict=True)))
    x, w, gradient = powers
    for one, other, power in zip(scaled, pulled_back(*arguments()), (x + w, gradient + w, x + gradient), strict=True):
        np.testing.assert_array_equal(one, other * 2.0**power)


def test_a_batch_has_one_scale_however_it_is_nested():
    x, w, gradient = arguments()
    x, gradient = (
        x * 2.0 ** -jnp.arange(0, 24, 6)[:, None, None],
        gradient * 2.0 ** -jnp.arange(0, 24, 6)[:, None, None],
    )
    whole = pulled_back(x[None].reshape(1, -1, 48), w, gradient.reshape(1, -1, 80))
    assert (whole[0].reshape(4, 32, 80)[3] == 0).all()  # next to nothing beside the first
    assert jnp.abs(fp8.product(x[3], w)).max() > 0
    nested = jax.vmap(jax.vmap(fp8.product, (0, None)), (0, None))
    y, back = jax.vjp(nested, x.reshape(2, 2, 32, 48), w)
    for batched in (pulled_back(x, w, gradient), (y, *back(gradient.reshape(2, 2, 32, 80)))):
        for one, other in zip(batched, whole, strict=True):
            np.testing.assert_allclose(one.ravel(), other.ravel(), rtol=0, atol=1e-6 * jnp.abs(other).max())


def test_zeros_are_zeros():
    x, w, gradient = arguments()
    for arrays in [(x, w, 0 * gradient), (0 * x, w, gradient), (x, 0 * w, gradient), (0 * x, 0 * w, 0 * gradient)]:
        for one, other in zip(pulled_back(*arrays), exact(*arrays), strict=True):
            assert jnp.isfinite(one).all()
            assert ((one == 0) == (other == 0)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_shows(value, dtype):
    x, w, gradient = arguments(dtype)
    for arrays in [
        (x.at[1, 2, 3].set(value), w, gradient),
        (x, w.at[2, 3].set(value), gradient),
        (x, w, gradient.at[1, 2, 3].set(value)),
    ]:
        for one, other in zip(pulled_back(*arrays), exact(*arrays), strict=True):
            assert not (np.isfinite(one) & ~np.isfinite(other)).any()  # all that is lost in exact products, at least


CONFIG = ditx.DiTConfig(8, 4, 2, 32, 2, 8, num_classes=7)
OPTIMIZER = optax.sgd(1e-2)


@cache
def step_of(**options):
    objective = make_objective(ObjectiveConfig())
    step = partial(train_step, objective=objective, optimizer=OPTIMIZER, ema_decay=0.9, apply_block=FP8)
    return jax.jit(partial(step, **options))


def state_of():
    model = random_dit(CONFIG)
    return TrainState(jnp.zeros((), jnp.int32), model, model, OPTIMIZER.init(model))


def batch_of(size=16):
    return {"x": draw(size, 8, 8, 2), "y": jnp.arange(size, dtype=jnp.int32) % 7}


def test_an_update_that_is_not_finite_is_skipped():
    state, batch = state_of(), batch_of()
    for x, skipped in [(batch["x"], 0), (batch["x"].at[3, 1, 2, 0].set(np.inf), 1)]:
        after, terms = step_of()(state, batch | {"x": x}, jax.random.key(1))
        assert terms["skipped"] == skipped == (not np.isfinite(terms["loss"]))
        unchanged = [
            bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (after.model, state.model)), strict=True)
        ]
        assert all(unchanged) == bool(skipped)


def test_a_new_network_whose_gates_are_closed_learns():
    state = TrainState.create(CONFIG, OPTIMIZER, key=jax.random.key(0))
    for _ in range(3):
        state, terms = step_of()(state, batch_of(), jax.random.key(1))
        assert terms["skipped"] == 0 and jnp.isfinite(terms["grad_norm"])


# (q, k, v, out, up, down), of two factors each, and cross-attention's four.
@pytest.mark.parametrize("block", BLOCKS)
def test_only_products_with_the_weights_of_blocks_are_rounded(block):
    config = ditx.DiTConfig(6, 2, 3, 24, 2, 2, num_classes=10, block=block)
    traced = str(jax.make_jaxpr(partial(ditx.DiT.__call__, apply_block=FP8))(random_dit(config), *example(config)))
    assert traced.count("new_dtype=float8") == (20 if block == "cross-attention" else 12)
    assert "float8" not in str(jax.make_jaxpr(ditx.DiT.__call__)(random_dit(config), *example(config)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "remat", "unroll"),
    [("adaln-zero", "dots", 1), ("adaln", "full", 1), ("cross-attention", "none", 2), ("in-context", "none", 1)],
)
def test_networks_are_near_plain_ones_recomputed_or_not(block, remat, unroll):
    config = ditx.DiTConfig(6, 2, 3, 24, 2, 2, num_classes=10, block=block)
    model, (x, t, y) = random_dit(config, scale=0.2), example(config)
    x = jnp.stack([x, -x])

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def gradient(model, apply_block=call_block, remat="none", unroll=1):
        def loss(model):
            apply = recompute(apply_block, remat, unroll=unroll)
            return jnp.square(jax.vmap(lambda x: model(x, t, y, apply_block=apply, unroll=unroll))(x)).mean()

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(model))])

    ours = gradient(model, FP8, remat, unroll)
    reference = gradient(model, FP8)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * jnp.abs(reference).max())
    plain = gradient(model)
    # Four products in a row, each off by some 2^-5 in norm, and what norms and attention make of that.
    assert 2**-8 < jnp.linalg.norm(ours - plain) / jnp.linalg.norm(plain) < 2**-2


def test_a_product_keeps_the_axes_of_a_weight():
    x, weight = draw(5, 8), draw(8, 3, 16)
    exact = jnp.tensordot(x, weight, 1)
    assert fp8.product(x, weight).shape == exact.shape == (5, 3, 16)
    np.testing.assert_allclose(fp8.product(x, weight), exact, atol=0.1 * jnp.abs(exact).max())


def moved(state):
    """By how much the weights went."""
    apart = jax.tree.map(lambda after, before: np.ravel(after - before), state.model, state_of().model)
    return np.concatenate(jax.tree.leaves(apart))


@pytest.mark.slow
def test_a_step_on_eight_devices_is_that_on_one():
    batch, key = batch_of(), jax.random.key(1)
    alone, terms = step_of()(state_of(), batch, key)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = fsdp.with_shardings(state_of(), mesh)
    state = jax.tree.map(lambda leaf, place: sharding.shard_host_array(leaf, place.sharding), state_of(), placed)
    rows = sharding.local_batch_indices(mesh, 16)
    eight, others = step_of(mesh=mesh)(state, sharding.put_batch(batch, mesh, rows, 16), key)
    # Scales of powers of two round alike, but for what is next to nothing beside the largest, and for sums in another
    # order, by which what is halfway between two numbers of 8 bits may go to the other.
    np.testing.assert_allclose(others["loss"], terms["loss"], rtol=1e-3)
    assert np.linalg.norm(moved(eight) - moved(alone)) < 2e-3 * np.linalg.norm(moved(alone))
