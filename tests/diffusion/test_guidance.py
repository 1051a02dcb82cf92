import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import random_dit

import ditx
from ditx.diffusion.guidance import classifier_free, guide
from ditx.diffusion.samplers import ddim_step, sample
from ditx.testing import x64

FULL = ditx.linear_schedule()
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
def test_guidance_moves_the_noise_and_never_the_variance(scale, y):
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
def test_guidance_of_the_first_three_channels_as_in_the_released_code():
    output = guided(scale=4.0, channels=3)
    close(output[..., :3], guided(scale=4.0)[..., :3])
    close(output[..., 3:], at(2)[..., 3:])


@x64
def test_network_without_variance_is_guided_on_all_channels():
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


@given(st.floats(-2, 9), st.sampled_from([None, 3]))
@x64
def test_guide_with_the_unlabelled_network_is_classifier_free_guidance(scale, channels):
    predict = guide(lambda x, t: labelled(x, t, 2), lambda x, t: labelled(x, t, NULL), scale=scale, channels=channels)
    close(predict(jnp.asarray(X), jnp.asarray(T)), guided(scale=scale, channels=channels))


@x64
def test_a_weaker_network_may_lack_the_variance():
    predict = guide(lambda x, t: labelled(x, t, 2), lambda x, t: labelled(x, t, NULL)[..., :4], scale=3.0)
    close(predict(jnp.asarray(X), jnp.asarray(T)), guided(scale=3.0))


@pytest.mark.parametrize(("interval", "inside"), [((12.0, 20.0), True), ((3.0, 12.0), True), ((12.5, 20.0), False)])
@x64
def test_guidance_is_limited_to_its_interval(interval, inside):
    close(guided(scale=3.0, interval=interval), guided(scale=3.0) if inside else at(2))


def test_weaker_network_is_not_run_outside_the_interval_even_in_a_batch():
    """Under vmap a condition turns into a selection between two results unless it is the same for the whole batch."""
    calls = []

    def weaker(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return jnp.sin(x)

    schedule = ditx.respace(FULL, [100, 300, 500, 700, 999])
    predict = guide(lambda x, t: jnp.cos(x), weaker, scale=2.0, interval=(200.0, 700.0))

    @jax.jit
    @jax.vmap
    def draw(x):
        return sample(ddim_step, predict, schedule, x, noises=jnp.zeros((5, 2, 2, 1)))[0]

    draw(jax.random.normal(jax.random.key(0), (3, 2, 2, 1)))
    jax.effects_barrier()
    assert sorted(set(calls)) == [300, 500, 700]


def test_guided_sampler_of_a_batch_compiles_to_a_branch():
    config = ditx.DiTConfig(4, 2, 1, 8, 1, 1, num_classes=2)

    def draw(model, x, y):
        predict = classifier_free(model, y, null_label=2, scale=2.0, interval=(200.0, 700.0))
        return sample(ddim_step, predict, ditx.respace(FULL, "10"), x, key=jax.random.key(0))[0]

    arguments = random_dit(config), jnp.zeros((3, 4, 4, 1)), jnp.zeros(3, jnp.int32)
    lowered = jax.jit(jax.vmap(draw, (None, 0, 0))).lower(*arguments).as_text()
    assert lowered.count("stablehlo.case") == 1
