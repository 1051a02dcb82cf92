"""How the README's figures on digits are read: `uv run python tests/nearest_digits.py SAMPLES.npz`.

Samples are those of `sample.py --npz`. The classifier takes the majority of the 3 nearest training digits, by Euclidean
distance over pixels of 0 to 255; the training digits themselves are read with each one held out.
"""

import sys

import numpy as np

from ditx.data.sources import digits


def read(images, train, labels, *, held_out=False):
    """The label that the 3 nearest training digits give each image, and the distance to the first of them."""
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
        samples, wanted = file["arr_0"].reshape(len(file["labels"]), -1).astype(np.float32), file["labels"]
    for name, images, given, held_out in (("samples", samples, wanted, False), ("digits", train, labels, True)):
        predicted, distances = read(images, train, labels, held_out=held_out)
        report(name, predicted, given, distances)
