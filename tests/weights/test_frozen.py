"""Frozen networks: autoencoders by name and from files, Inception from files and downloads."""

import hashlib
import http.server
import json
import sys
import threading
import types

import jax
import numpy as np
import pytest
from references import assert_close, chw, hwc, load, tiny_vae, weights, write_tiny_vae

import ditx
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.sampling import make_decode
from ditx.weights import frozen
from ditx.weights.files import write_safetensors, write_torch
from ditx.weights.frozen import download, load_inception

TINY_VAE = weights(load("vae_tiny.npz"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_tiny_vae(tmp_path_factory.mktemp("vae") / "stable")


def test_an_autoencoder_is_read_from_files_and_folders(vae, tmp_path):
    model, _ = tiny_vae()
    config = (vae / "vae" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    write_safetensors(tmp_path / "renamed.safetensors", TINY_VAE)
    names = set()
    for place in (vae, vae / "vae", vae / "vae" / "diffusion_pytorch_model.bin", tmp_path / "renamed.safetensors"):
        read, name = frozen.load_vae(str(place))
        assert read.config == ditx.VAEConfig(block_channels=(16, 32), layers_per_block=1, norm_groups=8)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(read), jax.tree.leaves(model))
        names.add(name.removeprefix(str(place)))
    assert len(names) == 1  # the same checksum


def test_the_three_decoders_are_fetched_by_name(monkeypatch, tmp_path):
    shapes = load("vae_sd_state_dict_shapes.json")
    write_safetensors(
        tmp_path / "full.safetensors", {k: np.full(shape, 0.5, np.float32) for k, shape in shapes.items()}
    )
    requests = []
    monkeypatch.setattr(
        "ditx.weights.frozen.fetch", lambda *names: requests.append(names) or tmp_path / "full.safetensors"
    )
    for name in ("original", "ft-ema", "ft-mse"):
        model, note = frozen.load_vae(name)
        assert model.config == ditx.VAEConfig() and note.startswith(f"{name} (CRC-32 ")
    assert requests == [frozen.VAES[name] for name in ("original", "ft-ema", "ft-mse")]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shift_factor": 0.1}, "of a network that is not supported: shift_factor 0.1"),
        ({"use_quant_conv": False, "act_fn": "relu"}, "act_fn 'relu', use_quant_conv False"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny'"),
        ({"norm_num_groups": 5}, "are not multiples of norm_groups 5"),
        ({"block_out_channels": [16, 64]}, "the weights do not fit the configuration"),
    ],
)
def test_other_autoencoders_are_refused(vae, tmp_path, changes, sentence):
    config = json.loads((vae / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", TINY_VAE)
    with pytest.raises(ValueError, match=sentence):
        frozen.load_vae(str(tmp_path))


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_in_batches_equals_the_reference(batch, highest_precision):
    model, golden = tiny_vae()
    decode = make_decode(model, make_mesh(MeshConfig()), batch)
    latents = np.resize(hwc(golden["latent"]), (11, 8, 8, 4))
    decoded = decode(latents)
    assert decoded.shape == (11, 16, 16, 3)
    assert_close(chw(decoded[:2]), golden["decoded"], 1e-5)
    assert_close(decoded[10], decoded[0], 1e-6)


# Inception.


@pytest.fixture(scope="module")
def state():
    """Half-precision weights with one value a tensor, so that files are written fast."""
    shapes = load("inception_state_dict_shapes.json")
    return {name: np.full(shape, i / 512, np.float16) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of `tmp_path / "served"`, the list of its requests, and an empty cache."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, *args):
            requests.append(self.path)

    (tmp_path / "served").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


def digits(content):
    return hashlib.sha256(content).hexdigest()[:8]


def test_every_kind_of_file_gives_the_same_network(state, tmp_path):
    write_torch(tmp_path / "a.pth", state)
    write_safetensors(tmp_path / "b.safetensors", state)
    np.savez(tmp_path / "c.npz", **state)
    models, notes = zip(
        *[load_inception(str(tmp_path / name)) for name in ("a.pth", "b.safetensors", "c.npz")], strict=True
    )
    for model in models[1:]:
        jax.tree.map(np.testing.assert_array_equal, model, models[0])
    assert notes[0].startswith(f"{tmp_path / 'a.pth'} (CRC-32 ")
    assert len({note.split(" (")[1] for note in notes}) == 1


def test_the_released_file_is_downloaded_once(state, server, tmp_path, monkeypatch):
    address, requests = server
    write_torch(tmp_path / "weights", state)
    name = f"pt_inception-{digits((tmp_path / 'weights').read_bytes())}.pth"
    (tmp_path / "weights").rename(tmp_path / "served" / name)
    monkeypatch.setattr(frozen, "PYTORCH_FID", f"{address}/{name}")
    for _ in range(2):
        model, note = load_inception()
        assert note.startswith(str(tmp_path / "cache" / "ditx" / name)) and len(requests) == 1
    np.testing.assert_array_equal(model.logits, state["fc.weight"].T)
    assert [path.name for path in (tmp_path / "cache" / "ditx").iterdir()] == [name]


def test_a_failed_download_leaves_nothing(server, tmp_path):
    address, _ = server
    (tmp_path / "served" / "damaged-00000000.pth").write_bytes(b"content")
    for url, sentence in [
        (
            f"{address}/damaged-00000000.pth",
            f"a SHA-256 that begins with {digits(b'content')}, not 00000000; check the",
        ),
        (f"{address}/missing-00000000.pth", r"cannot download .* into .* \(HTTPError: .*404.*\); check the network"),
        ("http://127.0.0.1:9/closed-00000000.pth", r"\(URLError: .*\); check the network, or bring the file here"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            download(url)
        assert not list(tmp_path.glob("cache/ditx/*"))


def test_other_files_are_refused_in_one_sentence(tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}]))
    (tmp_path / "text.pth").write_text("no weights at all")
    for name, sentence in [
        ("other.npz", r"the weights do not fit .* surplus \['arr_0'\]"),
        ("objects.npz", r"cannot read .* as an \.npz of plain arrays"),
        ("text.pth", "it begins with b'no weights at al', unlike files of safetensors and torch"),
        ("nowhere.pth", "there is no such file; give pytorch-fid's weights, or no file to download them"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_inception(str(tmp_path / name))


# The hub.


def hub(monkeypatch, download):
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_files_come_from_the_hub(monkeypatch, tmp_path):
    requests = []
    hub(monkeypatch, lambda repo_id, filename: requests.append((repo_id, filename)) or str(tmp_path / filename))
    assert frozen.fetch("someone/some-vae", "model.safetensors") == tmp_path / "model.safetensors"
    assert requests == [("someone/some-vae", "model.safetensors")]


def test_errors_of_the_hub_are_one_sentence(monkeypatch):
    def offline(repo_id, filename):
        raise ConnectionError("404 Client Error.\n\nRepository Not Found for url: https://...\nPlease log in.")

    hub(monkeypatch, offline)
    with pytest.raises(ValueError, match=r"cannot fetch b of a .* \(ConnectionError: 404 .*\); check both") as error:
        frozen.fetch("a", "b")
    assert "\n" not in str(error.value)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"without the package huggingface_hub; install it with `uv run --extra hub"):
        frozen.fetch("a", "b")
