import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import x64

from ditx.diffusion.guidance import classifier_free

NULL = 7
X, T = np.random.default_rng(0).standard_normal((3, 3, 4)), 12.0
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


def labelled(x, t, y):
    """A network of 4 noise and 4 variance channels that reads all its arguments."""
    return jnp.concatenate([x * (1 + y) + t, jnp.cos(x * y)], -1)


def at(y):
    return labelled(jnp.asarray(X), jnp.asarray(T), y)


def guided(*, y=2, predict=labelled, null_label=NULL, **options):
    return classifier_free(predict, jnp.asarray(y), null_label=null_label, **options)(jnp.asarray(X), jnp.asarray(T))


@given(st.floats(-2, 9), st.integers(0, NULL))
@x64
def test_noise_moves_away_from_the_unlabelled_and_variance_never(scale, y):
    output = guided(y=y, scale=scale)
    close(output[..., :4], at(NULL)[..., :4] + scale * (at(y) - at(NULL))[..., :4])
    close(output[..., 4:], at(y)[..., 4:])


@x64
def test_scale_1_is_the_plain_network_called_once():
    calls = []

    def counting(x, t, y):
        calls.append(y)
        return labelled(x, t, y)

    np.testing.assert_array_equal(guided(predict=counting, scale=1.0), at(2))
    assert [int(y) for y in calls] == [2]
    close(guided(scale=jnp.asarray(1.0)), at(2))


def test_scale_may_be_a_whole_number():
    for scale in (1, 4):
        np.testing.assert_array_equal(guided(scale=scale), guided(scale=float(scale)))


@x64
def test_scale_0_is_the_unlabelled_noise():
    close(guided(scale=0.0)[..., :4], at(NULL)[..., :4])


@x64
def test_three_channels_may_be_guided_as_in_the_released_code():
    output = guided(scale=4.0, channels=3)
    close(output[..., :3], guided(scale=4.0)[..., :3])
    close(output[..., 3:], at(2)[..., 3:])


@x64
def test_network_without_variance_is_guided_whole():
    def noise_only(x, t, y):
        return x * y

    close(guided(predict=noise_only, scale=3.0), X * (NULL + 3.0 * (2 - NULL)))


@pytest.mark.parametrize("scale", [1.5, 0.0])
def test_guidance_without_null_label_is_refused(scale):
    with pytest.raises(
        ValueError, match=rf"guidance with scale {scale} needs a network with a null label.*use scale 1"
    ):
        guided(null_label=None, scale=scale)


def test_scale_1_needs_no_null_label():
    np.testing.assert_array_equal(guided(null_label=None, scale=1.0), at(2))


def test_a_traced_scale_is_compiled_once():
    traces = []

    @jax.jit
    def run(scale):
        traces.append(scale)
        return guided(scale=scale)

    for scale in (0.5, 1.0, 2.0):
        np.testing.assert_allclose(run(scale), guided(scale=jnp.asarray(scale)), rtol=1e-5, atol=1e-5)
    assert len(traces) == 1
