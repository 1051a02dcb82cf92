"""Pickles read without executing them: names in a pickle are looked up in a table, never imported or called."""

import io
import os
import pickle
from typing import Any, ClassVar

import numpy as np

MAX_BYTES = 1 << 25  # Room for 200,000 tensors. A hostile pickle can fill about 64 times as much memory.


class Names(dict):
    """The values of a pickle's dictionary whose keys are strings; also stands for other containers of plain values."""

    def __init__(self, *args: object):
        super().__init__()  # Drops the arguments: one list, passed to many calls, could fill the memory.

    def __setitem__(self, key: object, value: object) -> None:
        if isinstance(key, str | bytes):  # Hashing a deeply nested tuple crashes the interpreter.
            super().__setitem__(key, value)

    def append(self, value: object) -> None:
        """Drop an item of a set or a queue."""

    add = extend = append


class Stored:
    """A pickled NumPy array or dtype, unchecked: the first argument it was constructed with and its state."""

    def __init__(self, first: object = None, *_: object):
        self.first, self.state = first, None

    def array(self) -> np.ndarray:
        """The array. Raises an error of any type if this is not an array of numbers."""
        match self.state:
            case (_, shape, Stored(first=code, state=(_, order, *_)), fortran, bytes(data)):
                code, order = (text.decode() if isinstance(text, bytes) else text for text in (code, order))
                dtype = np.dtype(code).newbyteorder(order)
                if dtype.kind in "biuf":
                    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        raise ValueError("it has an array of other values than numbers")


_CONTAINERS = """collections.OrderedDict collections.Counter collections.defaultdict collections.deque
    argparse.Namespace types.SimpleNamespace pathlib.PosixPath pathlib._local.PosixPath pathlib.PurePosixPath
    builtins.set builtins.frozenset builtins.bytearray builtins.complex builtins.dict builtins.list builtins.tuple
    builtins.int builtins.long builtins.float builtins.str builtins.unicode builtins.bool
    _codecs.encode torch.Size torch.device numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar"""
_ARRAYS = "numpy.dtype numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct"
_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING BINBYTES
    SHORT_BINSTRING SHORT_BINBYTES BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BINPERSID
    ADDITEMS"""


class Unpickler(pickle._Unpickler):
    """Rebuilds plain values and stand-ins for the names in `known`; refuses other names and rare opcodes.

    It derives from the unpickler in Python: the one in C accepts all opcodes, some of which allocate memory at will.
    """

    known: ClassVar[dict[str, Any]] = {name: Names for name in _CONTAINERS.split()} | {
        name: Stored for name in _ARRAYS.split()
    }
    stack: list[Any]

    def __init__(self, data: bytes | io.BytesIO, *, encoding: str):
        super().__init__(io.BytesIO(data) if isinstance(data, bytes) else data, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # in protocols up to 2
        if (name := f"{module}.{name}") not in self.known:
            raise ValueError(f"it names {name[:100]!r}, which is unknown here, and nothing that a pickle names is run")
        return self.known[name]

    def _refuse(self) -> None:
        raise ValueError("it uses an opcode that is unusual for arrays, and nothing that a pickle names is run")

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stored):  # Other stand-ins need no state.
            self.stack[-1].state = state

    dispatch: Any = dict.fromkeys(range(256), _refuse)
    dispatch |= {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, op)[0] for op in _OPCODES.split())}
    dispatch |= dict.fromkeys((pickle.EMPTY_DICT[0], pickle.EMPTY_SET[0]), lambda self: self.append(Names()))
    dispatch |= {pickle.FROZENSET[0]: lambda self: [self.pop_mark(), self.append(Names())], pickle.BUILD[0]: _build}


def read_pickle(path: str | os.PathLike[str]) -> dict[str | bytes, Any]:
    """The dictionary of plain values and NumPy arrays in a pickle; strings of Python 2 are bytes.

    Raises errors of any type for a damaged file, ValueError for one of anything else or over 32 MiB.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    names = Unpickler(data, encoding="bytes").load()
    if not isinstance(names, Names):
        raise ValueError("it is no dictionary")
    return {key: value.array() if isinstance(value, Stored) else value for key, value in names.items()}
