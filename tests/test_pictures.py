import warnings

import numpy as np
import PIL.Image
import pytest

from ditx import pictures


def test_images_of_one_class_are_near_square_with_white_lines_and_small_ones_are_enlarged():
    images, labels = np.zeros((5, 40, 40, 3), np.uint8), np.zeros(5, np.int32)
    picture = np.asarray(pictures.grid(images, labels, ["any"]))
    assert picture.shape == (82, 124, 3) and (picture[40:42] == 255).all() and (picture[42:, 84:] == 255).all()
    assert np.asarray(pictures.grid(images[:1, :8, :8, :1], labels[:1], ["any"])).shape == (64, 64)


def test_each_class_is_a_row_with_its_name_on_the_left():
    labels = np.tile(np.arange(5), 4)
    images = np.broadcast_to(40 * labels.astype(np.uint8)[:, None, None, None], (20, 64, 64, 1))
    picture = np.asarray(pictures.grid(images, labels, ["0", "1", "2", "3", "four, or vier"]))
    height, width = picture.shape
    margin = width - (4 * 66 - 2)
    assert height == 5 * 66 - 2 and margin > 12
    for row in range(5):
        images_of_row, title = picture[66 * row : 66 * row + 64, margin:], picture[66 * row : 66 * row + 64, :margin]
        assert set(np.unique(images_of_row)) <= {40 * row, 255} and (images_of_row[:, :64] == 40 * row).all()
        assert title.min() < 100  # the name in black


@pytest.mark.parametrize(("classes", "each"), [(2, 20), (3, 10), (10, 8), (5, 7), (20, 10)])
def test_grids_of_classes_are_near_square_with_names_in_full(classes, each):
    labels = np.tile(np.arange(classes), each)
    names = [f"photographs of my grandmother, {n}" for n in range(classes)]
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    width, height = pictures.grid(images, labels, names).size
    assert max(width, height) < 1.9 * min(width, height)
    cut = pictures.grid(images, labels, ["photographs of my gr"] * classes).crop((0, 0, 60, height))
    assert pictures.grid(images, labels, names).crop((0, 0, 60, height)).tobytes() != cut.tobytes()


@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_the_loss_curve_has_any_number_of_losses_and_gaps(tmp_path, count):
    losses, by_time, counts = np.geomspace(1, 0.1, count), np.ones((count, 10)), np.ones((count, 10))
    losses[1:2], by_time[:, 4], counts[:, 4] = np.nan, np.nan, 0  # skipped updates, and a time that was never drawn
    with warnings.catch_warnings(action="error"):
        pictures.write_loss_curve(tmp_path / "loss.png", np.arange(count, dtype=float), losses, by_time, counts)
    with PIL.Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > picture.height and len(np.unique(np.asarray(picture))) > 10
