"""The README's example runs as it stands."""

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text()


def run(number):
    names = {}
    exec(compile(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number], "README.md", "exec"), names)
    return names


def test_the_library_example_runs():
    names = run(0)
    # A new network puts out zeros: the loss is the mean square of the noise, and the variational term near it.
    assert 0.9 < float(names["loss"]) < 1.2
    assert names["image"].shape == (32, 32, 4) and np.isfinite(names["image"]).all()
    assert names["states"].shape == (250, 32, 32, 4)


def test_single_pieces_train_in_another_loop():
    names = run(1)
    # The data have mean 0.5 and deviation 0.1; an untrained block draws mean 0.
    assert names["drawn"].shape == (4, 4, 16)
    assert abs(float(names["drawn"].mean()) - 0.5) < 0.05 and float(names["drawn"].std()) < 0.2


def test_every_file_that_it_names_is_there():
    root = Path(__file__).parent.parent
    for name in re.findall(r"\b(?:ditx/[\w/]+(?:\.py|\.txt|/)|\.github/[\w.]+|train\.py|sample\.py)", README):
        assert (root / name).exists(), name
