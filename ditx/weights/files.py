"""Files of weights, of safetensors and torch: read and written tensor by tensor, and nothing in them is run."""

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

PathLike = str | os.PathLike[str]
Tensors = Mapping[str, np.ndarray]
Load = Callable[[], np.ndarray]
Locate = Callable[[str], tuple[int, int]]  # where a storage begins in its file, and its size, in bytes

# Names of dtypes: NumPy's, which are torch's; safetensors'; and of torch's storages, which uint16 and larger lack.
_ROWS = """float64 F64 Double, float32 F32 Float, float16 F16 Half, bfloat16 BF16 BFloat16, bool BOOL Bool,
    int64 I64 Long, int32 I32 Int, int16 I16 Short, int8 I8 Char, uint8 U8 Byte, uint64 U64, uint32 U32, uint16 U16"""
_CODES = [row.split() for row in _ROWS.split(",")]
_DTYPES = {name: np.dtype(jnp.bfloat16 if name == "bfloat16" else name) for name, *_ in _CODES}
_SAFETENSORS = {name: code for name, code, *_ in _CODES}
_STORAGES = {name: f"{storage[0]}Storage" for name, _, *storage in _CODES if storage}
_LARGEST_PICKLE = 1 << 25  # Room for 200,000 tensors; what a hostile one can fill is some 64 times as much memory.


class WeightFile(NamedTuple):
    """What a file of weights holds; `note` says, fit for printing, which part of it that is ("" for all, as it is)."""

    tensors: Tensors
    metadata: dict[str, str]
    note: str


def read(path: PathLike) -> WeightFile:
    """Open a file of safetensors or of `torch.save`, known by its content; each look-up in `tensors` reads one anew.

    Of a training checkpoint, the weights under "ema", else "model", else "state_dict" are taken. Raises ValueError, as
    look-ups do, where the file is damaged, holds no weights, or holds a pickle of more than tensors and plain values.
    """
    with _explained(path):
        loaders, metadata, note = _open(path)
        if loaders and all(name.startswith("module.") for name in loaders):  # as torch's DataParallel has it
            loaders = {name.removeprefix("module."): loader for name, loader in loaders.items()}
            note = f"{note or 'its weights'}, less 'module.' before each name"
        return WeightFile(_Tensors(path, loaders), metadata, note)


def write_safetensors(path: PathLike, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a new file of safetensors. Raises ValueError where the path is taken, OSError where the disk is full."""
    # The library's own writer would need all tensors contiguous, and so in memory, at once.
    specs = sorted(_specs(tensors, _SAFETENSORS), key=lambda spec: -spec[1].itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in specs:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _SAFETENSORS[dtype.name], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _new_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, _ in specs:
            file.write(_bytes(tensors[name], dtype))


def write_torch(path: PathLike, tensors: Tensors) -> None:
    """Write a new file for `torch.load`, without torch. Raises as `write_safetensors` does."""
    specs = _specs(tensors, _STORAGES)
    with _new_file(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, data: bytes | memoryview) -> None:
            entry, large = zipfile.ZipInfo(f"archive/{name}"), len(data) >= 1 << 31
            # Torch maps files into memory, and has an unused field of the header put data at multiples of 64 bytes.
            start = file.tell() + 30 + len(entry.filename) + 4 + 20 * large
            entry.extra = struct.pack("<2sH", b"FB", -start % 64) + bytes(-start % 64)
            with archive.open(entry, "w", force_zip64=large) as stream:
                stream.write(data)

        add("data.pkl", b"".join([b"\x80\2}(", *(_pickled(str(i), *spec) for i, spec in enumerate(specs)), b"u."]))
        add("byteorder", b"little")
        for i, (name, dtype, _) in enumerate(specs):
            add(f"data/{i}", _bytes(tensors[name], dtype))
        add("version", b"3\n")


def fetch(repository: str, file: str) -> Path:
    """Download one file of a repository of the Hugging Face hub, unless it is in the hub's cache."""
    what = f"{file} of {repository} cannot be fetched from the Hugging Face hub"
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]

        return Path(hf_hub_download(repository, file))
    except ImportError as error:
        remedy = "`uv run --extra hub ...` or `pip install huggingface-hub` brings it, or give the path of a file"
        raise ValueError(f"{what} without the package huggingface_hub; {remedy}") from error
    except Exception as error:  # Hub, network and disk raise many kinds.
        raise ValueError(f"{what} ({_line(error)}); check both names and the network, or give a path") from error


class _Tensors(UserDict[str, Any]):
    """Tensors by name, each loaded anew when it is looked up."""

    def __init__(self, path: PathLike, loaders: dict[str, Load]):
        super().__init__(loaders)
        self.path = path

    def __getitem__(self, name: str) -> np.ndarray:
        load = self.data[name]
        with _explained(self.path):
            return load()


def _line(error: Exception) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}".rstrip(": ")[:300]


@contextmanager
def _explained(path: PathLike) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A damaged or hostile file raises nearly anything.
        cause = _line(error) if type(error) is ValueError else f"it is damaged or unreadable ({_line(error)})"
        remedy = "fetch it again, or save its weights alone, best as safetensors"
        raise ValueError(f"cannot read weights from {os.fspath(path)}: {cause}; {remedy}") from error


def _open(path: PathLike) -> tuple[dict[str, Load], dict[str, str], str]:
    if not os.path.isfile(path):
        raise ValueError("it is no file" if os.path.exists(path) else "there is no such file")
    with open(path, "rb") as stream:
        head = stream.read(16)
        stream.seek(0)
        if head[8:9] == b"{":
            file = safe_open(path, framework="np", backend="pread")  # A mapped file would stay in memory once read.
            for name in file.offset_keys():
                if (code := file.get_slice(name).get_dtype()) not in _SAFETENSORS.values():
                    raise ValueError(f"{name!r} is of dtype {code}, and only {', '.join(_DTYPES)} can be read")
            return {name: partial(file.get_tensor, name) for name in file.offset_keys()}, file.metadata() or {}, ""
        if not head.startswith((b"PK\3\4", pickle.PROTO)):
            raise ValueError(f"it begins with {head!r}, as neither safetensors nor torch's files do")
        top, locate = _unpickle_zip(stream) if head.startswith(b"PK") else _unpickle_legacy(stream)
        state, note = _pick(top)
        return {name: _loader(path, name, state[name], locate) for name in state}, {}, note


class _Names(dict):
    """What strings name in a pickle; stands for other holders of plain values too."""

    def __init__(self, *args: object):
        super().__init__()  # The arguments are dropped, since one list, given to many calls, could fill the memory.

    def __setitem__(self, key: object, value: object) -> None:
        if isinstance(key, str):  # The hash of a tuple nested deeply crashes the interpreter.
            super().__setitem__(key, value)


_Storage = namedtuple("_Storage", "dtype key size")
# What torch rebuilds a tensor from, not yet checked.
_Tensor = namedtuple("_Tensor", "storage offset shape strides grad hooks metadata dtype", defaults=[None] * 4)
_HOLDERS = """collections.OrderedDict argparse.Namespace pathlib.PosixPath pathlib._local.PosixPath _codecs.encode
    torch.Size torch.device numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct"""
_KNOWN: dict[str, Any] = {
    **dict.fromkeys(_HOLDERS.split(), _Names),
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_tensor_v3": lambda *args: _Tensor(*args[:6], *args[7:], dtype=args[6]),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    **{f"torch.{storage}": _DTYPES[name] for name, storage in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING BINBYTES
    SHORT_BINSTRING SHORT_BINBYTES BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BINPERSID"""


class _Unpickler(pickle._Unpickler):
    """Rebuilds plain values and unread tensors; what a pickle names is looked up in `_KNOWN`, never imported.

    The unpickler in Python, since that in C cannot be held to some opcodes, and fills the memory where one asks it to.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (name := f"{module}.{name}") not in _KNOWN:
            raise ValueError(f"it names {name[:100]!r}, which is not read here, and nothing that a pickle names is run")
        return _KNOWN[name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, size, *view) if view in ([], [None]):
                return self.storages.setdefault(key, _Storage(dtype, key, size))
        raise ValueError("it refers to what is no storage of a tensor")

    def _refuse(self) -> None:
        raise ValueError("its pickle does what no pickle of weights does")

    dispatch: Any = dict.fromkeys(range(256), _refuse)
    dispatch |= {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, op)[0] for op in _OPCODES.split())}
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Names())
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()  # drops the state, of which tensors and names have none


def _unpickle_zip(file: BinaryIO) -> tuple[Any, Locate]:
    archive, end = zipfile.ZipFile(file), os.fstat(file.fileno()).st_size
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise ValueError("it is a zip file that torch.save did not write")

    def locate(entry: str) -> tuple[int, int]:
        info = archive.getinfo(roots[0] + entry)
        file.seek(info.header_offset)
        magic, *lengths = struct.unpack("<4s22xHH", file.read(30))
        start = info.header_offset + 30 + sum(lengths)
        if info.compress_type or info.flag_bits & 1 or magic != b"PK\3\4" or start + info.file_size > end:
            raise ValueError(f"its entry {entry[:100]!r} is damaged or, unlike torch's, compressed or encrypted")
        return start, info.file_size

    def content(entry: str) -> bytes:
        start, size = locate(entry)
        file.seek(start)
        return file.read(min(size, _LARGEST_PICKLE))

    if f"{roots[0]}byteorder" in archive.NameToInfo and content("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    return _Unpickler(io.BytesIO(content("data.pkl"))).load(), lambda key: locate(f"data/{key}")


def _unpickle_legacy(file: BinaryIO) -> tuple[Any, Locate]:
    head = io.BytesIO(file.read(_LARGEST_PICKLE))
    if _Unpickler(head).load() != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is a pickle that torch.save did not write")
    version, system, unpickler = _Unpickler(head).load(), _Unpickler(head).load(), _Unpickler(head)
    if version != 1001 or system["little_endian"] is not True:
        raise ValueError("its numbers are not little-endian, or its version is not 1001")
    top, keys, end, places = unpickler.load(), _Unpickler(head).load(), head.tell(), {}
    for key in keys:
        file.seek(end)
        (count,) = struct.unpack("<Q", file.read(8))
        if not isinstance(key, str) or count != unpickler.storages[key].size:
            raise ValueError("the sizes of its storages contradict each other")
        places[key] = end + 8, count * unpickler.storages[key].dtype.itemsize
        end = sum(places[key])
    if end > os.fstat(file.fileno()).st_size:
        raise ValueError("it ends too early")
    return top, places.__getitem__


def _pick(top: Any) -> tuple[dict[str, _Tensor], str]:
    names = top if isinstance(top, _Names) else {}
    parts = [(names[key], f"its {key!r} weights") for key in ("ema", "model", "state_dict") if key in names]
    for state, note in [(names, ""), *parts]:
        if isinstance(state, _Names) and state and all(isinstance(value, _Tensor) for value in state.values()):
            return state, note
    keys = ", ".join(repr(key[:40]) for key in list(names)[:20]) or "nothing"
    raise ValueError(f"neither it nor its 'ema', 'model' or 'state_dict' is tensors by name; it names {keys}")


def _loader(path: PathLike, name: str, tensor: _Tensor, locate: Locate) -> Load:
    """Check that a tensor keeps within its storage, and give what reads it."""
    storage, offset, shape, strides, _, _, metadata, dtype = tensor
    sound = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple) and not metadata
    numbers = (offset, *shape, *strides) if sound and len(shape) == len(strides) <= 64 else (None,)
    dtype = dtype or (sound and storage.dtype)
    if not isinstance(dtype, np.dtype) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{name!r} is unlike the tensors that torch.save writes")
    place, size = locate(storage.key)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    if max(offset + extent, math.prod(shape)) * dtype.itemsize > size:
        raise ValueError(f"{name!r} takes more than the {size:,} bytes of its storage")

    def load() -> np.ndarray:
        flat = np.fromfile(path, dtype, extent, offset=place + offset * dtype.itemsize)
        if flat.size != extent:  # as `ndarray` checks all buffers but empty ones
            raise ValueError("it ends too early")
        return np.asarray(np.ndarray(shape, dtype, flat, strides=[n * dtype.itemsize for n in strides]), order="C")

    return load


def _specs(tensors: Tensors, codes: dict[str, str]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    for name, array in tensors.items():
        if array.dtype.name not in codes:
            raise ValueError(f"{name!r} is of dtype {array.dtype}, and only {', '.join(codes)} can be written")
    return [(name, _DTYPES[array.dtype.name], array.shape) for name, array in tensors.items()]


def _bytes(array: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _pickled(key: str, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """An item of a dictionary in a pickle of protocol 2: a name and, as torch writes it, a tensor."""

    def plain(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)  # less the protocol and the stop

    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    storage = plain("storage") + f"ctorch\n{_STORAGES[dtype.name]}\n".encode() + plain(key, "cpu", math.prod(shape))
    arguments = b"(" + storage + b"tQ" + plain(0, shape, strides, False) + b"ccollections\nOrderedDict\n)R"
    return plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


@contextmanager
def _new_file(path: PathLike) -> Iterator[BinaryIO]:
    """A file that gets its name once it is whole, and of which otherwise nothing is left."""
    name = os.fspath(path)
    if os.path.lexists(path):
        raise ValueError(f"{name} is there already, and is not overwritten; remove it or give another path")
    try:
        with open(f"{name}.{os.getpid()}.partial", "xb") as file:  # The user's own may end in .partial.
            yield file
        os.rename(file.name, path)
    except OSError as error:
        raise OSError(f"cannot write {name} ({_line(error)}); make room or give another path") from error
    finally:
        Path(f"{name}.{os.getpid()}.partial").unlink(missing_ok=True)
