"""Files of weights, safetensors and torch, read and written one tensor at a time. Nothing in a file is executed."""

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
from typing import Any, BinaryIO, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from ditx.files import first_line, read_npz, write_atomically
from ditx.pickles import MAX_BYTES, Names, Unpickler

PathLike = str | os.PathLike[str]
Tensors = Mapping[str, np.ndarray]
Load = Callable[[], np.ndarray]
Locate = Callable[[str], tuple[int, int]]  # from the key of a storage to its first byte in the file and its size

# Names of the dtypes in NumPy and torch, in safetensors, and of torch's storages (none for uint16 and larger).
_ROWS = """float64 F64 Double, float32 F32 Float, float16 F16 Half, bfloat16 BF16 BFloat16, bool BOOL Bool,
    int64 I64 Long, int32 I32 Int, int16 I16 Short, int8 I8 Char, uint8 U8 Byte, uint64 U64, uint32 U32, uint16 U16"""
_CODES = [row.split() for row in _ROWS.split(",")]
_DTYPES = {name: np.dtype(jnp.bfloat16 if name == "bfloat16" else name) for name, *_ in _CODES}
_SAFETENSORS = {name: code for name, code, *_ in _CODES}
_STORAGES = {name: f"{storage[0]}Storage" for name, _, *storage in _CODES if storage}


class WeightFile(NamedTuple):
    """Tensors and metadata of a file; `note` says which part of the file the tensors are, "" for the whole file."""

    tensors: Tensors
    metadata: dict[str, str]
    note: str


def read(path: PathLike) -> WeightFile:
    """Open safetensors, a file of `torch.save`, an `.npz`, or the index of shards, recognised by its content.

    Each look-up reads one tensor. Of a training checkpoint, reads the averaged weights, else the others. Names that
    torch's wrappers put around a network are removed. Raises ValueError, as look-ups do, if the file is damaged, has no
    weights, or has a pickle of more than tensors and plain values.
    """
    with _explain_errors(path):
        loaders, metadata, note = _open(path)
        loaders, wrappers = _unwrap(loaders)
        if wrappers:
            note = f"{note or 'its weights'}, without {' and '.join(map(repr, wrappers))} in the names"
        return WeightFile(_Tensors(path, loaders), metadata, note)


def write_safetensors(path: PathLike, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a new file of safetensors. Raises ValueError if the file exists, OSError if the disk is full."""
    # The library's writer needs contiguous copies of all tensors in memory at once; this one copies one at a time.
    specs = sorted(_specs(tensors, _SAFETENSORS), key=lambda spec: -spec[1].itemsize)  # This order aligns each.
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
            # Torch maps files into memory: an extra field of the header places the data at a multiple of 64 bytes.
            start = file.tell() + 30 + len(entry.filename) + 4 + 20 * large
            entry.extra = struct.pack("<2sH", b"FB", -start % 64) + bytes(-start % 64)
            with archive.open(entry, "w", force_zip64=large) as stream:
                stream.write(data)

        add("data.pkl", b"".join([b"\x80\2}(", *(_pickled(str(i), *spec) for i, spec in enumerate(specs)), b"u."]))
        add("byteorder", b"little")
        for i, (name, dtype, _) in enumerate(specs):
            add(f"data/{i}", _bytes(tensors[name], dtype))
        add("version", b"3\n")


class _Tensors(UserDict[str, Any]):
    """Tensors by name. Each look-up reads the file again."""

    def __init__(self, path: PathLike, loaders: dict[str, Load]):
        super().__init__(loaders)
        self.path = path

    def __getitem__(self, name: str) -> np.ndarray:
        load = self.data[name]
        with _explain_errors(self.path):
            return load()


@contextmanager
def _explain_errors(path: PathLike) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A damaged or hostile file raises nearly any type.
        cause = first_line(error)
        if type(error) is not ValueError:
            cause = f"it is damaged or unreadable ({type(error).__name__}: {cause})"
        remedy = "fetch it again, or save only its weights, best as safetensors"
        raise ValueError(f"cannot read weights from {os.fspath(path)}: {cause}; {remedy}") from error


def _open(path: PathLike) -> tuple[dict[str, Load], dict[str, str], str]:
    if not os.path.isfile(path):
        raise ValueError("it is not a file" if os.path.exists(path) else "there is no such file")
    with open(path, "rb") as stream:
        head = stream.read(16)
        stream.seek(0)
        if head[8:9] == b"{":
            file = safe_open(path, framework="np", backend="pread")  # A mapped file stays in memory once read.
            for name in file.offset_keys():
                if (code := file.get_slice(name).get_dtype()) not in _SAFETENSORS.values():
                    raise ValueError(f"{name!r} has dtype {code}, and only {', '.join(_DTYPES)} can be read")
            return {name: partial(file.get_tensor, name) for name in file.offset_keys()}, file.metadata() or {}, ""
        if head.startswith(b"{"):
            return _open_shards(path, json.load(stream)["weight_map"])
        if not head.startswith((b"PK\3\4", pickle.PROTO)):
            raise ValueError(f"it begins with {head!r}, unlike files of safetensors and torch")
        if head.startswith(b"PK") and any(name.endswith(".npy") for name in zipfile.ZipFile(stream).namelist()):
            arrays = read_npz(path)
            return {name: partial(arrays.__getitem__, name) for name in arrays}, {}, ""
        top, locate = _unpickle_zip(stream) if head.startswith(b"PK") else _unpickle_legacy(stream)
        state, note = _pick(top)
        return {name: _loader(path, name, state[name], locate) for name in state}, {}, note


def _open_shards(path: PathLike, names: dict[str, str]) -> tuple[dict[str, Load], dict[str, str], str]:
    """The tensors of an index, which maps their names to files beside it."""
    shards = {}
    for shard in sorted(set(names.values())):
        if os.path.basename(shard) != shard:
            raise ValueError(f"it names the shard {shard[:100]!r}, which is not beside it")
        shards[shard] = read(os.path.join(os.path.dirname(path), shard)).tensors
    if absent := [name for name, shard in names.items() if name not in shards[shard]]:
        raise ValueError(f"its shard {names[absent[0]]} has no tensor {absent[0]!r}")
    return {name: partial(shards[shard].__getitem__, name) for name, shard in names.items()}, {}, ""


# Names that DataParallel, torch.compile, FSDP, activation checkpointing and Lightning's Fabric put before a module's.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_OUTER = ("model", "net", "network", "ema_model")  # attributes of a training module, before all names or none


def _unwrap(loaders: dict[str, Load]) -> tuple[dict[str, Load], list[str]]:
    """The tensors by their names in the bare network, and the parts that were removed from the names."""
    parts = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in loaders}
    removed = {f"{part}." for name in loaders for part in name.split(".") if part in _WRAPPERS}
    if removed and len(loaders) > 1 and ["n_averaged"] in parts.values():  # the counter of torch's AveragedModel
        parts, removed = (
            {name: rest for name, rest in parts.items() if rest != ["n_averaged"]},
            removed | {"n_averaged"},
        )
    while len(firsts := {rest[0] for rest in parts.values() if len(rest) > 1}) == 1 and firsts <= {*_OUTER}:
        if any(len(rest) == 1 for rest in parts.values()):
            break
        removed |= {f"{first}." for first in firsts}
        parts = {name: rest[1:] for name, rest in parts.items()}
    bare = {".".join(rest): loaders[name] for name, rest in parts.items()}
    return (bare, sorted(removed)) if len(bare) == len(parts) and "" not in bare else (loaders, [])


_Storage = namedtuple("_Storage", "dtype key size")
# The arguments with which torch rebuilds a tensor, unchecked.
_Tensor = namedtuple("_Tensor", "storage offset shape strides grad hooks metadata dtype", defaults=[None] * 4)


# Values of torch that can be beside weights, and tensors that cannot be weights here.
_NO_WEIGHTS = """torch.Tensor torch.nn.parameter.Parameter torch.serialization._get_layout torch.complex64
    torch.complex128 torch.float8_e4m3fn torch.float8_e5m2 torch._utils._rebuild_sparse_tensor
    torch._utils._rebuild_qtensor torch._utils._rebuild_meta_tensor_no_storage"""


class _TorchUnpickler(Unpickler):
    """Also rebuilds torch's tensors, as descriptions of where their data is in the file."""

    known: ClassVar[dict[str, Any]] = {
        **Unpickler.known,
        "torch._utils._rebuild_tensor": _Tensor,
        "torch._utils._rebuild_tensor_v2": _Tensor,
        "torch._utils._rebuild_tensor_v3": lambda *args: _Tensor(*args[:6], *args[7:], dtype=args[6]),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: _Tensor(*args),
        **dict.fromkeys(_NO_WEIGHTS.split(), Names),
        "torch.storage.UntypedStorage": _DTYPES["uint8"],
        **{f"torch.{storage}": _DTYPES[name] for name, storage in _STORAGES.items()},
        **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    }

    def __init__(self, data: bytes | io.BytesIO):
        super().__init__(data, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, size, *view) if view in ([], [None]):
                return self.storages.setdefault(key, _Storage(dtype, key, size))
        raise ValueError("it refers to an object that is not the storage of a tensor")


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
        return file.read(min(size, MAX_BYTES))

    if f"{roots[0]}byteorder" in archive.NameToInfo and content("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    return _TorchUnpickler(content("data.pkl")).load(), lambda key: locate(f"data/{key}")


def _unpickle_legacy(file: BinaryIO) -> tuple[Any, Locate]:
    """The format of torch before 1.6: five pickles, then each storage with its size before it."""
    head = io.BytesIO(file.read(MAX_BYTES))
    if _TorchUnpickler(head).load() != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is a pickle that torch.save did not write")
    version, system, unpickler = _TorchUnpickler(head).load(), _TorchUnpickler(head).load(), _TorchUnpickler(head)
    if version != 1001 or system["little_endian"] is not True:
        raise ValueError("its numbers are not little-endian, or its version is not 1001")
    top, keys, end, places = unpickler.load(), _TorchUnpickler(head).load(), head.tell(), {}
    for key in keys:
        file.seek(end)
        (count,) = struct.unpack("<Q", file.read(8))
        if not isinstance(key, str) or count != unpickler.storages[key].size:
            raise ValueError("the sizes of its storages contradict each other")
        places[key] = end + 8, count * unpickler.storages[key].dtype.itemsize
        end = sum(places[key])
    if end > os.fstat(file.fileno()).st_size:
        raise ValueError("it is truncated")
    return top, places.__getitem__


def _pick(top: Any) -> tuple[dict[str, _Tensor], str]:
    """The weights in a pickle's outermost value, and a note on where they were."""
    names = top if isinstance(top, Names) else {}
    parts = [(names[key], f"its {key!r} weights") for key in _PARTS.split() if key in names]
    for state, note in [(names, ""), *parts]:
        if isinstance(state, Names) and state and all(isinstance(value, _Tensor) for value in state.values()):
            return state, note
    keys = ", ".join(repr(key[:40]) for key in list(names)[:20]) or "nothing"
    raise ValueError(f"neither it nor its 'ema', 'model' or 'state_dict' maps names to tensors; it has {keys}")


# Keys of a training checkpoint that map names to weights, averages first.
_PARTS = "ema ema_model model_ema model_ema1 ema_state_dict state_dict_ema model model_state_dict state_dict module net"


def _loader(path: PathLike, name: str, tensor: _Tensor, locate: Locate) -> Load:
    """Check that a tensor is within its storage, and return the function that reads it."""
    storage, offset, shape, strides, _, _, metadata, dtype = tensor
    sound = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple) and not metadata
    numbers = (offset, *shape, *strides) if sound and len(shape) == len(strides) <= 64 else (None,)
    dtype = dtype or (sound and storage.dtype)
    if not isinstance(dtype, np.dtype) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{name!r} is unlike the tensors that torch.save writes")
    start, size = locate(storage.key)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    if max(offset + extent, math.prod(shape)) * dtype.itemsize > size:
        raise ValueError(f"{name!r} takes more than the {size:,} bytes of its storage")

    def load() -> np.ndarray:
        flat = np.fromfile(path, dtype, extent, offset=start + offset * dtype.itemsize)
        if flat.size != extent:  # `np.ndarray` checks all buffers but empty ones.
            raise ValueError("it is truncated")
        return np.asarray(np.ndarray(shape, dtype, flat, strides=[n * dtype.itemsize for n in strides]), order="C")

    return load


def _specs(tensors: Tensors, codes: dict[str, str]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    for name, array in tensors.items():
        if array.dtype.name not in codes:
            raise ValueError(f"{name!r} has dtype {array.dtype}, and only {', '.join(codes)} can be written")
    return [(name, _DTYPES[array.dtype.name], array.shape) for name, array in tensors.items()]


def _bytes(array: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _pickled(key: str, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """An item of a dictionary in a pickle of protocol 2: a name and a tensor, as torch writes it."""

    def plain(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)  # without protocol and stop

    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    storage = plain("storage") + f"ctorch\n{_STORAGES[dtype.name]}\n".encode() + plain(key, "cpu", math.prod(shape))
    arguments = b"(" + storage + b"tQ" + plain(0, shape, strides, False) + b"ccollections\nOrderedDict\n)R"
    return plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


@contextmanager
def _new_file(path: PathLike) -> Iterator[BinaryIO]:
    if os.path.lexists(path):
        raise ValueError(f"{os.fspath(path)} already exists; remove it or give another path")
    with write_atomically(path) as file:
        yield file
