"""Pickles of plain values and arrays. Hostile ones are tested in tests/weights/test_files.py."""

import pickle

import numpy as np
import pytest

from ditx import pickles


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f4", "?", "f2"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_and_plain_values_are_read(dtype, protocol, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    contents = {b"data": array, "columns": np.asfortranarray(array), "labels": [1, 2], "name": None}
    (tmp_path / "a").write_bytes(pickle.dumps(contents, protocol))
    read = pickles.read_pickle(tmp_path / "a")
    assert read.keys() == contents.keys() and read["labels"] == [1, 2] and read["name"] is None
    np.testing.assert_array_equal(read[b"data"], array, strict=True)
    np.testing.assert_array_equal(read["columns"], array, strict=True)


@pytest.mark.parametrize("contents", [[1, 2], {"a": np.array([{}])}, {"a": np.dtype("u1")}, {"a": np.array(["b"])}])
def test_other_values_are_refused(contents, tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps(contents, 4))
    with pytest.raises(ValueError, match=r"it is no dictionary|array of other values than numbers|opcode"):
        pickles.read_pickle(tmp_path / "a")


def test_a_file_that_is_too_large_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"a": bytes(pickles.MAX_BYTES)}, 4))
    with pytest.raises(ValueError, match="larger than 32 MiB"):
        pickles.read_pickle(tmp_path / "a")
