import numpy as np
import PIL.Image
from hypothesis import given, settings
from hypothesis import strategies as st

from ditx.data import image_files
from ditx.sampling import to_uint8


def expected_crop(array, size):
    """Box means of 2 x 2 by NumPy, Pillow's bicubic on the rest, and a crop, with sizes worked out on their own."""
    image = PIL.Image.fromarray(array)
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), PIL.Image.Resampling.BOX)
    width, height = image.size
    if width <= height:
        width, height = size, round(height * size / width)
    else:
        width, height = round(width * size / height), size
    array = np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))
    row, column = (height - size) // 2, (width - size) // 2
    return array[row : row + size, column : column + size]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_centre_crop_equals_its_description(height, width, size, seed):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cropped = np.asarray(image_files.centre_crop(PIL.Image.fromarray(array), size))
    assert cropped.shape == (size, size, 3)
    np.testing.assert_array_equal(cropped, expected_crop(array, size))


def test_centre_crop_halves_by_box_means():
    array = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    wide = array.astype(float)
    for _ in range(2):  # 32 x 64 -> 16 x 32 -> 8 x 16; Pillow rounds to 8 bits after the columns and after the rows
        wide = np.floor(wide.reshape(wide.shape[0], wide.shape[1] // 2, 2, 3).mean(2) + 0.5)
        wide = np.floor(wide.reshape(wide.shape[0] // 2, 2, wide.shape[1], 3).mean(1) + 0.5)
    np.testing.assert_array_equal(np.asarray(image_files.centre_crop(PIL.Image.fromarray(array), 8)), wide[:, 4:12])


def test_centre_crop_takes_the_centre_unresized_when_the_short_side_fits():
    array = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image_files.centre_crop(PIL.Image.fromarray(array), 9)), array[:, 3:12])


def test_every_pixel_value_survives_the_round_trip():
    u = np.arange(256, dtype=np.uint8)
    x = image_files.to_unit(u)
    assert x.dtype == np.float32 and x[0] == -1 and x[-1] == 1
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(to_uint8(x), u)


def test_to_uint8_truncates_and_clamps():
    x = np.array([-5, -1, 0, 0.0039, 0.0079, 1, 5], np.float32)
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 128, 128, 129, 255, 255])
