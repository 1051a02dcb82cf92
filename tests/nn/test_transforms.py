"""Every transformation of JAX works on our modules: their traces contain JAX's own primitives only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import jet, sparse
from networks import BLOCKS, example, random_dit
from traced import equations

import ditx
from ditx.nn.blocks import AdaLNZeroBlock
from ditx.nn.layers import MLP, Attention, Linear, layer_norm
from ditx.testing import x64

CONFIG = ditx.DiTConfig(4, 2, 2, 8, 2, 2, num_classes=3)


def test_a_trace_has_primitives_of_jax_only():
    for block in BLOCKS:
        config = ditx.DiTConfig(4, 2, 2, 8, 2, 2, num_classes=3, block=block)
        traced = jax.make_jaxpr(jax.vmap(random_dit(config), (0, None, None)))(jnp.ones((5, 4, 4, 2)), 1.0, 2)
        modules = {type(equation.primitive).__module__ for equation, _ in equations(traced.jaxpr)}
        names = {equation.primitive.name for equation, _ in equations(traced.jaxpr)}
        assert all(module.startswith("jax.") for module in modules) and not names & {"product", "custom_vjp_call"}


@x64
def test_forward_derivatives_equal_differences_and_the_gradient():
    model, (x, t, y) = wide(random_dit(CONFIG)), example(CONFIG)
    x = x.astype(jnp.float64)
    direction = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
    output, tangent = jax.jvp(lambda x: model(x, t, y), (x,), (direction,))
    step = 1e-6
    ahead, behind = model(x + step * direction, t, y), model(x - step * direction, t, y)
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    (gradient,) = jax.vjp(lambda x: model(x, t, y), x)[1](output)
    np.testing.assert_allclose((gradient * direction).sum(), (output * tangent).sum(), rtol=1e-10)


@x64
def test_the_hessian_is_symmetric_and_equals_differences_of_gradients():
    model, (x, t, y) = wide(random_dit(CONFIG)), example(CONFIG)
    x = x.astype(jnp.float64).ravel()

    def loss(x):
        return jnp.square(model(x.reshape(4, 4, 2), t, y)).sum()

    hessian = jax.jit(jax.hessian(loss))(x)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-8, atol=1e-8)
    direction, step, gradient = jnp.ones_like(x), 1e-6, jax.grad(loss)
    difference = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(hessian @ direction, difference, rtol=1e-5, atol=1e-5)


def test_a_network_is_exported_with_a_symbolic_batch():
    model = random_dit(CONFIG)
    batch = export.symbolic_shape("b, 4, 4, 2")
    arguments = jax.ShapeDtypeStruct(batch, jnp.float32), jax.ShapeDtypeStruct(batch[:1], jnp.int32)
    exported = export.export(jax.jit(lambda x, y: jax.vmap(lambda x, y: model(x, 417.0, y))(x, y)))(*arguments)
    for count in (1, 5):
        x, y = jax.random.normal(jax.random.key(count), (count, 4, 4, 2)), jnp.arange(count, dtype=jnp.int32) % 3
        expected = jax.vmap(lambda x, y: model(x, 417.0, y))(x, y)
        np.testing.assert_allclose(exported.call(x, y), expected, rtol=1e-5, atol=1e-6)


def test_sparse_tokens_pass_through_a_layer():
    layer, x = Linear(8, 3, key=jax.random.key(0)), jnp.zeros((6, 8)).at[2, 3].set(1.5)
    y = sparse.sparsify(lambda x: layer(x))(sparse.BCOO.fromdense(x))
    np.testing.assert_allclose(y.todense() if isinstance(y, sparse.BCOO) else y, layer(x), rtol=1e-6)


def test_a_remat_policy_of_the_users_own_decides_what_is_saved():
    model, (x, t, y) = random_dit(CONFIG), example(CONFIG)

    def saved(policy):
        block = jax.checkpoint(lambda block, x, c: block(x, c), policy=policy)
        loss = lambda model: jnp.square(model(x, t, y, apply_block=block)).mean()  # noqa: E731 (a formula)
        traced = jax.make_jaxpr(jax.grad(loss))(model)
        return sum(equation.primitive.name == "dot_general" for equation, _ in equations(traced.jaxpr))

    everything, products, nothing = (
        saved(policy)
        for policy in (
            jax.checkpoint_policies.everything_saveable,
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.nothing_saveable,
        )
    )
    assert everything < products < nothing


@pytest.mark.parametrize("layer", ["linear", "norm", "mlp", "attention", "block"])
@x64
def test_jet_equals_nested_derivatives_of_a_layer(layer):
    key = jax.random.key(0)
    c = jax.random.normal(key, (8,))
    function = {
        "linear": Linear(8, 3, key=key),
        "norm": layer_norm,
        "mlp": MLP(8, 16, key=key),
        "attention": Attention(8, 2, key=key),
        "block": lambda x: wide(AdaLNZeroBlock(8, 2, 16, key=key))(x, c),
    }[layer]
    x, v = jax.random.normal(key, (2, 5, 8), jnp.float64)
    _, (first, second) = jet.jet(function, (x,), ((v, jnp.zeros_like(v)),))
    derivative = lambda x: jax.jvp(function, (x,), (v,))[1]  # noqa: E731 (a formula)
    np.testing.assert_allclose(first, derivative(x), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(second, jax.jvp(derivative, (x,), (v,))[1], rtol=1e-8, atol=1e-9)


def test_the_three_parts_of_a_network_are_the_network():
    model, (x, t, y) = random_dit(CONFIG), example(CONFIG)
    tokens, condition = model.embed(x, t, y)
    halfway = model.run(tokens, condition, blocks=slice(0, 1))
    tokens = model.run(halfway, condition, blocks=slice(1, None))
    np.testing.assert_allclose(model.unembed(tokens, condition), model(x, t, y), rtol=1e-6, atol=1e-6)


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)
