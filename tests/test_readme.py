"""The README's example runs as it stands."""

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_library_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    # A new network puts out zeros: the loss is the mean square of the noise, and the variational term near it.
    assert 0.9 < float(names["loss"]) < 1.2
    assert names["image"].shape == (32, 32, 4) and np.isfinite(names["image"]).all()
    assert names["states"].shape == (250, 32, 32, 4)


def test_every_file_that_it_names_is_there():
    root = Path(__file__).parent.parent
    for name in re.findall(r"\b(?:ditx/[\w/]+(?:\.py|\.txt|/)|\.github/[\w.]+|train\.py|sample\.py)", README):
        assert (root / name).exists(), name
