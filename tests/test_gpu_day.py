"""All commands of a day of measurements on a GPU, at a tiny size, and the table of their figures."""

import json
from functools import partial

import gpu_day
import numpy as np
import PIL.Image
import pytest

from ditx.commands import bench, evaluate

NETWORK = {"depth": 1, "hidden-size": 8, "num-heads": 2, "input-size": 4}
FLAGS = {
    "bench": [f"--{name}={value}" for name, value in NETWORK.items()] + ["--unroll=1", "--repeats=1"],
    "train": [f"--model.{name}={value}" for name, value in NETWORK.items() if name != "input-size"]
    + ["--batch-size=8", "--steps=2", "--profile-steps=1", "--sampling.steps=2", "--dtype=float32"],
    "evaluate": [],
}


def tiny(command):
    """A command with a small network, batch and number of samples, without the peer."""
    _, verb, *rest = command
    words = [verb, *rest, *FLAGS[verb]]
    if "--compare" in words:
        del words[words.index("--compare") : words.index("--compare") + 2]
    if verb == "bench":
        words += ["--batch-size=8"] + (["--steps=2"] if "sample" in words else [])
    if "--make-stats" in words:
        words += ["--features=classifier"]
    return words + (["--num-samples=40", "--steps=2"] if "--num-samples" in words else [])


@pytest.mark.slow
def test_every_command_of_the_day_runs_and_leaves_its_figure(run, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "cifar.npz", images=images, labels=labels)
    (tmp_path / "test").mkdir()
    for k, image in enumerate(images):
        PIL.Image.fromarray(image).save(tmp_path / "test" / f"{k}.png")
    (tmp_path / "day").mkdir()
    paths = {"folder": f"{tmp_path}/day", "cifar": f"{tmp_path}/cifar.npz", "test": f"{tmp_path}/test", "inception": ""}
    monkeypatch.setattr(bench, "peak", lambda dtype, mesh: (1e12, 512))  # tests/commands/test_bench.py measures it
    monkeypatch.setattr(evaluate, "train_classifier", partial(evaluate.train_classifier, steps=20))
    for one in gpu_day.MEASUREMENTS:
        command = gpu_day.arguments(one, **paths)
        if command[0] == "pytest":
            assert (gpu_day.ROOT / command[-1]).is_dir()
            continue
        if command[1] == "bench":
            bench.parse(*command[2:])  # with the peer, which is not installed here
        if one.name in ("train-b2", "train-s2"):  # at this size the same as train-xl2
            continue
        code, output = run.ditx(*tiny(command))
        fused = "fused" in command
        assert (code, "is fused, which needs GPUs, not cpu" in output) == ((2, True) if fused else (0, False)), output
        gpu_day.record(tmp_path / "day", one, command, code, output, 1.0)
    table = gpu_day.table(tmp_path / "day")
    assert table.count("\n| `ditx ") == len(gpu_day.MEASUREMENTS) - 3
    assert table.count("failed (2): ditx bench: kernels is fused") == 2 and table.count("failed") == 3
    entry = json.loads((tmp_path / "day" / "train-xl2-fp8.json").read_text())
    assert entry["figures"]["matmul_dtype"] == "fp8" and entry["figures"]["images_per_second"] > 0
    assert entry["predicted"] in table and f"{entry['figures']['images_per_second']:,.4g} images/s" in table
    assert "FID" in table.splitlines()[-1]


def test_a_day_goes_on_where_it_was_interrupted(tmp_path, capsys, monkeypatch):
    done, failing, long = gpu_day.MEASUREMENTS[1], gpu_day.MEASUREMENTS[2], gpu_day.MEASUREMENTS[-1]
    gpu_day.record(tmp_path, done, ["ditx", "--json"], 0, 'text {"images_per_second": 650.1}', 3.0)
    result = gpu_day.subprocess.CompletedProcess([], 2, "", "ditx bench: no GPU")
    calls = []
    monkeypatch.setattr(gpu_day.subprocess, "run", lambda command, **options: calls.append(command) or result)
    monkeypatch.setattr(gpu_day, "device", lambda: "H100")
    names = [done.name, failing.name, long.name]
    assert gpu_day.main([str(tmp_path), "--only", *names, "--seconds", "119.9"]) == 0 and not calls
    assert gpu_day.main([str(tmp_path), "--only", done.name, failing.name, "--seconds", "121"]) == 1
    assert [command[2:] for command in calls] == [failing.command.split()]
    printed = capsys.readouterr().out
    assert "left for the next call" in printed and "failed (2): ditx bench: no GPU" in printed
    assert gpu_day.main([str(tmp_path), "--table"]) == 0
    assert "| 650 images/s | 650.1 images/s |" in capsys.readouterr().out
