import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import assert_close, chw, formula, hwc, load, tiny_vae

import ditx
from ditx.nn.vae import sample_posterior

vae_tiny = functools.cache(tiny_vae)


@functools.cache
def full_size():
    shapes = load("vae_sd_state_dict_shapes.json")
    return ditx.weights.convert.vae_from_torch(
        {name: formula(name, shape) for name, shape in shapes.items()}, ditx.VAEConfig()
    )


@jax.jit
def encode(model, image):
    return model.encode(image)


@jax.jit
def decode(model, latent):
    return model.decode(latent)


def moments(model, x):
    return chw(np.concatenate(jax.jit(jax.vmap(model.encode))(x), axis=-1))


def test_tiny_equals_the_reference(highest_precision):
    model, golden = vae_tiny()
    assert_close(moments(model, hwc(golden["x"])), golden["moments"], 1e-5)
    assert_close(chw(jax.jit(jax.vmap(model.decode))(hwc(golden["latent"]))), golden["decoded"], 1e-5)


@pytest.mark.slow
def test_stable_diffusions_geometry_equals_the_reference(highest_precision):
    model, golden = full_size(), load("vae_sd_formula.npz")
    mean, log_variance = np.split(moments(model, hwc(golden["x"])), 2, axis=1)
    scale = model.config.scale
    assert scale == 0.18215
    unscaled = np.concatenate([mean / scale, log_variance - 2 * np.log(scale)], axis=1)
    assert_close(unscaled, golden["moments"], 1e-4)
    assert_close(chw(jax.jit(jax.vmap(model.decode))(hwc(golden["latent"]) * scale)), golden["decoded"], 1e-4)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 8), (2, 30)])
def test_sides_may_differ(height, width):
    model, _ = vae_tiny()
    image = jax.random.normal(jax.random.key(0), (height, width, 3))
    mean, log_variance = encode(model, image)
    assert mean.shape == log_variance.shape == (height // 2, width // 2, 4)
    assert decode(model, mean).shape == (height, width, 3)


def test_height_and_width_are_not_exchanged():
    model, golden = vae_tiny()
    image = hwc(golden["x"])[0]
    mean, _ = encode(model, image)
    turned, _ = encode(model, image.swapaxes(0, 1))
    assert np.abs(mean - turned.swapaxes(0, 1)).max() > 0.01  # its kernels are not symmetric


@given(st.floats(-3, 3), st.floats(-8, 2), st.integers(0, 99))
def test_posterior_samples_have_the_mean_and_variance(mean, log_variance, seed):
    noise = jax.random.normal(jax.random.key(seed), (4096,))
    sample = sample_posterior(jnp.full(4096, mean), jnp.full(4096, log_variance), noise)
    deviation = np.exp(0.5 * log_variance)
    assert abs(sample.mean() - mean) < 0.08 * deviation
    assert sample.std() == pytest.approx(deviation, rel=0.06)


def test_scale_multiplies_every_latent():
    model, golden = vae_tiny()
    config = ditx.VAEConfig(block_channels=(16, 32), layers_per_block=1, norm_groups=8, scale=0.5)
    scaled = ditx.weights.convert.vae_from_torch(ditx.weights.convert.vae_to_torch(model), config)
    image, noise = hwc(golden["x"])[0], jnp.ones((8, 8, 4))
    latents = [sample_posterior(*encode(one, image), noise) for one in (model, scaled)]
    assert_close(latents[1], 0.5 * latents[0], 1e-6)
    assert_close(decode(scaled, latents[1]), decode(model, latents[0]), 1e-5)


def test_bfloat16_is_close():
    model, golden = vae_tiny()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    decoded = jax.jit(jax.vmap(half.decode))(hwc(golden["latent"]).astype(jnp.bfloat16))
    assert decoded.dtype == jnp.bfloat16
    assert_close(chw(decoded.astype(jnp.float32)), golden["decoded"], 0.05)  # 8-bit mantissa, about ten layers


@pytest.mark.parametrize("shape", [(15, 16, 3), (16, 18, 1), (1, 2, 3)])
def test_images_that_cannot_be_halved_are_named(shape):
    model, _ = vae_tiny()
    with pytest.raises(
        ValueError, match=r"the image has shape \(.*\); its sides must be multiples of 2, its channels 3"
    ):
        model.encode(jnp.zeros(shape))


def test_latents_of_other_channels_are_named():
    model, _ = vae_tiny()
    with pytest.raises(ValueError, match=r"the latent has shape .*; the autoencoder has 4 channels"):
        model.decode(jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_channels": (48, 64)}, r"block_channels \(48, 64\) are not multiples of norm_groups 32"),
        ({"block_channels": ()}, "are not multiples"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"scale": 0.0}, "scale is 0.0; it must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ditx.VAEConfig(**changes)
