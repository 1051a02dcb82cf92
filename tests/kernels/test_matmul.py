"""The product of tokens with a weight is that of `jnp.tensordot`, in whatever order JAX transforms it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from traced import equations

from ditx.kernels.matmul import product
from ditx.testing import x64


def reference(x, weight):
    return jnp.tensordot(x, weight, 1)


def loss(multiply):
    return lambda weight, x: jnp.square(jnp.sin(multiply(x, weight))).sum()


def of_batch(function):
    return jax.vmap(function, (None, 0))


TRANSFORMED = {
    "a gradient": lambda f: jax.grad(f, (0, 1)),
    "the gradient of a batch": lambda f: jax.grad(lambda weight, x: of_batch(f)(weight, x).sum(), (0, 1)),
    "a gradient for each example": lambda f: of_batch(jax.grad(f, (0, 1))),
    "the gradient of batches": lambda f: jax.grad(lambda weight, x: of_batch(of_batch(f))(weight, x[None]).sum()),
    "a weight for each example": lambda f: jax.vmap(jax.grad(f), (0, None)),
    "tokens for examples": lambda f: jax.grad(lambda weight, x: jax.vmap(f, (None, 1))(weight, x).sum(), (0, 1)),
    "a derivative": lambda f: lambda weight, x: jax.jvp(f, (weight, x), (2 * weight, x)),
    "the derivative of a batch": lambda f: lambda weight, x: jax.jvp(of_batch(f), (weight, x), (weight, 3 * x)),
    "second derivatives": jax.hessian,
    "the gradient of what is recomputed": lambda f: jax.grad(lambda w, x: of_batch(jax.checkpoint(f))(w, x).sum()),
}


@pytest.mark.parametrize("out", [(3,), (3, 2)])
@pytest.mark.parametrize("name", TRANSFORMED)
@x64
def test_it_is_transformed_as_the_plain_product_is(name, out):
    numbers = np.random.default_rng(0).standard_normal
    weight, x = jnp.asarray(numbers((5, *out))), jnp.asarray(numbers((2, 4, 5)))
    if name == "a weight for each example":
        weight, x = jnp.stack([weight, 2 * weight]), x[0]
    ours, plain = (TRANSFORMED[name](loss(f)) for f in (product, reference))
    for transform in (lambda f: f, jax.jit):
        found, expected = (transform(f)(weight, x) for f in (ours, plain))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (0, 5)])
@pytest.mark.parametrize(("a", "b"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_shapes_and_types_are_those_of_the_plain_product(shape, a, b):
    x, weight = jnp.ones(shape, a), jnp.ones((5, 3), b)
    assert jax.typeof(product(x, weight)) == jax.typeof(reference(x, weight))
    back = jax.grad(lambda x, weight: product(x, weight).sum(), (0, 1))(x, weight)
    assert [leaf.dtype for leaf in back] == [a, b]
    with pytest.raises(TypeError):
        product(jnp.ones(4), weight)


def test_a_batch_is_a_matrix_forward_and_backward():
    weight, x = jnp.ones((5, 3)), jnp.ones((2, 4, 5))
    traced = jax.make_jaxpr(jax.grad(lambda weight, x: jax.vmap(product, (0, None))(x, weight).sum(), (0, 1)))(
        weight, x
    )
    factors = [
        tuple(factor.aval.shape for factor in equation.invars)
        for equation, _ in equations(traced.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert set(factors) == {((8, 5), (5, 3)), ((8, 3), (8, 5)), ((8, 3), (5, 3))}


def test_there_may_be_nothing_to_add_up():
    assert not jax.vmap(product, (0, None))(jnp.ones((2, 4, 0)), jnp.ones((0, 3))).any()


@pytest.mark.parametrize("around", [lambda f: f, lambda f: jax.vmap(jax.checkpoint(f), (0, None))])
def test_the_precision_asked_for_is_that_of_all_products(around):
    def asked(x, weight):
        with jax.default_matmul_precision("highest"):
            return around(product)(x, weight).sum()

    text = jax.jit(jax.grad(asked, (0, 1))).lower(jnp.ones((2, 4, 5)), jnp.ones((5, 3))).as_text()
    assert text.count("precision = [HIGHEST, HIGHEST]") == text.count("dot_general") == 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_goes_into_other_peoples_meshes(kind):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(kind,), devices=jax.devices()[:2])
    numbers = np.random.default_rng(1).standard_normal
    weight, x = numbers((5, 3)).astype("float32"), numbers((2, 4, 5)).astype("float32")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("rows")))
        tokens = jax.device_put(x, NamedSharding(mesh, P(None, "rows")))
        whole = jax.device_put(weight, NamedSharding(mesh, P()))
        split = jax.shard_map(product, in_specs=(P("rows"), P()), out_specs=P("rows"))
        for function in (product, jax.vmap(product, (0, None)), split):
            y = jax.jit(function)(placed, whole)
            assert y.sharding.spec[0] == "rows"
            np.testing.assert_allclose(y, reference(x, weight), rtol=1e-5, atol=1e-5)
        y = jax.jit(jax.vmap(product, (0, None)))(tokens, whole)
        np.testing.assert_allclose(y, reference(x, weight), rtol=1e-5, atol=1e-5)
