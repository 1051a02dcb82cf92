"""Weights by name: downloads from a server, and folders and files of the hub."""

import hashlib
import http.server
import json
import shutil
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from references import GOLDEN, load

from ditx.commands import evaluate
from ditx.evaluation.evaluate import generate_samples
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.weights import frozen, hub
from ditx.weights.files import write_safetensors, write_torch
from ditx.weights.frozen import load_inception
from ditx.weights.pretrained import describe


@pytest.fixture(scope="module")
def state():
    shapes = load("inception_state_dict_shapes.json")
    return {name: np.full(shape, 0.5, np.float16) for name, shape in shapes.items()}


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
            hub.download(url)
        assert not list(tmp_path.glob("cache/ditx/*"))


def test_the_authors_files_have_names(server, tmp_path, monkeypatch):
    address, requests = server
    (tmp_path / "served" / "DiT-XL-2-256x256.pt").write_bytes(b"weights")
    monkeypatch.setitem(hub.AUTHORS, "DiT-XL/2-256", f"{address}/DiT-XL-2-256x256.pt")
    for _ in range(2):
        assert hub.find("DiT-XL/2-256", "transformer").read_bytes() == b"weights"
        assert len(requests) == 1


def test_a_download_that_ends_early_is_refused(tmp_path, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.handle_request)
        thread.start()
        with pytest.raises(ValueError, match="ended after 4 bytes; check the network"):
            hub.download(f"http://127.0.0.1:{running.server_port}/weights.pt")
        thread.join()
    assert not list((tmp_path / "ditx").iterdir())


# The hub.


def publish(monkeypatch, root):
    """A hub with the repositories in `root`, whose downloads copy files of the patterns; returns the requests."""
    requests, module = [], types.ModuleType("huggingface_hub")

    def snapshot_download(repo_id, allow_patterns):
        requests.append((repo_id, allow_patterns))
        target = root / "cache" / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in (root / repo_id).glob(pattern):
                copy = target / file.relative_to(root / repo_id)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
        return str(target)

    module.snapshot_download = snapshot_download
    module.hf_hub_download = lambda repo_id, filename: str(root / repo_id / filename)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return requests


@pytest.mark.parametrize(
    ("stored", "fetched"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", True),
        ("diffusion_pytorch_model.bin", True),
        ("transformer/diffusion_pytorch_model.fp16.safetensors", True),
        ("unet/diffusion_pytorch_model.safetensors", False),
    ],
)
def test_a_folder_of_the_hub_is_found_by_its_name(stored, fetched, monkeypatch, tmp_path):
    publish(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path / "..")
    file = tmp_path / "someone" / "some-dit" / stored
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    if fetched:
        folder = hub.find("someone/some-dit", "transformer")
        found, variant = hub.find_in(folder, "transformer")
        assert found.name == file.name and variant == ("fp16" if "fp16" in stored else "")
    else:
        with pytest.raises(ValueError, match="it has no diffusion_pytorch_model"):
            hub.find("someone/some-dit", "transformer")


def test_a_file_of_the_hub_is_found_by_its_path(monkeypatch, tmp_path):
    publish(monkeypatch, tmp_path)
    assert hub.find("someone/some-dit/a/b.pt", "transformer") == tmp_path / "someone" / "some-dit" / "a" / "b.pt"


def test_the_plain_file_comes_before_variants_and_pickles(tmp_path):
    order = ("safetensors", "safetensors.index.json", "bin", "fp16.safetensors", "safetensors.index.fp16.json")
    for end in order[::-1]:
        (tmp_path / f"diffusion_pytorch_model.{end}").touch()
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    (tmp_path / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()
    for end in order[:-1]:
        found, variant = hub.find_in(tmp_path, "transformer")
        assert found.name == f"diffusion_pytorch_model.{end}" and variant == ("fp16" if "fp16" in end else "")
        found.unlink()


@pytest.mark.parametrize("name", ["nowhere", "runs/digits", "one/two.pt", "DiT-XL/3-256", "/a/b", "tests/weights"])
def test_a_mistyped_path_is_no_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert not hub.is_name(name)
    with pytest.raises(
        ValueError, match=r"there is no such file or folder; (did you mean '.*'\? )?give a run or weights, OWNER/NAME"
    ):
        describe(name)


def test_errors_of_the_hub_are_one_sentence(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("404 Client Error.\n\nRepository Not Found for url: https://...\nPlease log in.")

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = module.hf_hub_download = offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    with pytest.raises(
        ValueError, match=r"cannot fetch weights of facebook/a from .* \(ConnectionError: 404 .*\); check the name"
    ) as error:
        describe("facebook/a")
    assert "\n" not in str(error.value)


def test_commands_take_names_of_the_hub(monkeypatch, tmp_path, run):
    publish(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path / "..")
    folder = tmp_path / "someone" / "some-dit" / "transformer"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "first_edition_eps.safetensors", folder / "diffusion_pytorch_model.safetensors")
    code, output = run.ditx("info", "someone/some-dit", "--json")
    assert code == 0 and json.loads(output)["config"]["input_size"] == 4
    config, described = evaluate.parse(["someone/some-dit", "reference.npz"])
    samples = generate_samples(Path(config.source), described, config.generation, make_mesh(MeshConfig()))
    assert samples.image_shape == (4, 4, 1) and len(samples.fingerprint["weights"]) == 8


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"without the package huggingface_hub; install it with `uv run --extra hub"):
        describe("facebook/DiT-XL-2-256")


def test_autoencoders_come_from_the_hub(monkeypatch, tmp_path):
    requests = publish(monkeypatch, tmp_path)
    folder = tmp_path / "stabilityai" / "sd-vae-ft-ema"
    folder.mkdir(parents=True)
    shapes = load("vae_sd_state_dict_shapes.json")
    state = {name: np.broadcast_to(np.float16(0.5), shape) for name, shape in shapes.items()}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    model, note = frozen.load_vae("ft-ema")
    assert model.config == frozen.VAEConfig(block_channels=(128, 256, 512, 512), layers_per_block=2)
    assert note.startswith("ft-ema (CRC-32 ") and requests[0][0] == "stabilityai/sd-vae-ft-ema"
