"""Share of sampled digits that a nearest-neighbour classifier reads as their label.

`uv run python tests/nearest_digits.py SAMPLES.npz`, with a file of `sample.py --npz`. The classifier takes the majority
of the 3 nearest training digits, by Euclidean distance over pixels of 0 to 255. For comparison it reads the training
digits, each held out in turn.
"""

import sys

import numpy as np

from ditx.data.sources import digits


def read(images, train, labels, *, held_out=False):
    """Majority label of the 3 nearest training digits of each image, and the distance to the nearest."""
    squares = (images**2).sum(1)[:, None] + (train**2).sum(1) - 2 * images @ train.T
    distances = np.sqrt(np.maximum(squares, 0))
    if held_out:
        np.fill_diagonal(distances, np.inf)
    nearest = labels[np.argsort(distances, axis=1)[:, :3]]
    return np.array([np.bincount(row).argmax() for row in nearest]), distances.min(1)


def report(name, predicted, labels, distances):
    quantiles = np.quantile(distances, [0.05, 0.25, 0.5, 0.75, 0.95]).round().astype(int)
    print(f"{name}: {np.mean(predicted == labels):.1%} read as their label; nearest digit at {quantiles}")


if __name__ == "__main__":
    train, labels = digits().images.reshape(5000, -1).astype(np.float32), digits().labels.astype(int)
    with np.load(sys.argv[1]) as file:
        samples, sample_labels = file["arr_0"].reshape(len(file["labels"]), -1).astype(np.float32), file["labels"]
    for name, images, image_labels, held_out in (
        ("samples", samples, sample_labels, False),
        ("digits", train, labels, True),
    ):
        predicted, distances = read(images, train, labels, held_out=held_out)
        report(name, predicted, image_labels, distances)
