"""Folders of images as people keep them: one walk for training, extraction and evaluation, files known by content."""

import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int, Int32

from ditx.data.image_files import is_image_name, read, reason, with_image
from ditx.files import cache_folder, checksum, lock, write_atomically

# Beside hidden ones, the folders that file systems, network disks and archives keep for themselves.
SYSTEM_FOLDERS = (
    "@eaDir",
    "@Recycle",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
)
# One core decodes as much in about 10 s. Images of larger folders are decoded when used.
MAX_BYTES_DECODED = 100_000_000


class Content(NamedTuple):
    """The content of a file, as far as it matters."""

    checksum: str
    """CRC-32, or nothing if the file is no image"""
    width: int = 0
    height: int = 0
    error: str = ""
    """reason why it cannot be used, if it is a damaged image"""


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of a folder, with their labels and contents."""

    path: str
    files: list[str]
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]
    """names of the subfolders; empty for a folder without, whose labels are 0"""
    contents: list[Content]

    @property
    def names(self) -> list[str]:
        """Paths relative to the folder."""
        return [file.removeprefix(self.path).lstrip(os.sep) for file in self.files]

    @property
    def damaged(self) -> dict[str, str]:
        """Names of the images that cannot be used, with the reasons."""
        pairs = zip(self.names, self.contents, strict=True)
        return {name: content.error for name, content in pairs if content.error}

    @property
    def median_side(self) -> int:
        """Median of the shorter sides, in pixels."""
        return int(np.median([min(content.width, content.height) for content in self.contents]))

    @property
    def checksum(self) -> int:
        """CRC-32 of the contents and labels."""
        identity = [content.checksum for content in self.contents], self.labels.tolist()
        return zlib.crc32(json.dumps(identity).encode())

    def select(self, numbers: Int[np.ndarray, "m"]) -> "ImageFolder":
        """Some of the images."""
        files, contents = ([values[n] for n in numbers] for values in (self.files, self.contents))
        return replace(self, files=files, labels=self.labels[numbers], contents=contents)

    def undamaged(self, *, strict: bool) -> "ImageFolder":
        """Without the damaged images. Raises ValueError if none is left or, if `strict`, for the first damaged one."""
        damaged = self.damaged
        if damaged and (strict or len(damaged) == len(self.files)):
            name, error = next(iter(damaged.items()))
            sentence = f"cannot read image {os.path.join(self.path, name)}: {error}"
            remedy = "replace or remove it" if strict else f"nor any other of the {len(damaged):,} images; repair them"
            raise ValueError(f"{sentence}; {remedy}")
        return self.select(np.flatnonzero([not content.error for content in self.contents]))


def find_images(path: str | os.PathLike, *, by_class: bool = True, quiet: bool = False) -> ImageFolder:
    """Images at any depth of a folder, in the order of their names, damaged ones included.

    Subfolders are classes. Images beside subfolders of images are left out or, if not `by_class`, mean that there are
    no classes. Hidden files and folders are left out; links are followed. Reports other files on stderr, unless
    `quiet`. Raises ValueError for a folder or a class without images, and as `walk` does.
    """
    root = os.fspath(path)
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder; give a folder of images, or one with a subfolder for each class")
    folders, loose = _entries(root, ())
    groups = [loose, *(sorted(walk(folder, (root,))) for folder in folders)]
    contents = inspect([file for group in groups for file in group], root)
    other = [file for file, content in contents.items() if not content.checksum]
    if other and not quiet:
        kinds = Counter(os.path.splitext(file)[1] or os.path.basename(file) for file in other).most_common()
        most = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:5]) + (", ..." if len(kinds) > 5 else "")
        print(f"passed over {len(other):,} files that are no images in {root}: {most}", file=sys.stderr)
    loose, *groups = ([file for file in group if contents[file].checksum] for group in groups)
    empty = [folder for folder, group in zip(folders, groups, strict=True) if not group]
    if not any(groups) or (loose and not by_class):
        groups, folders = [[*loose, *(file for group in groups for file in group)]], []
    elif empty and by_class:
        raise ValueError(f"folder {empty[0]} contains no images; add some or remove it")
    elif loose and not quiet:
        print(f"passed over {len(loose):,} images beside the class folders of {root}", file=sys.stderr)
    files = [file for group in groups for file in group]
    if not files:
        raise ValueError(f"folder {root} contains no images; add some, or give another folder")
    labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group) for group in groups])
    class_names = tuple(map(os.path.basename, folders))
    return ImageFolder(root, files, labels, class_names, [contents[file] for file in files])


def report_skipped(skipped: dict[str, str], listed: str = "") -> None:
    """Count damaged images on stderr, with the first ten reasons; `listed` is a file with all."""
    for name, error in list(skipped.items())[:10]:
        print(f"skipped  {name}: {error}", file=sys.stderr)
    if skipped:
        print(f"skipped  {len(skipped):,} images in all{listed and f', listed in {listed}'}", file=sys.stderr)


def walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Files at any depth of a folder that is in the folders `above`; a link to a folder that it is in is left out.

    Raises ValueError, with the path, for a folder that cannot be read and for a dead link.
    """
    folders, files = _entries(folder, above)
    yield from files
    for inner in folders:
        yield from walk(inner, (*above, folder))


def _entries(folder: str, above: tuple[str, ...]) -> tuple[list[str], list[str]]:
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"cannot read folder {folder} ({error.strerror}); make it readable, or move it elsewhere"
        ) from error
    for entry in visible:
        is_link = entry.is_symlink()
        if os.path.isdir(entry.path) if is_link else entry.is_dir():
            target = os.path.realpath(entry.path)
            cycle = is_link and any(Path(os.path.realpath(each)).is_relative_to(target) for each in (*above, folder))
            if entry.name not in SYSTEM_FOLDERS and not cycle:
                folders.append(entry.path)
        elif is_link and not os.path.exists(entry.path):
            raise ValueError(f"link {entry.path} leads nowhere ({os.readlink(entry.path)}); mend or remove it")
        elif entry.is_file():
            files.append(entry.path)
    return folders, files


def inspect(files: list[str], folder: str) -> dict[str, Content]:
    """Contents of the files of a folder; files whose size and times are as before are not read again.

    Reading finds damage in headers and, in PNG, anywhere; images of up to 100 MB in all are decoded, too.
    """
    stats = list(map(os.stat, files))
    whole = sum(stat.st_size for stat in stats) <= MAX_BYTES_DECODED
    keys = {
        file: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, whole] for file, s in zip(files, stats, strict=True)
    }
    with _known(folder) as known, ThreadPoolExecutor() as pool:
        pairs = ((file, known.get(file.removeprefix(folder), [None])) for file in files)
        contents = {file: Content(*kept[1:]) for file, kept in pairs if kept[0] == keys[file]}
        new, started = [file for file in files if file not in contents], time.time_ns()
        if len(new) > 20_000:
            print(f"reading {len(new):,} files of {folder}, once", file=sys.stderr, flush=True)
        contents |= zip(new, pool.map(lambda file: _inspect(file, whole), new), strict=True)
        known.clear()
        # Not files so young that they could change again within one tick of a file system's clock.
        old = [file for file in files if started - max(keys[file][1:3]) > 2e9]
        known.update((file.removeprefix(folder), [keys[file], *contents[file]]) for file in old)
    return contents


def _inspect(file: str, whole: bool) -> Content:
    def check(image: PIL.Image.Image) -> tuple[int, int]:
        size = image.size
        image.verify()
        return size

    try:
        size = with_image(file, check)
        if whole:
            read(file, 1)
        return Content(checksum(file), *size)
    except ValueError as error:
        if isinstance(error.__cause__, PIL.UnidentifiedImageError) and not is_image_name(file):
            return Content("")
        with suppress(OSError):  # of a file that may not be read
            return Content(checksum(file), error=reason(error))
        return Content("unreadable", error=reason(error))


@contextmanager
def _known(folder: str) -> Iterator[dict[str, Any]]:
    """Contents of files by path, as the cache of `folder` has them; changes are kept if they can be."""
    try:
        cache = cache_folder() / "folders"
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / f"{zlib.crc32(os.fsencode(os.path.realpath(folder))):08x}.json"
        held = lock(file.with_suffix(".lock"))  # Of processes that start together, one reads the files.
    except (OSError, ValueError):  # no home, or none that can be written
        yield {}
        return
    with closing(held):
        known: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            known = dict(json.loads(file.read_text()))
        before = dict(known)
        yield known
        if known != before:
            with suppress(OSError), write_atomically(file) as stream:
                stream.write(json.dumps(known).encode())
