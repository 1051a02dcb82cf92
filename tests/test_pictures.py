import warnings

import numpy as np
import PIL.Image
import pytest

from ditx import pictures


def test_a_grid_has_rows_of_columns_and_white_lines():
    picture = np.asarray(pictures.grid(np.zeros((5, 40, 40, 3), np.uint8), 3))
    assert picture.shape == (82, 124, 3) and (picture[40:42] == 255).all() and (picture[42:, 84:] == 255).all()
    assert np.asarray(pictures.grid(np.zeros((1, 8, 8, 1), np.uint8), 1)).shape == (64, 64)  # enlarged


@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_the_loss_curve_has_any_number_of_losses_and_gaps(tmp_path, count):
    losses, by_time, counts = np.geomspace(1, 0.1, count), np.ones((count, 10)), np.ones((count, 10))
    losses[1:2], by_time[:, 4], counts[:, 4] = np.nan, np.nan, 0  # skipped updates, and a time that was never drawn
    with warnings.catch_warnings(action="error"):
        pictures.write_loss_curve(tmp_path / "loss.png", np.arange(count, dtype=float), losses, by_time, counts)
    with PIL.Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > picture.height and len(np.unique(np.asarray(picture))) > 10
