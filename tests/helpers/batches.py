"""Taking batches from an iterator, and comparing them."""

import itertools

import numpy as np
import PIL.Image


def take(iterator, count):
    result = list(itertools.islice(iterator, count))
    iterator.close()
    return result


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)
