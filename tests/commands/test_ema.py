"""Averages that a run stores, also if it is killed and resumed, and averages of other lengths made from them."""

import shutil

import jax
import numpy as np
import pytest

from ditx.nn.dit import DiT
from ditx.training import checkpoint
from ditx.training import run as runs
from ditx.weights import pretrained

FLAGS = (
    "digits --model.hidden-size 16 --model.depth 1 --model.num-heads 2 --model.patch-size 14 --batch-size 8 --warmup 0"
    " --log-every 10 --checkpoint-every 30 --sample-every 0 --steps 60 --ema-every 5 --ema-lengths 0.05 0.1 0.08"
    " --learning-rate 0.05 --decay constant"  # Weights move far, so that rounding to half precision matters little.
).split()


def leaves(file):
    return jax.tree.leaves(pretrained.load(file, pretrained.describe(file))[0])


def distance(a, b):
    return np.sqrt(sum(np.square(x - y).sum() for x, y in zip(a, b, strict=True)))


@pytest.mark.slow
def test_any_length_is_made_from_two_that_a_run_stored(run, tmp_path):
    folder, made = tmp_path / "run", tmp_path / "new" / "made.safetensors"
    code, output = run.train(*FLAGS, "--run", folder)
    assert code == 0, output
    kept = runs.stored_averages(folder)
    assert kept == [(step, length) for step in range(5, 61, 5) for length in (0.05, 0.08, 0.1)]
    last = {length: runs.average_file(folder, 60, length) for length in (0.05, 0.1, 0.08)}

    # Stored averages are those of the checkpoint, in half precision.
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    create = jax.jit(lambda key: DiT(pretrained.describe(folder).model, key=key), out_shardings=first)
    abstract = {"power_emas": (create.eval_shape(jax.random.key(0)),) * 3}
    _, trees, _ = checkpoint.load_newest(folder / "checkpoints", abstract)
    for file, exact in zip(last.values(), trees["power_emas"], strict=True):
        for half, whole in zip(leaves(file), jax.tree.leaves(exact), strict=True):
            assert np.all(np.abs(half - whole) <= 2**-11 * np.abs(whole) + 2**-25)
    assert last[0.1].stat().st_size < 0.55 * sum(leaf.nbytes for leaf in leaves(last[0.1])) + 3000

    # After a kill: the last checkpoint and the last average are missing, half a file is left; both are written again.
    before = {path.name: path.read_bytes() for path in (folder / "averages").iterdir()}
    shutil.rmtree(folder / "checkpoints" / "60")
    last[0.1].unlink()
    (folder / "averages" / "0000060-0.1.safetensors.7.partial").write_bytes(b"half")
    code, output = run.train(*FLAGS, "--run", folder)
    assert code == 0 and "resume from step 30" in output, output
    assert {path.name: path.read_bytes() for path in (folder / "averages").iterdir()} == before

    # The third length: as tracked, and as reconstructed from the two others.
    tracked, nearest = leaves(last[0.08]), leaves(last[0.1])
    for path in folder.glob("averages/*-0.08.safetensors"):
        path.unlink()
    code, output = run.ditx("ema", folder, made, "--length", 0.08)
    assert code == 0 and "length 0.08 at step 60, from 24 stored averages" in output, output
    assert distance(leaves(made), tracked) < 0.05 * distance(nearest, tracked)
    code, output = run.ditx("ema", folder, tmp_path / "early.safetensors", "--length", 0.05, "--step", 20)
    assert code == 0, output
    stored = leaves(runs.average_file(folder, 20, 0.05))
    assert distance(leaves(tmp_path / "early.safetensors"), stored) < 1e-4 * distance(nearest, stored)

    for arguments, sentence in [
        ([folder, made, "--length", 0.08], "made.safetensors; give a new name that ends in .safetensors"),
        ([folder, tmp_path / "a.pt", "--length", 0.08], "a.pt; give a new name that ends in .safetensors"),
        ([folder, tmp_path / "a.safetensors", "--length", 0.3], "length is 0.3 of the run"),
        ([folder, tmp_path / "a.safetensors", "--length", 0.1, "--step", 12], "step is 12; averages are stored at 5, "),
        ([tmp_path, tmp_path / "a.safetensors", "--length", 0.1], "is not a readable run"),
    ]:
        code, output = run.ditx("ema", *arguments)
        assert code == 2 and sentence in output and "Traceback" not in output, output
