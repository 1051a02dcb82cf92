"""Weights by name: the authors' published files, and folders of diffusers on the Hugging Face hub."""

import hashlib
import http.client
import re
import urllib.request
from pathlib import Path

from ditx.checks import suggestion
from ditx.files import cache_folder, first_line, write_atomically

# The authors publish no checksums of their files.
AUTHORS = {
    f"DiT-XL/2-{side}": f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{side}x{side}.pt" for side in (256, 512)
}
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz", ".json")
_STEM = "diffusion_pytorch_model"
_WEIGHTS = re.compile(rf"{_STEM}(\.[^.-]+)?\.(safetensors|bin)(\.index(\.[^.]+)?\.json)?")


def is_name(source: str | Path) -> bool:
    """Whether `source` is a name for `find`, and neither a path that exists nor one that looks mistyped."""
    path = Path(source)
    if path.exists() or str(source) in AUTHORS:
        return not path.exists()
    first, file = path.parts[:1], len(path.parts) == 2 and path.suffix in _SUFFIXES
    known = first in ((), ("runs",), ("~",)) or Path(*first).exists()  # also for "..", and absolute paths
    return len(path.parts) > 1 and not file and not known and not str(source).startswith("DiT-")


def find(source: str | Path, part: str) -> Path:
    """The path `source` if it exists, else that of the weights with this name, downloaded unless they are cached.

    A name is one of `AUTHORS`; `OWNER/NAME`, a folder of diffusers on the hub, or a pipeline with a folder `part`; or
    `OWNER/NAME/PATH`, a file there. Raises ValueError if there are no such weights.
    """
    path = Path(source)
    if path.exists():
        return path
    if str(source) in AUTHORS:
        return download(AUTHORS[str(source)])
    if not is_name(source):
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        guess = suggestion(source, [*beside, *AUTHORS])
        raise ValueError(
            f"{source}: there is no such file or folder; {guess}give a run or weights,"
            f" OWNER/NAME of the Hugging Face hub, or {' or '.join(AUTHORS)}"
        )
    owner, name, *file = path.parts
    return fetch(f"{owner}/{name}", "/".join(file), part=part)


def find_in(folder: Path, part: str) -> tuple[Path, str] | None:
    """The file of weights in a folder of diffusers, or of its subfolder `part`, and the variant, "" for the plain one.

    A plain file comes before variants, safetensors before pickles, a whole file before the index of its shards.
    """
    folder = folder / part if (folder / part).is_dir() else folder
    matches = [match for entry in folder.iterdir() if (match := _WEIGHTS.fullmatch(entry.name))]
    if not matches:
        return None
    best = min(matches, key=lambda match: (bool(match[1] or match[4]), match[2] == "bin", bool(match[3]), match[0]))
    return folder / best[0], (best[1] or best[4] or "").removeprefix(".")


def fetch(repository: str, file: str = "", *, part: str = "") -> Path:
    """Download a file of a repository of the hub, or the folder of its weights, unless it is in the hub's cache."""
    failure = f"cannot fetch {file or 'weights'} of {repository} from the Hugging Face hub"
    remedy = "check the name and the network, or give the path of a file or folder"
    try:
        from huggingface_hub import hf_hub_download, snapshot_download  # pyright: ignore[reportMissingImports]

        if file:
            return Path(hf_hub_download(repository, file))
        for end in (".safetensors", ".bin", ".*.safetensors", ".*.bin"):
            names = [f"{_STEM}{end}", f"{_STEM}-*{end}", f"{_STEM}{end}.index*.json", "*.json"]
            patterns = ["model_index.json", "config.json", *names[:3], *(f"{part}/{name}" for name in names)]
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
            if find_in(folder, part):
                return folder
    except ImportError as error:
        remedy = "install it with `uv run --extra hub ...` or `pip install huggingface-hub`, or give the path of a file"
        raise ValueError(f"{failure} without the package huggingface_hub; {remedy}") from error
    except Exception as error:  # The hub, the network and the disk raise many types.
        raise ValueError(f"{failure} ({type(error).__name__}: {first_line(error)}); {remedy}") from error
    raise ValueError(f"{failure}: it has no {_STEM}; {remedy}")


def download(url: str) -> Path:
    """Download a file into `~/.cache/ditx` (under `XDG_CACHE_HOME` if that is set), unless it is there already.

    Where the name ends in the first digits of the file's SHA-256, as in torch's hub, they are checked; the size always
    is. Raises ValueError if the file cannot be downloaded.
    """
    cache = cache_folder()
    path = cache / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    expected, digest, size = re.search(r"-([0-9a-f]{8,})$", path.stem), hashlib.sha256(), 0
    remedy = "check the network, or bring the file here by other means and give its path"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            cache.mkdir(parents=True, exist_ok=True)
            print(f"download {url} into {cache}", flush=True)
            with write_atomically(path) as file:
                while block := response.read(1 << 20):
                    digest.update(block)
                    size += file.write(block)
                if str(size) != response.headers.get("Content-Length", str(size)):
                    raise ValueError(f"the connection to {url} ended after {size:,} bytes; {remedy}")
                if expected and not digest.hexdigest().startswith(expected[1]):
                    digits = digest.hexdigest()[: len(expected[1])]
                    raise ValueError(
                        f"the file from {url} has a SHA-256 that begins with {digits}, not {expected[1]}; {remedy}"
                    )
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"cannot download {url} into {cache} ({type(error).__name__}: {first_line(error)}); {remedy}"
        ) from error
    return path
