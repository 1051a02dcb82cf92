import numpy as np

from ditx.pictures import loss_by_time


def test_the_late_loss_of_each_range_of_time_is_drawn_dark():
    losses, counts = np.tile(np.linspace(1, 2, 10), (10, 1)), np.ones((10, 10))
    losses[:8], losses[:, 4], counts[:, 4] = 3, np.nan, 0  # early, and where no time was drawn
    pixels = np.asarray(loss_by_time(losses, counts))
    y, x = np.nonzero((pixels == (0x1F, 0x4E, 0x79)).all(-1))
    # It rises from the lower left, across the gap, to half the height, where 2 is of 1 to 3.
    assert x.min() < 110 and x.max() > 740
    heights = [y[x == column].mean() for column in (x.min(), 425, x.max())]
    assert heights[0] > 400 and 205 < heights[2] < 235 and heights[0] > heights[1] > heights[2]
