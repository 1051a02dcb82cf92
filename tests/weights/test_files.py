import argparse
import io
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditx.weights import files

KNOWN = files._TorchUnpickler.known
BFLOAT16 = np.dtype(jnp.bfloat16)
TORCH = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": BFLOAT16, "Long": "i8", "Int": "i4", "Short": "i2"}
TORCH |= {"Char": "i1", "Byte": "u1", "Bool": "?"}
DTYPES = [np.dtype(dtype) for dtype in TORCH.values()]
WRITERS = {"safetensors": files.write_safetensors, "torch": files.write_torch}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


@contextmanager
def peak_of_memory():
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_equal(read, expected):
    assert set(read) == set(expected) and len(read) == len(expected)
    for name, array in expected.items():
        assert name in read and read[name].dtype == array.dtype.newbyteorder("=")
        assert read[name].flags.c_contiguous and read[name].flags.writeable
        np.testing.assert_array_equal(read[name], array, strict=array.dtype.isnative)


# Files of torch made without torch: stand-ins are pickled under the names of torch's classes.


class Storage:
    def __init__(self, key, array):
        self.key, self.array = key, np.ascontiguousarray(array).reshape(-1)


class Tensor:
    def __init__(self, storage, shape, strides, offset=0, function="_rebuild_tensor_v2", last=()):
        self.storage, self.function = storage, function
        self.arguments = (storage, offset, shape, strides, False, OrderedDict(), *last)

    def __reduce__(self):
        return named("torch._utils", self.function), self.arguments


class Parameter:
    def __init__(self, tensor):
        self.arguments = (tensor, True, OrderedDict())

    def __reduce__(self):
        return named("torch._utils", "_rebuild_parameter"), self.arguments


class Pickler(pickle._Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            kind = next(name for name, dtype in TORCH.items() if np.dtype(dtype) == obj.array.dtype)
            view = (None,) if self.legacy else ()
            return "storage", named("torch", f"{kind}Storage"), obj.key, "cpu", obj.array.size, *view
        return None

    def save_global(self, obj, name=None):
        if getattr(obj, "fake", False):
            self.write(f"c{obj.__module__}\n{obj.__name__}\n".encode())
        else:
            super().save_global(obj, name)

    dispatch = pickle._Pickler.dispatch | {types.FunctionType: save_global}


def named(module, name):
    def function():
        pass

    function.__module__, function.__name__, function.fake = module, name, True
    return function


def dumps(obj, legacy=False):
    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    pickler.legacy = legacy
    pickler.dump(obj)
    return stream.getvalue()


def whole(key, array):
    strides = [stride // array.itemsize for stride in np.ascontiguousarray(array).strides[: array.ndim]]
    return Tensor(Storage(key, array), array.shape, tuple(strides))


def write_zip(path, pickled, storages=(), extra=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("some/data.pkl", pickled)
        for key, data in dict(storages).items():
            archive.writestr(f"some/data/{key}", data)
        for name, data in dict(extra).items():
            archive.writestr(f"some/{name}", data)
    return path


def write_legacy(path, pickled, storages=(), system=None):
    system = system or {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2}}
    storages = dict(storages)
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [pickled, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def training_checkpoint():
    """The contents of the authors' training checkpoints: network, average, optimizer, command line."""
    arrays = {key: np.random.default_rng(int(key)).normal(size=(3, 4)).astype(np.float32) for key in "0123"}
    optimizer = {
        "state": {0: {"step": Tensor(Storage("3", arrays["3"]), (), ()), "exp_avg": whole("2", arrays["2"])}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1], "fused": True}],
    }
    model = OrderedDict(w=whole("0", arrays["0"]))
    model._metadata = OrderedDict({"": {"version": 1}})
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, paths=[Path("/a/b")], ratio=np.float64(0.5))
    checkpoint = {"model": model, "ema": {"w": Parameter(whole("1", arrays["1"]))}, "opt": optimizer, "args": args}
    return checkpoint | {"rng": np.random.default_rng(0).integers(9, size=3), "large": 2**80}, arrays


# Files that we wrote.


@given(data=st.data())
def test_arrays_come_back_as_written(data, tmp_path_factory):
    tensors = {}
    for i in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from([*DTYPES, np.dtype(">f4"), np.dtype(">i8")]))
        array = data.draw(hnp.arrays(np.int8, SHAPES)).astype(dtype)
        array = array.transpose(data.draw(st.permutations(range(array.ndim))))
        name = f"{i}." + data.draw(st.text('aé."\\ \n', max_size=3))
        tensors[name] = array[::2] if array.ndim else array
    metadata = data.draw(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2))
    for name, write in WRITERS.items():
        path = tmp_path_factory.mktemp("weights") / name
        kept = (metadata,) if name == "safetensors" else ()
        write(path, tensors, *kept)
        file = files.read(path)
        assert_equal(file.tensors, tensors)
        assert file.metadata == dict(*kept) and file.note == ""


def test_arrays_can_be_changed_and_written_again(tmp_path, write):
    write(tmp_path / "a", {"x": np.arange(4.0)})
    tensors = files.read(tmp_path / "a").tensors
    tensors["x"][0] = 7
    assert tensors["x"][0] == 0
    write(tmp_path / "b", tensors)
    assert_equal(files.read(tmp_path / "b").tensors, {"x": np.arange(4.0)})
    with pytest.raises(KeyError):
        tensors["y"]


def test_only_safetensors_has_unsigned_integers(tmp_path):
    arrays = {name: np.arange(3, dtype=name) for name in ("uint16", "uint32", "uint64")}
    files.write_safetensors(tmp_path / "a", arrays)
    assert_equal(files.read(tmp_path / "a").tensors, arrays)
    with pytest.raises(ValueError, match="'uint16' has dtype uint16, and only float64"):
        files.write_torch(tmp_path / "b", arrays)
    with pytest.raises(ValueError, match="complex64"):
        files.write_safetensors(tmp_path / "c", {"z": np.zeros(2, np.complex64)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensors_are_aligned(tmp_path):
    arrays = {"b": np.ones(3, bool), "x": np.ones(5, np.float32), "d": np.ones(2), "y": np.ones((), np.float16)}
    files.write_torch(tmp_path / "a.pt", arrays)
    raw = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
        for i, array in enumerate(arrays.values()):
            info = archive.getinfo(f"archive/data/{i}")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", raw[info.header_offset + 26 :][:4]))
            assert start % 64 == 0 and raw[start : start + array.nbytes] == array.tobytes()
    files.write_safetensors(tmp_path / "a.safetensors", arrays)
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0
    assert all(header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in arrays.items())


# Files of torch.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", TORCH)
def test_dtypes_of_torch(kind, legacy, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(TORCH[kind])
    state = OrderedDict(w=whole("0", array))
    if legacy:
        path = write_legacy(tmp_path / "w.bin", dumps(state, True), {"0": array})
    else:
        path = write_zip(tmp_path / "w.pt", dumps(state), {"0": array.tobytes()}, {"byteorder": b"little"})
    assert_equal(files.read(path).tensors, {"w": array})


@pytest.mark.parametrize("legacy", [False, True])
def test_views_share_a_storage(legacy, tmp_path):
    array = np.arange(24, dtype=np.float32)
    storage = Storage("7", array)
    state = {
        "whole": Tensor(storage, (4, 6), (6, 1)),
        "transposed": Tensor(storage, (6, 4), (1, 6)),
        "stepped": Tensor(storage, (2, 3), (12, 2), 1),
        "one": Tensor(storage, (), (), 23),
        "none": Tensor(storage, (0, 3), (3, 1), 24),
        "repeated": Tensor(storage, (5, 2), (0, 1), 3),
    }
    other = np.array([5, 6], np.int64)
    state["other"] = whole("8", other)
    if legacy:
        path = write_legacy(tmp_path / "w", dumps(state, True), {"7": array, "8": other})
    else:
        path = write_zip(tmp_path / "w", dumps(state), {"7": array.tobytes(), "8": other.tobytes()})
    grid = array.reshape(4, 6)
    expected = {"whole": grid, "transposed": grid.T, "stepped": grid[::2, 1:6:2], "one": array[23], "other": other}
    expected |= {"none": np.zeros((0, 3), np.float32), "repeated": np.tile(array[3:5], (5, 1))}
    assert_equal(files.read(path).tensors, expected)


def test_dtypes_without_a_storage_of_their_own(tmp_path):
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    tensor = Tensor(
        Storage("0", array.view(np.uint8)), (3, 2), (1, 3), 0, "_rebuild_tensor_v3", (named("torch", "uint16"),)
    )
    path = write_zip(tmp_path / "w", dumps({"w": tensor}), {"0": array.tobytes()})
    assert_equal(files.read(path).tensors, {"w": array.T})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_later_protocols_of_pickle_are_read(protocol, tmp_path):
    array = np.arange(3.0)
    pickled = pickle.dumps([1.5, "é", b"bytes", {"a": [None, True, 2**40]}, (1, 2, 3, 4)], protocol)
    body = dumps({"w": whole("0", array)})[2:-1]
    pickled = (
        pickle.PROTO
        + bytes([protocol])
        + b"}(X\4\0\0\0misc"
        + dumps([1, {"b": (2,)}])[2:-1]
        + b"X\5\0\0\0model"
        + body
        + b"u."
    )
    assert_equal(files.read(write_zip(tmp_path / "w", pickled, {"0": array.tobytes()})).tensors, {"w": array})


@pytest.mark.parametrize("legacy", [False, True])
def test_training_checkpoints_yield_the_average(legacy, tmp_path):
    checkpoint, arrays = training_checkpoint()
    if legacy:
        path = write_legacy(tmp_path / "0100000.pt", dumps(checkpoint, True), arrays)
    else:
        path = write_zip(tmp_path / "0100000.pt", dumps(checkpoint), {key: a.tobytes() for key, a in arrays.items()})
    file = files.read(path)
    assert_equal(file.tensors, {"w": arrays["1"]})
    assert file.note == "its 'ema' weights" and file.metadata == {}


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        (["model", "ema", "state_dict"], "its 'ema' weights"),
        (["state_dict", "model"], "its 'model' weights"),
        (["state_dict"], "its 'state_dict' weights"),
    ],
)
def test_the_average_comes_first(keys, note, tmp_path):
    arrays = {key: np.array([i], np.float32) for i, key in enumerate(keys)}
    state = {key: {"w": whole(key, array)} for key, array in arrays.items()} | {"epoch": 3}
    path = write_zip(tmp_path / "w.ckpt", dumps(state), {key: array.tobytes() for key, array in arrays.items()})
    file = files.read(path)
    assert file.note == note
    assert_equal(file.tensors, {"w": arrays[note.split("'")[1]]})


def test_the_prefix_of_data_parallel_is_removed(tmp_path):
    a, b = np.arange(2.0), np.arange(3.0)
    files.write_safetensors(tmp_path / "a", {"module.a": a, "module.b": b})
    file = files.read(tmp_path / "a")
    assert_equal(file.tensors, {"a": a, "b": b})
    assert file.note == "its weights, without 'module.' in the names"
    path = write_zip(tmp_path / "b", dumps({"ema": {"module.a": whole("0", a)}}), {"0": a.tobytes()})
    assert files.read(path).note == "its 'ema' weights, without 'module.' in the names"


@pytest.mark.parametrize(
    ("names", "removed"),
    [
        (("_orig_mod.a.w", "_orig_mod.b"), "'_orig_mod.'"),
        (("module._orig_mod.a.w", "module._orig_mod.b"), "'_orig_mod.' and 'module.'"),
        (("_orig_mod.module.a._orig_mod.w", "_orig_mod.module.b"), "'_orig_mod.' and 'module.'"),
        (("a._checkpoint_wrapped_module.w", "b"), "'_checkpoint_wrapped_module.'"),
        (("_fsdp_wrapped_module.a._fsdp_wrapped_module.w", "_fsdp_wrapped_module.b"), "'_fsdp_wrapped_module.'"),
        (("model.module.a.w", "model.module.b"), "'model.' and 'module.'"),
        (("module.a.w", "module.b", "n_averaged"), "'module.' and 'n_averaged'"),
        (("_orig_mod.module.a.w", "_orig_mod.module.b", "_orig_mod.n_averaged"), None),
    ],
)
def test_names_of_wrappers_are_removed_at_any_depth(names, removed, tmp_path):
    a, b = np.arange(2.0), np.arange(3.0)
    files.write_safetensors(tmp_path / "a", dict(zip(names, (a, b, np.array(5)), strict=False)))
    file = files.read(tmp_path / "a")
    assert_equal(file.tensors, {"a.w": a, "b": b})
    assert removed is None or file.note == f"its weights, without {removed} in the names"


@pytest.mark.parametrize("names", [("module.a", "a"), ("n_averaged", "a"), ("model.a", "net.b"), ("model", "model.b")])
def test_names_that_would_collide_or_differ_are_kept(names, tmp_path):
    arrays = {name: np.arange(3.0) for name in names}
    files.write_safetensors(tmp_path / "a", arrays)
    assert_equal(files.read(tmp_path / "a").tensors, arrays)


@pytest.mark.parametrize(
    "beside",
    [
        {"milestones": Counter([2, 3, 3])},
        {"set": {1, "a"}, "empty": set(), "frozen": frozenset({1})},
        {"default": defaultdict(list, a=[1]), "queue": deque([1, 2], 5)},
        {"bytes": bytearray(b"ab"), "complex": 1j, "ordered": OrderedDict(a=OrderedDict(b=1)), "kinds": [int, dict]},
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_beside_weights_are_read(beside, protocol, tmp_path):
    array = np.arange(3.0)
    body, plain = dumps({"w": whole("0", array)})[2:-1], pickle.dumps(beside, protocol)
    # One dictionary of both. The later protocol, which numbers its memo by position, comes first.
    pickled = pickle.PROTO + bytes([protocol]) + b"}(X\6\0\0\0beside" + plain[2:-1]
    pickled += b"X\5\0\0\0model" + body + b"u."
    assert_equal(files.read(write_zip(tmp_path / "w", pickled, {"0": array.tobytes()})).tensors, {"w": array})


def test_parameters_with_attributes_are_read(tmp_path):
    array = np.arange(3.0)

    class WithState:
        def __init__(self, function, *arguments):
            self.function, self.arguments = function, arguments

        def __reduce__(self):
            return self.function, self.arguments

    tensor = whole("0", array)
    rebuild = named("torch._tensor", "_rebuild_from_type_v2")
    parts = named("torch._utils", "_rebuild_tensor_v2"), named("torch", "Tensor"), tensor.arguments, {"tag": 1}
    parameter = WithState(named("torch._utils", "_rebuild_parameter_with_state"), tensor, True, OrderedDict(), {"a": 1})
    path = write_zip(tmp_path / "w", dumps({"v": WithState(rebuild, *parts), "w": parameter}), {"0": array.tobytes()})
    assert_equal(files.read(path).tensors, {"v": array, "w": array})


def test_shards_are_read_by_their_index(tmp_path):
    arrays = {name: np.arange(3.0) + i for i, name in enumerate("abc")}
    for shard, names in {"1.safetensors": "ab", "2.safetensors": "c"}.items():
        files.write_safetensors(tmp_path / shard, {name: arrays[name] for name in names})
    index, names = tmp_path / "w.index.json", {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": names}))
    assert_equal(files.read(index).tensors, arrays)
    for wrong, sentence in [
        ({"c": "3.safetensors"}, "there is no such file"),
        ({"c": "1.safetensors"}, "its shard 1.safetensors has no tensor 'c'"),
        ({"c": "../2.safetensors"}, "names the shard '../2.safetensors', which is not beside it"),
    ]:
        index.write_text(json.dumps({"weight_map": names | wrong}))
        with pytest.raises(ValueError, match=sentence):
            files.read(index)
    index.write_text("{")
    with pytest.raises(ValueError, match="damaged or unreadable"):
        files.read(index)


@pytest.mark.parametrize("obj", [{}, {"a": 1, "net": {"b": None}}, [1], 3, {"model": {"w": 1}, "net": {}}])
def test_files_without_weights_are_refused_with_their_keys(obj, tmp_path):
    with pytest.raises(ValueError, match="maps names to tensors; it has") as error:
        files.read(write_zip(tmp_path / "w.pt", dumps(obj)))
    assert all(repr(key) in str(error.value) for key in (obj if isinstance(obj, dict) else []))


# Hostile files.


@pytest.fixture
def refused(tmp_path):
    """Checks that a pickle is refused in both formats, and that the command in it did not run."""
    mark = tmp_path / "ran"

    def check(pickled, match="cannot read weights from", storages=()):
        line = f"touch {mark}".encode()
        pickled = pickled.replace(RUN, b"X" + struct.pack("<I", len(line)) + line)
        data = {key: np.frombuffer(value, np.uint8) for key, value in dict(storages).items()}
        paths = [write_zip(tmp_path / "w.pt", pickled, storages), write_legacy(tmp_path / "w.bin", pickled, data)]
        for path in [*paths, tmp_path / "plain.pt"]:
            if path.name == "plain.pt":
                path.write_bytes(pickled)
            start = time.process_time()
            with pytest.raises(ValueError, match=r"cannot read weights from .*; fetch it again") as error:
                files.read(path)
            assert time.process_time() - start < 5 and len(str(error.value)) < 800 and "\n" not in str(error.value)
            if path.suffix == ".pt" and path.name != "plain.pt":
                assert match in str(error.value)
        assert not mark.exists()

    return check


RUN = b"<a command that leaves a file>"


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(" + RUN + b"tR.",
        b"\x80\2cos\nsystem\n" + RUN + b"\x85R.",
        b"\x80\2cposix\nsystem\n" + RUN + b"\x85R.",
        b"\x80\2csubprocess\nPopen\n" + RUN + b"\x85R.",
        b"\x80\2cbuiltins\neval\n" + RUN + b"\x85R.",
        b"\x80\2c__builtin__\nexec\n" + RUN + b"\x85R.",
        b"\x80\2cbuiltins\ngetattr\n(cos\nsystem\nX\4\0\0\0nametR.",
        b"\x80\2ctorch.serialization\nload\n" + RUN + b"\x85R.",
        b"\x80\2ctorch._utils\n_rebuild_tensor\n)R.",
        b"\x80\2ctorch\nhub.load\n" + RUN + b"\x85R.",
        b"\x80\2ccollections\nOrderedDict.__init__\n)R.",
        b"\x80\2ccollections\n_sys.modules\n.",
        b"\x80\2cargparse\n_os.system\n" + RUN + b"\x85R.",
        b"\x80\4\x8c\2os\x8c\6system\x93" + RUN + b"\x85R.",
        b"\x80\4\x8c\5torch\x8c\12hub.os.get\x93.",
        b"\x80\4\x8c\x0acollections\x8c\x15OrderedDict.__class__\x93.",
        b"\x80\4]\x8c\1a\x93.",
        b"\x80\2(" + RUN + b"ios\nsystem\n.",
        b"\x80\2(cos\nsystem\n" + RUN + b"o.",
        b"\x80\2\x82\x01.",
        b"\x80\2\x84\xff\xff\xff\x7f.",
        b"\x80\2Pos.system\n.",
        b"\x80\2cnumpy\nload\n" + RUN + b"\x85R.",
        b"\x80\2cpathlib\nPath.touch\n" + RUN + b"\x85R.",
        b"\x80\2ctorch\nfloat8_e4m3fn\n.",
        b"\x80\2ctorch._tensor\n_rebuild_from_type_v2\n.",
    ],
)
def test_commands_in_a_pickle_are_not_run(pickled, refused):
    refused(pickled)


def test_the_refusal_tells_the_name(refused, tmp_path):
    refused(b"\x80\2cos\nsystem\n" + RUN + b"\x85R.", "it names 'os.system', which is unknown here, and nothing that a")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\2ccollections\nOrderedDict\n)R}X\t\0\0\0__class__cargparse\nNamespace\nsb.",  # a state that has a class
        b"\x80\2cargparse\nNamespace\n}X\7\0\0\0__new__cargparse\nNamespace\nsb)\x81.",  # state for a class
        b"\x80\2ctorch._utils\n_rebuild_parameter\nN}X\14\0\0\0__defaults__)s\x86b.",  # state for a function
        b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0as)R.",
        b"\x80\2ctorch\nFloatStorage\n)R.",
        b"\x80\2ctorch\nFloatStorage\n(K\1K\2tb.",
        b"\x80\2ctorch\nFloatStorage\n)\x81.",
        b"\x80\2X\1\0\0\0a)R.",
        b"\x80\2]K\1K\2s.",
        b"\x80\2ccollections\nOrderedDict\nK\1a.",
        b"\x80\2ccollections\nOrderedDict\nK\1K\1s.",
        b"\x80\2ctorch._utils\n_rebuild_tensor_v3\n)R.",
    ],
)
def test_odd_uses_of_known_names_are_refused(pickled, refused):
    known = dict(KNOWN)
    refused(pickled)
    assert known == KNOWN
    assert KNOWN["torch._utils._rebuild_parameter"].__defaults__ is None
    assert not vars(KNOWN["torch._utils._rebuild_parameter"])


PLACES = [
    ("NONE", b"N"), ("NUMBER", b"K\5"), ("TUPLE", b")"), ("TEXT", b"X\7\0\0\0storage"), ("LIST", b"]"),
    ("SHORT", b"X\7\0\0\0storagectorch\nFloatStorage\n\x86"),
    ("MODULE", b"(X\6\0\0\0modulectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4t"),
    ("KIND", b"(X\7\0\0\0storageX\1\0\0\0fX\1\0\0\x000X\3\0\0\0cpuK\4t"),
    ("KEY", b"(X\7\0\0\0storagectorch\nFloatStorage\nK\0X\3\0\0\0cpuK\4t"),
    ("VIEW", b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4X\1\0\0\x000K\0K\1\x87t"),
]  # fmt: skip


@pytest.mark.parametrize("place", [place for _, place in PLACES], ids=[name for name, _ in PLACES])
def test_odd_references_are_refused(place, refused):
    refused(b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + place + b"QK\0K\1\x85K\1\x85\x89}tRs.")


HUGE = 1 << 62


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (5, (), ()),
        (4, (), ()),
        (0, (2, 2), (3, 1)),
        (0, (2,), (HUGE,)),
        (HUGE, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (3, (4,), (-1,)),
        (0, (-1,), (1,)),
        (0, (HUGE,), (0,)),
        (0, (1 << 32, 1 << 32), (0, 0)),
        (0, (5,), (0,)),
        (0, (10**30,), (0,)),
        (0, (2**5000, 0), (1, 1)),
        (0, (1, 1), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, [1], [1]),
        (0, (1.0,), (1,)),
        (0, (True,), (1,)),
        (0, "4", "1"),
        (0, 4, 1),
        (None, (1,), (1,)),
        (0, ((1,),), (1,)),
        (0, None, None),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_outside_of_their_storage_are_refused(arguments, legacy, tmp_path):
    offset, shape, strides = arguments
    array = np.zeros(4, np.float32)
    state = {"w": Tensor(Storage("0", array), shape, strides, offset)}
    if legacy:
        path = write_legacy(tmp_path / "w", dumps(state, True), {"0": array})
    else:
        path = write_zip(tmp_path / "w", dumps(state), {"0": array.tobytes()}, {"after": bytes(1000)})
    with pytest.raises(ValueError, match=r"cannot read weights from .*: 'w' (takes more than|is unlike)"):
        files.read(path)


@given(
    shape=st.lists(st.integers(0, 5) | st.integers(), max_size=3),
    strides=st.lists(st.integers(0, 9) | st.integers(), max_size=3),
    offset=st.integers(0, 24) | st.integers(),
)
def test_a_tensor_is_read_as_numpy_would_or_refused(shape, strides, offset, tmp_path_factory):
    array = np.arange(24, dtype=np.int32)
    state = {"w": Tensor(Storage("0", array), tuple(shape), tuple(strides), offset)}
    path = write_zip(tmp_path_factory.mktemp("w") / "w", dumps(state), {"0": array.tobytes()})
    try:
        expected = np.ndarray(shape, array.dtype, array, offset * 4, [stride * 4 for stride in strides])
        assert min([offset, *strides]) >= 0 and expected.size <= array.size and len(shape) == len(strides)
    except Exception:
        with pytest.raises(ValueError, match="cannot read weights"):
            assert files.read(path).tensors["w"].size == 0  # NumPy is stricter about the offset of an empty array.
            raise ValueError("cannot read weights") from None
    else:
        assert_equal(files.read(path).tensors, {"w": expected})


def test_conjugated_and_negated_tensors_are_refused(tmp_path):
    tensor = Tensor(Storage("0", np.zeros(1)), (1,), (1,), last=({"neg": True},))
    with pytest.raises(ValueError, match="'w' is unlike"):
        files.read(write_zip(tmp_path / "w", dumps({"w": tensor}), {"0": bytes(8)}))


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\2Nr\xf0\xff\xff\xff.",  # a memo of 2^32 entries
        b"\x80\5\x96" + struct.pack("<Q", 1 << 28) + b".",  # a byte array of 2^28
        b"\x80\4\x8d" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\4\x95" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\2T\xff\xff\xff\x7f.",
        b"\x80\2\x8b\xff\xff\xff\x7f.",
        pickle.dumps([(str(i), i) for i in range(1000)], 2)[:-1]
        + b"("
        + b"ccollections\nOrderedDict\nh\0\x85R" * 1000
        + b"t.",
    ],
)
def test_memory_is_not_filled(pickled, refused):
    with peak_of_memory() as peak:
        refused(pickled)
        assert peak() < 50e6


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\2})" + b"\x85" * 200_000 + b"Ns.",  # Hashing it would crash the interpreter.
        b"\x80\4()" + b"\x85" * 200_000 + b"\x91.",
        b"\x80\2}q\0N)" + b"\x85" * 200_000 + b"Q.",
        b"\x80\2" + b"(" * 200_000 + b".",
        b"\x80\2" + b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\2)"
        + b"q\0h\0\x86" * 200
        + b"ctorch\nx\n.",  # Printing or hashing this and the next four would never end.
        b"\x80\2}X\5\0\0\0model)" + b"q\0h\0\x86" * 200 + b"s.",
        b"\x80\2})" + b"q\0h\0\x86" * 200 + b"Ns.",
        b"\x80\2)" + b"q\0h\0\x86" * 200 + b"Q.",
        b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + b")" + b"q\0h\0\x86" * 200 + b"h\0h\0h\0tRs.",
        b"\x80\2cos\n" + b"x" * 1_000_000 + b"\n.",
    ],
    ids=range(11),
)
def test_deep_and_wide_pickles_are_refused_soon(pickled, refused):
    refused(pickled)


def test_odd_zip_files_are_refused(tmp_path):
    array = np.zeros(1000, np.float32)
    pickled, storages = dumps({"w": whole("0", array)}), {"0": array.tobytes()}
    path = write_zip(tmp_path / "compressed", pickled, storages, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'data\.pkl' is damaged or, unlike torch's, compressed"):
        files.read(path)
    with pytest.raises(ValueError, match="not little-endian"):
        files.read(write_zip(tmp_path / "big", pickled, storages, {"byteorder": b"big"}))
    with pytest.raises(ValueError, match="no item named 'some/data/0'"):
        files.read(write_zip(tmp_path / "missing", pickled))
    with pytest.raises(ValueError, match=r"a zip file that torch\.save did not write"):
        with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
            archive.writestr("w.txt", "no weights")
        files.read(tmp_path / "w.zip")
    np.savez(tmp_path / "w.npz", w=array)
    assert_equal(files.read(tmp_path / "w.npz").tensors, {"w": array})
    raw = write_zip(tmp_path / "w", pickled, storages).read_bytes()
    at = raw.index(b"PK\1\2", raw.index(b"PK\1\2") + 1)  # the size of data/0 in the directory
    (tmp_path / "w").write_bytes(raw[: at + 20] + struct.pack("<II", 1 << 30, 1 << 30) + raw[at + 28 :])
    with pytest.raises(ValueError, match="'data/0' is damaged"):
        files.read(tmp_path / "w")


def test_odd_legacy_files_are_refused(tmp_path):
    array = np.zeros(5, np.float32)
    pickled = dumps({"w": whole("0", array)}, True)
    with pytest.raises(ValueError, match="not little-endian"):
        files.read(write_legacy(tmp_path / "w", pickled, {"0": array}, {"little_endian": False}))
    for storages in ({"0": array[:4]}, {"0": np.zeros(6, np.float32)}, {"1": array}, {}, {("0",): array}):
        with pytest.raises(ValueError, match="cannot read weights"):
            files.read(write_legacy(tmp_path / "w", pickled, storages))
    (tmp_path / "w").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(ValueError, match=r"a pickle that torch\.save did not write"):
        files.read(tmp_path / "w")


# Damaged and missing files.


def sound_files(folder):
    checkpoint, arrays = training_checkpoint()
    checkpoint = {key: checkpoint[key] for key in ("ema", "args")}
    write_zip(folder / "zip", dumps(checkpoint), {"1": arrays["1"].tobytes()}, {"byteorder": b"little"})
    write_legacy(folder / "legacy", dumps(checkpoint, True), {"1": arrays["1"]})
    files.write_torch(folder / "torch", {"w": arrays["1"]})
    files.write_safetensors(folder / "safetensors", {"w": arrays["1"], "v": np.ones(3, np.float16)}, {"a": "b"})
    return [folder / name for name in ("zip", "legacy", "torch", "safetensors")]


def test_truncated_files_are_refused(tmp_path):
    for path in sound_files(tmp_path):
        raw = path.read_bytes()
        assert files.read(path).tensors["w"].shape == (3, 4)
        for length in {*range(0, len(raw), 7), *range(20), *range(len(raw) - 20, len(raw))}:
            path.write_bytes(raw[:length])
            with pytest.raises(ValueError, match="cannot read weights from"):
                files.read(path)


@given(data=st.data())
def test_altered_files_are_read_or_refused(data, tmp_path_factory):
    for path in sound_files(tmp_path_factory.mktemp("altered")):
        raw = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=5)):
            raw[at] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        try:
            [array.sum() for array in files.read(path).tensors.values()]
        except ValueError as error:
            assert "cannot read weights from" in str(error)


def test_files_truncated_after_they_were_opened_are_refused(tmp_path):
    for path in sound_files(tmp_path):
        tensors = files.read(path).tensors
        path.write_bytes(path.read_bytes()[:20])  # With an empty buffer, NumPy would read other memory.
        with pytest.raises(ValueError, match="cannot read weights from"):
            tensors["w"]
        path.unlink()
        if path.name != "safetensors":  # Its file stays open.
            with pytest.raises(ValueError, match="cannot read weights from"):
                tensors["w"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read weights from .*gone\.pt: there is no such file; "):
        files.read(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="it is not a file"):
        files.read(tmp_path)
    for content in (b"", b"\x80", b"{}", b"version https://git-lfs.github.com/spec/v1\n", bytes(100)):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read weights from"):
            files.read(tmp_path / "w.safetensors")
    header = b'{"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="'w' has dtype F8_E4M3, and only float64"):
        files.read(str(tmp_path / "w.safetensors"))


# Memory and disk.


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    size = 1 << 23  # floats in each of 8 tensors of 32 MiB, as holes on the disk
    header = {
        f"w{i}": {"dtype": "F32", "shape": [size], "data_offsets": [4 * size * i, 4 * size * (i + 1)]} for i in range(8)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 32 * size)
    state = {f"w{i}": Tensor(Storage(str(i), np.broadcast_to(np.float32(0), 1)), (size,), (1,)) for i in range(8)}
    for tensor in state.values():
        tensor.storage.array = np.broadcast_to(np.float32(0), size)
    with (tmp_path / "w.pt").open("wb") as file:
        write_legacy(tmp_path / "head", dumps(state, True))
        file.write((tmp_path / "head").read_bytes()[: -len(pickle.dumps([], 2))] + pickle.dumps(list("01234567"), 2))
        for _ in range(8):
            file.write(struct.pack("<q", size))
            file.truncate(file.tell() + 4 * size)
            file.seek(0, io.SEEK_END)
    for name in ("w.safetensors", "w.pt"):
        with peak_of_memory() as peak:
            tensors = files.read(tmp_path / name).tensors
            assert "w3" in tensors and len(tensors) == 8
            assert peak() < 5 * size
            for array in tensors.values():
                assert array.shape == (size,) and array[-1] == 0
            assert peak() < 2.2 * 4 * size
        maps = Path("/proc/self/maps")
        assert not maps.exists() or name not in maps.read_text()


@pytest.mark.parametrize("name", WRITERS)
def test_writing_copies_one_tensor_at_a_time(name, tmp_path):
    tensors = {str(i): np.ones((1000, 1001), np.float32).T for i in range(8)}
    with peak_of_memory() as peak:
        WRITERS[name](tmp_path / name, tensors)
        assert peak() < 2.5 * tensors["0"].nbytes


def test_nothing_is_overwritten(tmp_path, write):
    path = tmp_path / "w"
    path.write_text("mine")
    with pytest.raises(ValueError, match="already exists; remove it or give"):
        write(path, {"w": np.zeros(3)})
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match=r"cannot write .*No such file"):
        write(tmp_path / "no" / "w", {"w": np.zeros(3)})


def test_a_failed_write_leaves_nothing(tmp_path, write):
    class Failing(dict):
        def __getitem__(self, name):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "w", Failing(w=np.zeros(3)))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    code = """
import resource, sys, numpy as np
from ditx.weights import files
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (files.write_safetensors, files.write_torch):
    for shape in [(400_000,), (400, 1000), (24_950,)]:
        try:
            write(sys.argv[1], {"a": np.zeros(10), "w": np.zeros(shape, np.float32)})
        except OSError as error:
            print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w")], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and not result.stderr
    assert all(line.startswith(f"cannot write {tmp_path / 'w'} (") and line.endswith("another path") for line in lines)
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
