import resource

import numpy as np
import PIL.Image
import pytest
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


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 900), st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_centre_crop_of_a_strip_is_its_description_to_the_last_bit(short, long, size, seed):
    array = np.random.default_rng(seed).integers(0, 256, (short, long, 3), dtype=np.uint8)
    for strip in (array, np.ascontiguousarray(array.swapaxes(0, 1))):
        cropped = np.asarray(image_files.centre_crop(PIL.Image.fromarray(strip), size))
        np.testing.assert_array_equal(cropped, expected_crop(strip, size))


def test_a_thin_image_takes_little_memory():
    image, before = PIL.Image.new("RGB", (1, 60_000)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert image_files.centre_crop(image, 512).size == (512, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB; resized whole, 47 GB


TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Pillow's transposition when stored


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_their_exif_says(tmp_path, kind, orientation):
    y, x = np.mgrid[:48, :64]
    array = np.stack([x * 255 // 63, y * 255 // 47, np.full((48, 64), 80)], -1).astype(np.uint8)
    image, exif = PIL.Image.fromarray(array), PIL.Image.Exif()
    exif[0x112] = orientation
    stored = image if TURNS[orientation] is None else image.transpose(TURNS[orientation])
    stored.save(tmp_path / f"a.{kind}", exif=exif, quality=95)
    difference = np.abs(image_files.read(str(tmp_path / f"a.{kind}"), 48).astype(int) - array[:, 8:56])
    assert difference.mean() < (0 if kind in ("png", "tiff") else 2) + 1e-9


def test_damaged_exif_leaves_an_image_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(image_files.read(str(tmp_path / "a.png"), 8), pixels)


def test_transparent_parts_are_white_in_every_mode(tmp_path):
    shape = np.zeros((32, 32, 4), np.uint8)
    shape[8:24, 8:24] = (0, 0, 0, 255)
    half = shape.copy()
    half[..., 3] = np.where(half[..., 3] > 0, 255, 128)  # black at half strength: grey 127
    expected = np.where(shape[..., 3:] > 0, 0, 255) + np.zeros(3, int)
    image = PIL.Image.fromarray(shape)
    grey = PIL.Image.fromarray(shape[..., 3] // 255 * 9 + 3)  # 12 in the shape, 3 around
    images = {"RGBA": image, "LA": image.convert("LA"), "P": image.quantize(8), "half": PIL.Image.fromarray(half)}
    for name, each in images.items():
        each.save(tmp_path / f"{name}.png")
    images["P"].save(tmp_path / "P.gif", transparency=images["P"].getpixel((0, 0)))
    grey.save(tmp_path / "L.png", transparency=3)
    grey.convert("RGB").save(tmp_path / "RGB.png", transparency=(3, 3, 3))
    image.save(tmp_path / "RGBA.webp", lossless=True)
    read = {file.name: image_files.read(str(file), 32).astype(int) for file in tmp_path.iterdir()}
    np.testing.assert_array_equal(read.pop("half.png"), np.where(expected == 0, 0, 127))
    for name in ("L.png", "RGB.png"):
        np.testing.assert_array_equal(read.pop(name), np.where(expected == 0, 12, 255))
    assert sorted(read) == ["LA.png", "P.gif", "P.png", "RGBA.png", "RGBA.webp"]
    for name, pixels in read.items():
        np.testing.assert_array_equal(pixels, expected, err_msg=name)


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
