"""Files on disk: written whole or not at all, locks, checksums, `.npz` archives, and errors as one line."""

import fcntl
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the block, or is removed if the block raises.

    A killed process can leave `NAME.PID.partial` behind, but never half of `path`. Raises OSError with the path.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # NAME.partial could be a user's own file.
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({first_line(error)}); make room or give another path") from error
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder `ditx` in `XDG_CACHE_HOME`, or else in `~/.cache`. Raises ValueError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditx"
    except RuntimeError as error:
        raise ValueError("this user has no home folder to keep downloads in; set XDG_CACHE_HOME to a folder") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises ValueError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror}); give another place") from error


def check_writable(folder: Path) -> None:
    """Raise ValueError if a folder, or the nearest existing one above it, cannot be written to; writes nothing."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ValueError(f"cannot write {folder}, since {nearest} is read-only or no folder; give another place")


def lock(file: Path, busy: str | None = None) -> IO[str]:
    """Lock a file until the result is closed or the process ends.

    If another process holds it, raises ValueError with the sentence `busy` or, without one, waits.
    """
    held = file.open("a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        # Its holder may have finished and renamed it since it was opened.
        if not os.path.samestat(os.fstat(held.fileno()), file.stat()):
            raise FileNotFoundError(file)
    except (BlockingIOError, FileNotFoundError) as error:
        held.close()
        raise ValueError(busy) from error
    return held


def checksum(path: str | os.PathLike[str]) -> str:
    """CRC-32 of a file's contents, as eight hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def checksum_arrays(arrays: Iterable[Any]) -> str:
    """CRC-32 of the bytes of some arrays (`jax.tree.leaves(model)`), in their order, as eight hexadecimal digits."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def read_npz(path: str | os.PathLike[str], names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, all or those of `names` that it has; pickled objects are refused, not loaded.

    Raises ValueError with the path if the file is damaged or is not an `.npz` of plain arrays.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is cut short or no .npz: save arrays by numpy.savez, extract other archives")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays if names is None or name in names}
    except Exception as error:  # NumPy and zipfile raise many types for a damaged archive.
        cause = "it has Python objects" if "allow_pickle" in str(error) else first_line(error)
        raise ValueError(
            f"cannot read {os.fspath(path)} as an .npz of plain arrays ({cause}); make or fetch it again"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
