"""train.py as a user runs it: on a small network, mistaken, interrupted, killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import scripts
from networks import BLOCKS
from orbax.checkpoint import v1 as ocp
from scripts import ROOT, TINY, call, finish

import train
from ditx.nn.dit import DiT, DiTConfig
from ditx.training import checkpoint
from ditx.training import run as runs


def start(*arguments, **options):
    """`train.py` in a process of its own, with one device."""
    return scripts.start(ROOT / "train.py", *arguments, **options)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def assert_same_run(run, other, step=40):
    with warnings.catch_warnings(action="ignore"):  # Orbax prefers to be told where arrays are to lie.
        a, b = (ocp.load_checkpointables(str(folder / "checkpoints" / str(step))) for folder in (run, other))
    assert set(a) == {"step", "model", "ema", "opt_state", "metric_sums"}
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert len(leaves) > 40
    for x, y in leaves:
        np.testing.assert_array_equal(x, y)
    timed = {"images_per_second", "data_wait"}
    one, two = ([{k: line[k] for k in line.keys() - timed} for line in runs.read_metrics(r)] for r in (run, other))
    assert one == two
    assert all(sum(line["count_by_time"]) == 4 * 8 for line in one)


def test_a_run_is_a_folder_of_plain_files(finished):
    run, output = finished
    said = ["parameters", "44.29 k multiply-adds", "5,000 images of 28x28x1, 10 classes", "devices   1 x", "compiled"]
    said += [f"loading   JAX and ditx for: {ROOT / 'train.py'} digits", "reading   digits", "compiling the step\n"]
    said += [f"done      {run} (samples/, loss.png); draw samples with: sample.py {run}"]
    assert all(words in output for words in said), output
    assert [step for step, _, _ in losses(run)] == list(range(4, 41, 4))
    assert checkpoint.steps(run / "checkpoints") == [30, 35, 40]
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["model"]["hidden_size"], config["steps"]) == ("digits", 16, 40)
    assert config["class_names"] == list("0123456789") and config["versions"]["jax"] == jax.__version__
    for picture in ("samples/step-0000020.png", "samples/step-0000040.png", "loss.png"):
        with PIL.Image.open(run / picture) as image:
            assert len(np.unique(np.asarray(image))) > 10


@pytest.mark.slow
def test_killed_at_any_time_it_ends_as_the_undisturbed_run(finished, tmp_path):
    run, rng = tmp_path / "killed", random.Random(time.time_ns())
    for _ in range(3):
        process = start(*TINY, "--steps", 40, "--run", run)
        line = ""
        while process.poll() is None and not line.startswith(("init", "resume")):
            line = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate()
    code, output = finish(start(*TINY, "--steps", 40, "--run", run))
    assert code == 0, output
    assert_same_run(run, finished[0])


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over(copy, finished):
    largest = max((copy / "checkpoints" / "35").glob("*/**/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    code, output = finish(start(*TINY, "--steps", 40, "--run", copy))
    assert code == 0 and "altered" in output and "going back to step 30" in output, output
    assert (copy / "checkpoints" / "damaged-35-0").exists()
    assert_same_run(copy, finished[0])


def test_without_a_sound_checkpoint_it_does_not_start_anew(copy, monkeypatch, capsys):
    before = (copy / "metrics.jsonl").read_text()
    for folder in (copy / "checkpoints").iterdir():
        shutil.rmtree(folder / "model")
    code, said = call(train, monkeypatch, capsys, *TINY, "--steps", 40, "--run", copy)
    assert code == 2 and "no checkpoint in" in said and "Traceback" not in said
    assert (copy / "metrics.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)])
def test_a_signal_to_all_processes_saves_and_more_steps_can_follow(tmp_path, number, code, workers):
    run = tmp_path / "stopped"
    flags = [*TINY, "--decay", "constant", "--run", run, "--sample-every", 0]
    process = start(*flags, "--steps", 1_000_000, "--workers", workers, group=0)
    while "step 8 " not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, number)  # as terminals and schedulers do, also to processes that read
    returned, output = finish(process)
    assert returned == code and "stopped after step" in output and "Traceback" not in output, output
    (newest,) = checkpoint.steps(run / "checkpoints")[-1:]
    assert f"stopped after step {newest:,};" in output
    returned, output = finish(start(*flags, "--steps", newest + 3))
    assert returned == 0 and f"resume    from step {newest:,}" in output, output
    assert losses(run)[-1][0] == newest + 3


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    run, limited = tmp_path / "full", "import resource, runpy, sys; sys.argv = sys.argv[1:];"
    # Files may not grow beyond 4 kB once the first checkpoint lies there: what a full disk does to a write.
    limited += (
        "import pathlib; from ditx.training import checkpoint; save = checkpoint.Checkpoints.save\n"
        "def full(self, step, trees, metrics):\n"
        "    if step == 10:\n"
        "        self._manager.wait()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    save(self, step, trees, metrics=metrics)\n"
        "checkpoint.Checkpoints.save = full\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [*TINY, "--steps", "40", "--sample-every", "0", "--log-every", "40", "--run", str(run)]
    command = [sys.executable, "-c", limited, str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    sentence = "(File too large); the older ones are whole: 5; make room, then run the same command to resume"
    assert f"no checkpoint could be written to {run}/checkpoints {sentence}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert checkpoint.steps(run / "checkpoints") == [5]


def test_lost_checkpoints_do_not_start_a_run_anew(copy, monkeypatch, capsys):
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_text()
    code, said = call(train, monkeypatch, capsys, *TINY, "--steps", 40, "--run", copy)
    assert code == 2 and "has come to step 40 but has no checkpoint" in said, said
    assert (copy / "metrics.jsonl").read_text() == before and (copy / "loss.png").exists()


def test_two_processes_cannot_share_a_run(copy, monkeypatch, capsys):
    with runs.open_run(copy, runs.read_config(copy)):
        code, said = call(train, monkeypatch, capsys, *TINY, "--steps", 40, "--run", copy)
    assert code == 2 and "another process is training in" in said


def test_pictures_that_a_kill_prevented_are_made_up_for(finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    (run / "loss.png").unlink()
    (run / "samples" / "step-0000040.png").unlink()
    code, _ = call(train, monkeypatch, capsys, *TINY, "--steps", 40, "--run", run)
    assert code == 0
    assert (run / "loss.png").read_bytes() == (finished[0] / "loss.png").read_bytes()
    assert (run / "samples" / "step-0000040.png").exists()


@pytest.mark.slow
def test_updates_that_are_no_numbers_are_skipped_and_end_the_run(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    # From its eighth update on, it diverges.
    optimizer = optax.adamw(lambda count: jnp.where(count < 7, 1e-3, 1e30))
    monkeypatch.setattr(train, "adamw", lambda *_, **__: optimizer)
    flags = [*TINY, "--steps", 40, "--run", run, "--keep", 1]
    code, said = call(train, monkeypatch, capsys, *flags)
    assert code == 2 and said.count("its update is skipped") == 9, said
    assert "10 updates in a row were skipped, up to step 18 (loss" in said and "seed 0" in said, said
    assert "try a lower --learning-rate" in said
    lines = runs.read_metrics(run)
    assert [(line["step"], line["skipped"], line["loss"] is None) for line in lines] == [
        (4, 0, False),
        (8, 0, False),
        (12, 4, True),
        (16, 4, True),
    ]
    # No checkpoint was written since, so that the newest is a good one.
    assert checkpoint.steps(run / "checkpoints") == [5]
    weights = checkpoint.load_newest(run / "checkpoints", ema_of(run))[1]["ema"]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(weights)) < 10


def test_a_folder_left_by_a_kill_at_the_very_start_is_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json.partial").write_text("{")
    code, said = call(train, monkeypatch, capsys, *TINY, "--steps", 2, "--sample-every", 0, "--run", tmp_path)
    assert code == 0, said


@pytest.mark.slow
def test_a_new_run_begins_from_the_weights_of_another(finished, tmp_path, monkeypatch, capsys):
    before = checkpoint.load_newest(finished[0] / "checkpoints", ema_of(finished[0]))[1]["ema"]
    flags = [*TINY, "--init-from", finished[0], "--steps", 1, "--learning-rate", 0, "--sample-every", 0]
    code, said = call(train, monkeypatch, capsys, *flags, "--run", tmp_path / "same")
    assert code == 0 and f"init {finished[0]} at step 40" in said and "label table" not in said, said
    after = checkpoint.load_newest(tmp_path / "same" / "checkpoints", ema_of(tmp_path / "same"))[1]["ema"]
    jax.tree.map(np.testing.assert_array_equal, after, before)

    # Other classes: images of the same size, and a label table of their own.
    rng = np.random.default_rng(0)
    stored = {"images": rng.integers(0, 255, (8, 28, 28, 1), np.uint8), "labels": np.arange(8) % 3}
    np.savez(tmp_path / "data.npz", **stored, classes=["a", "b", "c"])
    flags = [
        "cifar10",
        "--data-path",
        tmp_path / "data.npz",
        *TINY[1:],
        "--schedule",
        "flow",
        "--prediction",
        "velocity",
    ]
    flags += ["--no-flip"]
    flags += "--model.input-size 28 --model.no-learn-sigma --learning-rate 0 --steps 1 --sample-every 0".split()
    flags += ["--init-from", finished[0]]
    code, said = call(train, monkeypatch, capsys, *flags, "--run", tmp_path / "other")
    assert code == 0 and "its label table had 11 rows, the new one has 4 and starts from random values" in said, said
    other = checkpoint.load_newest(tmp_path / "other" / "checkpoints", ema_of(tmp_path / "other"))[1]["ema"]
    assert other.label.table.shape == (4, 16)
    np.testing.assert_array_equal(other.blocks.mlp.up.weight, before.blocks.mlp.up.weight)
    code, said = call(train, monkeypatch, capsys, *flags, "--model.depth", 2, "--run", tmp_path / "deeper")
    assert code == 2 and "holds another network: depth was 1 and is 2; change the flags to match it" in said, said


def ema_of(run):
    """Shapes of the averaged weights of a run, to be read on one device."""
    config, first = runs.read_config(run)["model"], jax.sharding.SingleDeviceSharding(jax.devices()[0])
    create = jax.jit(lambda key: DiT(DiTConfig(**config), key=key), out_shardings=first)
    return {"ema": create.eval_shape(jax.random.key(0))}


@pytest.mark.slow
def test_a_profile_and_the_checkpoints_asked_for_are_there(tmp_path):
    run = tmp_path / "run"
    flags = [*TINY, "--steps", 20, "--run", run, "--sample-every", 0, "--keep", 1, "--profile-steps", 30]
    code, output = finish(start(*flags, "--keep-every", 10, "--keep-best", 1))
    assert code == 0 and f"profile   {run / 'profile'}" in output, output
    assert "memory    0.3 MiB a device: weights 0.1, averages 0.1, moments 0.1" in output, output
    assert "a step takes" in output
    assert list((run / "profile").glob("**/*.xplane.pb"))
    kept = checkpoint.steps(run / "checkpoints")
    assert {10, 20} <= set(kept) and len(kept) <= 3
    manifest = json.loads((run / "checkpoints" / "20" / "manifest.json").read_text())
    assert manifest["step"] == 20 and manifest["model"]["hidden_size"] == 16
    assert manifest["versions"]["jax"] == jax.__version__ and len(manifest["files"]) > 4


def test_a_finished_run_is_left_alone(finished, monkeypatch, capsys):
    before = (finished[0] / "metrics.jsonl").stat().st_mtime_ns
    code, said = call(train, monkeypatch, capsys, *TINY, "--steps", 40, "--run", finished[0])
    assert code == 0 and "has all its 40 steps" in said
    assert (finished[0] / "metrics.jsonl").stat().st_mtime_ns == before


def folder_of_images(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), "red").save(path / name)
    return path


# One mistake for each place that refuses it; `tests/training/test_config.py` and others have the rest.
MISTAKES = {
    "unknown preset 'digit'; did you mean 'digits'? choose from digits, cifar10, images": ["digit"],
    "patch_size 5 does not divide input_size 28": ["--model.patch-size", 5],
    "distributed.count and distributed.index need --distributed.coordinator": ["--distributed.count", 2],
    "steps is 0; it must be at least 1": ["--steps", 0],
    "dataset cifar10 needs --data-path": ["cifar10"],
    "the images are 28x28, model.input_size is 32": ["--model.input-size", 32, "--model.patch-size", 8],
    "kernels is fused, which needs GPUs, not cpu; use xla": ["--kernels", "fused"],
    "nowhere: there is no such file or folder": ["--init-from", "nowhere"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = call(train, monkeypatch, capsys, *MISTAKES[sentence])
    assert code == 2 and sentence in said and "Traceback" not in said, said
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_with_what_helps(monkeypatch, capsys):
    def short(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

    monkeypatch.setattr(train, "train", short)
    code, said = call(train, monkeypatch, capsys)
    assert code == 2 and "the devices have too little memory (RESOURCE_EXHAUSTED: Out of memory allocating 9" in said
    assert "try --remat full" in said and "more" not in said


def test_an_unknown_flag_gets_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said = call(train, monkeypatch, capsys, "digits", "--step", 3)
    assert code == 2 and "--step" in said and not list(tmp_path.iterdir())


def test_bad_images_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = folder_of_images(tmp_path / "images", "cat/a.png", "dog/b.png")
    (images / "dog" / "broken.png").write_bytes((images / "cat" / "a.png").read_bytes()[:50])
    flags = ["images", "--data-path", images, *"--model.input-size 8 --model.depth 1 --batch-size 8 --strict".split()]
    code, said = call(train, monkeypatch, capsys, *flags)
    assert code == 2 and "broken.png" in said
    (images / "dog" / "broken.png").unlink()
    (images / "empty").mkdir()
    code, said = call(train, monkeypatch, capsys, *flags)
    assert code == 2 and "empty" in said and not (tmp_path / "runs").exists()


def test_another_configuration_is_refused_by_field(finished, monkeypatch, capsys):
    code, said = call(train, monkeypatch, capsys, *TINY, "--steps", 41, "--run", finished[0])
    assert code == 2 and "steps was 40 and is 41" in said
    flags = [*TINY, "--steps", 40, "--model.depth", 2, "--seed", 1, "--run", finished[0]]
    code, said = call(train, monkeypatch, capsys, *flags)
    assert code == 2 and "model.depth was 1 and is 2" in said and "seed was 0 and is 1" in said


def test_a_run_resumes_without_flags_and_its_refusal_names_the_command_for_more_steps(
    copy, finished, monkeypatch, capsys
):
    code, said = call(train, monkeypatch, capsys, "digits", "--resume", copy)
    assert code == 2 and f"--resume takes the preset of {copy}; leave out digits" in said, said
    code, said = call(train, monkeypatch, capsys, "--resume", copy, "--steps", 41)
    assert code == 2 and "steps was 40 and is 41; at its end the learning rate is 0" in said, said
    command = said.split("in a new run with: ")[1].split()
    assert command[0] == "train.py" and (command[-4:] == ["--run", f"{copy}-longer", "--steps", "1"]), command
    code, said = call(train, monkeypatch, capsys, *command[1:])
    assert code == 0 and f"init {copy} at step 35" in said and losses(copy.with_name("copy-longer"))[-1][0] == 1, said
    code, said = call(train, monkeypatch, capsys, "--resume", copy)
    assert code == 0 and "resume from step 35" in said and losses(copy)[-1][0] == 40, said
    assert f"compiling the step; it took {runs.read_config(finished[0])['compile_seconds']} s last time" in said


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    code, said = call(train, monkeypatch, capsys, "--run", tmp_path)
    assert code == 2 and "exists and is not a run" in said
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_other_data_is_noticed(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    stored = {"images": rng.integers(0, 255, (20, 8, 8, 3), np.uint8), "labels": np.arange(20) % 10}
    np.savez(tmp_path / "data.npz", **stored)
    flags = "--model.input-size 8 --model.hidden-size 16 --model.depth 1 --model.num-heads 2 --batch-size 8".split()
    flags = ["cifar10", "--data-path", tmp_path / "data.npz", *flags, "--steps", 2, "--sample-every", 0]
    code, said = call(train, monkeypatch, capsys, *flags, "--run", tmp_path / "run")
    assert code == 0, said
    np.savez(tmp_path / "data.npz", **(stored | {"images": 255 - stored["images"]}))
    code, said = call(train, monkeypatch, capsys, *flags, "--run", tmp_path / "run")
    assert code == 2 and "data_checksum was" in said
    np.savez(tmp_path / "data.npz", images=stored["images"][:0], labels=stored["labels"][:0])
    code, said = call(train, monkeypatch, capsys, *flags, "--run", tmp_path / "empty")
    assert code == 2 and "has 0 images" in said and not (tmp_path / "empty").exists()


@pytest.mark.slow
def test_a_folder_of_images_trains(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for k in range(12):
        file = tmp_path / "images" / f"class-{k % 3}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 255, (20 + k, 30, 3), np.uint8)).save(file)
    flags = ["images", "--data-path", tmp_path / "images", "--run", tmp_path / "run", "--steps", 2, "--batch-size", 8]
    flags += "--model.input-size 8 --model.hidden-size 16 --model.depth 1 --model.num-heads 2".split()
    flags += "--sampling.steps 2".split()
    code, said = call(train, monkeypatch, capsys, *flags)
    assert code == 0 and "12 images of 8x8x3, 3 classes" in said and "--dtype float32" in said, said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["class_names"] == ["class-0", "class-1", "class-2"] and config["model"]["patch_size"] == 1
    assert (config["dtype"], config["warmup"], config["batch_size"]) == ("float32", 0, 8)
    code, said = call(train, monkeypatch, capsys, *flags, "--workers", 1)  # what was chosen stays
    assert code == 0 and "has all its 2 steps" in said and "fitted" not in said, said
    code, said = call(train, monkeypatch, capsys, *flags, "--dtype", "bfloat16")
    assert code == 2 and "dtype was 'float32' and is 'bfloat16'" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_learns_the_digits(optimized, tmp_path, monkeypatch, capsys, block):
    run = tmp_path / block
    network = ["--model.block", block, "--model.hidden-size", 64, "--model.depth", 2, "--model.num-heads", 2]
    flags = ["digits", *network, "--steps", 300, "--sample-every", 0, "--run", run]
    code, output = call(train, monkeypatch, capsys, *flags)
    assert code == 0, output
    means = [loss for _, loss, _ in losses(run)]
    # It begins at about 1.7, the mean square of the velocity; to know nothing but that mean gives 1.3.
    assert 1.4 < means[0] < 2.2 and means[-1] < 0.9, means
