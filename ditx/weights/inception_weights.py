"""The weights of the FID network: pytorch-fid's file, fetched once, or a file of the same names given by path."""

import hashlib
import http.client
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import jax
import numpy as np

from ditx.nn.inception import Inception
from ditx.weights import convert, files

PYTORCH_FID = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


def load_inception(source: str = "") -> tuple[Inception, str]:
    """Read the FID network from a file of torch, safetensors or NumPy (`.npz`), or from `PYTORCH_FID` by default.

    Also returns the file's path with the CRC-32 of the weights. A file without logits gives a network without. Raises
    ValueError if the file cannot be fetched, is damaged, or holds another network.
    """
    path = Path(source) if source else download(PYTORCH_FID)
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such file; give that of pytorch-fid's weights, or none to have it fetched"
        )
    model = convert.inception_from_torch(_read_npz(path) if _is_npz(path) else files.read(path).tensors)
    crc = reduce(lambda crc, leaf: zlib.crc32(np.asarray(leaf).data, crc), jax.tree.leaves(model), 0)
    return model, f"{path.absolute()} (CRC-32 {crc:08x})"


def download(url: str) -> Path:
    """Fetch a file into `~/.cache/ditx` (in `XDG_CACHE_HOME` if that is set), unless it is there.

    Its name ends, as those of torch's hub do, in the first digits of its SHA-256, which are checked. Raises ValueError
    if it cannot be had.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditx"
    path = cache / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    partial, digest = path.with_name(f"{path.name}.{os.getpid()}.partial"), hashlib.sha256()
    remedy = "check the network, or bring the file here by other means and give its path"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, partial.open("wb") as file:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        expected = path.stem.rsplit("-", 1)[-1]
        if not digest.hexdigest().startswith(expected):
            found = digest.hexdigest()[: len(expected)]
            raise ValueError(f"what came from {url} has a SHA-256 that begins with {found}, not {expected}; {remedy}")
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url} cannot be fetched into {cache} ({type(error).__name__}: {error}); {remedy}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _is_npz(path: Path) -> bool:
    """Whether it is a zip file of arrays, which torch's files are not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return all(name.endswith(".npy") for name in file.namelist())


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception as error:  # A damaged file raises nearly anything.
        raise ValueError(
            f"{path} is damaged, or holds more than arrays of numbers ({error}); fetch it again"
        ) from error
