import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_close, inception_weights, load

import ditx
from ditx.nn.inception import SIDE, ConvUnit, average_pool, max_pool, prepare


@functools.cache
def golden():
    """The network, and `inception_formula.npz` with its images regenerated from their seeds."""
    file = load("inception_formula.npz")
    # The images are noise. The file has a grid of their pixels, to check the regenerated images.
    for seed, side, every in ((1, 299, 100), (2, 32, 10)):
        images = np.random.RandomState(seed).randint(0, 256, (2, side, side, 3)).astype(np.uint8)
        np.testing.assert_array_equal(images[:, ::every, ::every], file[f"images{side}"])
        file[f"images{side}"] = images
    return ditx.weights.convert.inception_from_torch(inception_weights()), file


@functools.partial(jax.jit, static_argnames="resize")
def features(model, images, resize="adm"):
    return jax.vmap(functools.partial(model, resize=resize))(images)


def abstract(**options):
    return jax.eval_shape(lambda key: ditx.Inception(**options, key=key), jax.random.key(0))


def test_the_suites_features_equal_the_reference():
    model, file = golden()
    images = file["images299"].astype(np.float32)
    outputs = features(model, images)
    assert_close(outputs.pool, file["adm_pool_299"], 1e-5)
    assert_close(outputs.spatial, file["adm_spatial_299"].reshape(2, 2023), 1e-5)
    assert_close(outputs.logits, file["adm_logits_nobias_299"], 1e-5)
    # With the same compiled network: images do not affect each other, and pytorch-fid differs only in its scale.
    jax.tree.map(np.testing.assert_array_equal, features(model, images[::-1]), jax.tree.map(lambda x: x[::-1], outputs))
    prepared = np.stack([prepare(image, "pytorch-fid") for image in jnp.asarray(file["images299"])])
    assert_close(features(model, 128 * prepared + 128).pool, file["pytorch_fid_pool_299"], 1e-5)


def test_pytorch_fids_features_equal_the_reference():
    model, file = golden()
    assert_close(features(model, file["images32"], "pytorch-fid").pool, file["pytorch_fid_pool_32"], 1e-5)


def test_the_suites_resizing_equals_the_reference():
    file, random = load("metrics.npz"), np.random.RandomState(0)
    random.standard_normal(64 * (64 + 700 + 900))  # drawn before the images; see tests/evaluation/test_metrics.py
    images = jnp.asarray(random.randint(0, 256, (2, 40, 56, 3)), jnp.uint8)
    resized = 128 * np.stack([prepare(image) for image in images]) + 128
    np.testing.assert_allclose(resized[:, ::7, ::7], file["resized_299"], atol=0.07)  # half precision: 1/16 below 256


@settings(max_examples=8)
@given(st.sampled_from([1, 9]), st.sampled_from([1, 2, 50, SIDE, 640]))
def test_resizing_a_slope_shows_the_input_positions(height, width):
    slope = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[:, None] / width, (height, width, 3))
    positions = np.arange(SIDE) * width / SIDE
    centres = (np.arange(SIDE) + 0.5) * width / SIDE - 0.5
    for resize, expected, middle in (("adm", positions, 128), ("pytorch-fid", centres, 127.5)):
        expected = np.clip(expected, 0, width - 1) / width / middle - 1
        for image, along in ((slope, 0), (slope.swapaxes(0, 1), 1)):
            prepared = np.moveaxis(prepare(image, resize), along, 0)
            np.testing.assert_allclose(prepared, np.broadcast_to(expected[:, None], (SIDE, SIDE, 3)), atol=1e-6)


def test_pools_equal_their_definition():
    x = np.random.default_rng(0).standard_normal((5, 7, 2)).astype(np.float32)
    rows, columns = range(5), range(7)
    near = [[x[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].reshape(-1, 2) for j in columns] for i in rows]
    means, largest = (np.array([[f(part, 0) for part in row] for row in near]) for f in (np.mean, np.max))
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), means, atol=1e-6)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), largest)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), 2), largest[1:-1:2, 1:-1:2])


def test_normalisation_uses_fixed_statistics():
    unit = ConvUnit("unit", 2, 2, (1, 1), key=jax.random.key(0))
    arrays = [jnp.eye(2)[None, None], *map(jnp.array, ([2.0, 3.0], [0.5, -9.0], [1.0, -1.0], [4.0, 0.25]))]
    unit = jax.tree.unflatten(jax.tree.structure(unit), arrays)
    expected = [2 * (3 - 1) / np.sqrt(4.001) + 0.5, max(0, 3 * (1 + 1) / np.sqrt(0.251) - 9)]
    np.testing.assert_allclose(unit(jnp.array([[[3.0, 1.0]]]))[0, 0], expected, rtol=1e-6)


def test_a_batch_is_one_convolution_a_layer():
    images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.uint8)
    lowered = features.lower(abstract(), images).as_text()
    convolutions = [line for line in lowered.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 94
    for line in convolutions:
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line and ": (tensor<5x" in line


def test_output_sizes_with_and_without_logits():
    image = jax.ShapeDtypeStruct((60, 70, 3), jnp.float32)
    for logits in (True, False):
        model = abstract(logits=logits)
        outputs = jax.eval_shape(lambda model, image: model(image), model, image)
        assert outputs.pool.shape == (2048,) and outputs.spatial.shape == (2023,)
        assert (outputs.logits.shape == (1008,)) if logits else (model.logits is None and outputs.logits is None)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 4), (0, 8, 3)])
def test_images_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"the image has shape \(.*\); give height, width and 3 channels"):
        prepare(jnp.zeros(shape, jnp.uint8))
