"""Files on disk: atomic writes, checksums, archives of arrays, one-line errors."""

import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditx.files import checksum, checksum_arrays, first_line, read_npz, write_atomically


def test_a_file_appears_when_the_block_ends(tmp_path):
    with write_atomically(tmp_path / "a") as file:
        file.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"
    with write_atomically(str(tmp_path / "a")) as file:
        file.write(b"newer")
    assert (tmp_path / "a").read_bytes() == b"newer" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no")])
def test_a_failed_block_leaves_the_old_file_and_no_other(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error if isinstance(error, type) else type(error)), write_atomically(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_disk_error_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"cannot write .*no/a \(.*No such file.*\); make room or give another path"),
        write_atomically(tmp_path / "no" / "a"),
    ):
        pass


def test_checksums_are_crc32(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert checksum(tmp_path / "a") == f"{zlib.crc32(b'content'):08x}"
    arrays = [np.arange(6.0).reshape(2, 3).T, jnp.ones(3, jnp.bfloat16), np.zeros((0, 2)), np.float32(1)]
    content = b"".join(np.asarray(array).tobytes() for array in arrays)
    assert checksum_arrays(jax.tree.leaves(arrays)) == f"{zlib.crc32(content):08x}"


def test_arrays_of_an_archive_are_read_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.ones(2))
    assert list(read_npz(tmp_path / "a.npz")) == ["x", "y"]
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz", ("x", "z"))["x"], np.arange(3))


def test_other_files_are_refused_in_one_sentence(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{}]))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    for name in ("objects.npz", "array.npy", "text.npz", "missing.npz"):
        with pytest.raises(ValueError, match=r"cannot read .* as an \.npz of plain arrays \(.*\); make or") as error:
            read_npz(tmp_path / name)
        assert "\n" not in str(error.value)


def test_first_line_of_an_error():
    assert first_line(ValueError("\n one \ntwo")) == "one" and first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(first_line(ValueError("x" * 1000))) == 200
