"""What a start costs: mistakes told before anything long begins, and programs compiled once."""

import os
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scripts
from scripts import ROOT, finish

import train
from ditx.parallel import compile
from ditx.training import checkpoint

NETWORK = "--model.hidden-size 16 --model.depth 1 --model.num-heads 2 --batch-size 8".split()
TINY = ["digits", *NETWORK, "--model.patch-size", "14", "--sampling.steps", "2", "--steps", "2", "--log-every", "1"]


@pytest.fixture
def photos(tmp_path):
    """A folder of three classes."""
    for name in ("a", "b", "c"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / name / "0.png")
    return tmp_path / "photos"


def test_more_than_a_device_has_is_said_before_anything_runs(monkeypatch):
    double, x = jax.jit(lambda x: 2 * x), jax.ShapeDtypeStruct((2**20,), jnp.float32)
    assert compile.compile_checked(double, x)[2] == 2**23 < compile.device_memory()
    monkeypatch.setattr(compile, "device_memory", lambda: 2**22)
    with pytest.raises(compile.OutOfMemoryError, match=r"needs 0.01 GiB on each device, which has 0.00; try less"):
        compile.compile_checked(double, x, remedy="less")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_of_programs_is_not_mapped_anew(tmp_path):
    run = tmp_path / "run"
    for script, *flags in (
        ["train.py", *TINY, "--sample-every", "0", "--run", run],
        ["sample.py", run, "--num-samples", "1", "--out", tmp_path / "one.png"],
        ["ditx", "bench", "train", "tiny", "--batch-size", "1", "--repeats", "1"],
    ):
        code = [sys.executable, "-c", FAULTS, script, *map(str, flags)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run(code, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
        faults = int(done.stdout.split()[-1])
        assert faults < 1000, (script, faults)  # pages of 4 KiB: at least 2**15 a call otherwise


FAULTS = """
import contextlib, resource, runpy, sys
_, script, *flags = sys.argv
sys.argv = [script, *flags]
with contextlib.suppress(SystemExit):
    (runpy.run_path if script.endswith(".py") else runpy.run_module)(script, run_name="__main__")
import jax
import jax.numpy as jnp
x, weight = jnp.ones((4096, 64)), jnp.ones((64, 8192))
program = jax.jit(lambda x, weight: jnp.tanh(x @ weight) @ weight.T).lower(x, weight).compile()
assert program.memory_analysis().temp_size_in_bytes >= 2**27
before = []
for _ in range(5):
    program(x, weight).block_until_ready()
    before.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(later - earlier for earlier, later in zip(before[1:], before[2:])))  # a busy system takes pages, too
"""


def test_a_step_too_large_is_refused_in_one_sentence(run, photos, tmp_path, monkeypatch):
    flags = ["images", *NETWORK, "--model.input-size", 8, "--data-path", photos, "--run", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(compile, "device_memory", lambda: 2**10)
        code, said = run.train(*flags)
    assert code == 2 and "the program needs 0.0" in said and "which has 0.00; try --remat full" in said, said
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said_before_anything_is_compiled(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compile_step", lambda *_, **__: pytest.fail("compiled"))
    npz = tmp_path / "data.npz"
    np.savez(npz, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4, int))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    for sentence, flags in {
        "the images are 8x8, model.input_size is 32": ["cifar10", "--data-path", npz],
        "model.num_classes is 7, but the data has 3": ["images", "--data-path", photos, "--model.num-classes", 7],
        "exists and is not a run": ["images", "--data-path", photos, "--run", tmp_path / "run"],
        "nowhere contains no latents": ["imagenet256-s8", "--data-path", tmp_path / "nowhere"],
    }.items():
        code, said = run.train(*flags, *NETWORK)
        assert code == 2 and sentence in said and "Traceback" not in said, said


@pytest.mark.slow
def test_a_finished_run_compiles_nothing_unless_its_last_checkpoint_is_gone(run, tmp_path, monkeypatch):
    flags = [*TINY, "--checkpoint-every", 1, "--sample-every", 0, "--run", tmp_path / "run"]
    code, said = run.train(*flags)
    assert code == 0 and "compiled in" in said, said
    code, said = run.train(*flags)
    assert code == 0 and "has all its 2 steps" in said and "compiled in" not in said, said
    for file in (tmp_path / "run" / "checkpoints" / "2").glob("model/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    code, said = run.train(*flags)
    assert code == 0 and "resume from step 1" in said and "compiled in" in said, said
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 2


@pytest.mark.slow
def test_a_second_start_takes_all_programs_from_the_cache(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "run"

    def started(*arguments):
        """What is in the cache after a script has run."""
        cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        code, output = finish(scripts.start(*arguments, **cached))
        assert code == 0, output
        return {file.name for file in cache.glob("*-cache")}

    first = started(ROOT / "train.py", *TINY, "--sample-every", 2, "--run", folder)
    assert any("train_step" in name for name in first) and any("run_batch" in name for name in first)
    # Another scale of the pictures, too.
    other = ["--sampling.guidance-scale", 4, "--sample-every", 2, "--run", tmp_path / "other"]
    assert started(ROOT / "train.py", *TINY, *other) == first

    draw = [ROOT / "sample.py", folder, "--steps", 3]
    drawn = started(*draw, "--num-samples", 6, "--out", tmp_path / "a.png") - first
    assert any("run_batch" in name for name in drawn)
    other = "--num-samples 5 --labels 7 --seed 3 --guidance-scale 4 --spacing log-snr".split()
    assert started(*draw, *other, "--out", tmp_path / "b.png") - first == drawn
    shutil.rmtree(cache)
