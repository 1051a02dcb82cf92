import hashlib
import http.server
import threading

import jax
import numpy as np
import pytest
from references import load

from ditx.weights import inception_weights
from ditx.weights.files import write_safetensors, write_torch
from ditx.weights.inception_weights import download, load_inception


@pytest.fixture(scope="module")
def state():
    """Half-precision weights of one value a tensor, so that files are soon written."""
    shapes = load("inception_state_dict_shapes.json")
    return {name: np.full(shape, i / 512, np.float16) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address that serves `tmp_path / "served"`, the paths it was asked for, and an empty cache."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, *args):
            asked.append(self.path)

    (tmp_path / "served").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def digits(content):
    return hashlib.sha256(content).hexdigest()[:8]


def test_every_kind_of_file_gives_the_same_network(state, tmp_path):
    write_torch(tmp_path / "a.pth", state)
    write_safetensors(tmp_path / "b.safetensors", state)
    np.savez(tmp_path / "c.npz", **state)
    models, said = zip(
        *[load_inception(str(tmp_path / name)) for name in ("a.pth", "b.safetensors", "c.npz")], strict=True
    )
    for model in models[1:]:
        jax.tree.map(np.testing.assert_array_equal, model, models[0])
    assert said[0].startswith(f"{tmp_path / 'a.pth'} (CRC-32 ")
    assert len({sentence.split(" (")[1] for sentence in said}) == 1


def test_the_released_file_is_fetched_once(state, server, tmp_path, monkeypatch):
    address, asked = server
    write_torch(tmp_path / "weights", state)
    name = f"pt_inception-{digits((tmp_path / 'weights').read_bytes())}.pth"
    (tmp_path / "weights").rename(tmp_path / "served" / name)
    monkeypatch.setattr(inception_weights, "PYTORCH_FID", f"{address}/{name}")
    for _ in range(2):
        model, said = load_inception()
        assert said.startswith(str(tmp_path / "cache" / "ditx" / name)) and len(asked) == 1
    np.testing.assert_array_equal(model.logits, state["fc.weight"].T)
    assert [path.name for path in (tmp_path / "cache" / "ditx").iterdir()] == [name]


def test_what_cannot_be_fetched_leaves_nothing(server, tmp_path):
    address, _ = server
    (tmp_path / "served" / "damaged-00000000.pth").write_bytes(b"content")
    for url, sentence in [
        (
            f"{address}/damaged-00000000.pth",
            f"a SHA-256 that begins with {digits(b'content')}, not 00000000; check the",
        ),
        (f"{address}/missing-00000000.pth", r"cannot be fetched into .* \(HTTPError: .*404.*\); check the network, or"),
        ("http://127.0.0.1:9/closed-00000000.pth", r"\(URLError: .*\); check the network, or bring the file here"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            download(url)
        assert not list((tmp_path / "cache" / "ditx").iterdir())


def test_other_files_are_refused_in_a_sentence(tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}]))
    (tmp_path / "text.pth").write_text("no weights at all")
    for name, sentence in [
        ("other.npz", r"the weights do not fit .* surplus \['arr_0'\]"),
        ("objects.npz", "holds more than arrays of numbers"),
        ("text.pth", "it begins with b'no weights at al', as neither safetensors nor torch's files do"),
        ("nowhere.pth", "there is no such file; give that of pytorch-fid's weights, or none to have it fetched"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_inception(str(tmp_path / name))
