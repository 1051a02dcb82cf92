"""Several processes: how they are told, agree, stop; that they compute what one does, and survive being killed."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
import scripts
import soak

from ditx.data.sources import digits
from ditx.parallel import distributed
from ditx.parallel.distributed import DistributedConfig, SyncedBatches, launched, stop_signals, sync_errors
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import checkpoint

TRAIN = scripts.ROOT / "train.py"
FLAGS = [*soak.FLAGS, "--decay", "constant", "--checkpoint-every", 3, "--log-every", 3, "--batch-size", 16]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"coordinator": "here"}, "coordinator is 'here'; give HOST:PORT, or auto"),
        ({"coordinator": "here:99999", "count": 2, "index": 0}, "give HOST:PORT"),
        ({"coordinator": "here:80", "count": 2, "index": 2}, "index is 2 of 2; give both"),
        ({"coordinator": "here:80"}, "index is -1 of 0; give both"),
        ({"count": 2}, "need --distributed.coordinator"),
        ({"heartbeat": 0}, "heartbeat is 0; it must be at least 1"),
    ],
)
def test_processes_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        DistributedConfig(**fields)


def test_launchers_tell_the_number_of_a_process(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert launched() == (3, 4)
    DistributedConfig(coordinator="here:80")  # mpirun says the rest
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert launched() == (1, 2)


def test_one_process_agrees_with_itself():
    with pytest.raises(OSError, match="no disk"), sync_errors():
        raise OSError("no disk")
    assert distributed.broadcast_from_main(7) == 7
    distributed.assert_same_everywhere({"any": "thing"})


def test_batches_end_at_a_signal_and_at_a_failure_after_those_before():
    mesh = make_mesh(MeshConfig())
    with stop_signals() as received:
        taken = []
        for batch in SyncedBatches(iter(range(100)), mesh, received):
            taken.append(batch)
            if batch == 4:
                signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] and taken == [0, 1, 2, 3, 4]

    def failing():
        yield from range(3)
        raise ValueError("cannot read image 3")

    batches = SyncedBatches(failing(), mesh, [])
    assert list(batches) == [0, 1, 2] and str(batches.error) == "cannot read image 3"
    assert list(SyncedBatches(iter(range(3)), mesh, [2])) == []


def test_a_signal_that_comes_twice_is_one(monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    with stop_signals() as received:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # as launchers hand them on
            signal.raise_signal(number)
        assert received == [signal.SIGTERM] and not ended
        monkeypatch.setattr("time.monotonic", lambda now=time.monotonic: now() + 2)
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]


def test_a_closed_terminal_stops_as_sigterm_does_unless_it_is_ignored(monkeypatch, capfd):
    with stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        assert received == [signal.SIGHUP]
    assert "stopping within two steps, with a checkpoint; Ctrl-C stops at once" in capfd.readouterr().err
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        assert received == []
    signal.signal(signal.SIGHUP, before)


def test_a_killed_reader_is_an_error_unless_a_signal_ended_it():
    def killed():
        yield 0
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -15.")

    mesh = make_mesh(MeshConfig())
    batches = SyncedBatches(killed(), mesh, [])
    assert list(batches) == [0] and "the data cannot be read on (Worker process was" in str(batches.error)
    with stop_signals() as received:
        batches = SyncedBatches(killed(), mesh, received)
        for _ in batches:
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] and batches.error is None


def test_a_process_that_is_left_alone_ends_and_one_short_of_memory_says_so(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("ditx.parallel.distributed.end", ended.append)
    with distributed.exit_if_peer_dies():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed by peer\nmore")
    assert ended == [os.EX_TEMPFAIL]
    said = capsys.readouterr().err
    assert (
        "another process has died (UNAVAILABLE: connection closed by peer); start all of them again to resume" in said
    )
    with pytest.raises(jax.errors.JaxRuntimeError), distributed.exit_if_peer_dies():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert len(ended) == 1


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def complete(*started):
    for code, output in map(scripts.finish, started):
        assert code == 0, output


@pytest.mark.slow
def test_one_device_eight_and_two_processes_take_turns_in_one_run(tmp_path):
    run, other = tmp_path / "turns", tmp_path / "undisturbed"
    fsdp, data = ["--mesh.data", 2, "--mesh.fsdp", 4], ["--mesh.data", 8, "--mesh.fsdp", 1]
    complete(scripts.start(TRAIN, *FLAGS, *fsdp, "--run", run, "--steps", 3, devices=8))
    complete(scripts.start(TRAIN, *FLAGS, "--run", run, "--steps", 6, "--keep-every", 3))
    flags = [*FLAGS, *fsdp, "--run", run, "--steps", 100_000, "--log-every", 1]
    pair = scripts.start_together(TRAIN, *flags)
    while not [line for line in metrics(run) if line["step"] > 7]:
        assert all(process.poll() is None for process in pair), [process.communicate() for process in pair]
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)  # one is told, all stop after the same step, with a checkpoint
    for code, output in map(scripts.finish, pair):
        assert code == 143 and "Traceback" not in output, output
    newest = checkpoint.steps(run / "checkpoints")[-1]
    assert newest == metrics(run)[-1]["step"]
    last = newest + 3
    complete(scripts.start(TRAIN, *FLAGS, "--mesh.tensor", 8, "--run", run, "--steps", last, devices=8))
    complete(scripts.start(TRAIN, *FLAGS, *data, "--run", other, "--steps", last, "--log-every", 1, devices=8))
    expected = {line["step"]: line for line in metrics(other)}
    for line in metrics(run)[2:]:
        if 6 < line["step"] <= newest:
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(line[name], expected[line["step"]][name], rtol=2e-5)
    means = [np.mean([expected[step]["loss"] for step in steps]) for steps in ([1, 2, 3], [4, 5, 6])]
    np.testing.assert_allclose([line["loss"] for line in metrics(run)[:2]], means, rtol=2e-5)
    draw = [scripts.ROOT / "sample.py", run, "--num-samples", 10, "--steps", 4, "--npz", "--out"]
    complete(
        *scripts.start_together(*draw, tmp_path / "two.png", "--mesh.data", 2, "--mesh.tensor", 4, launcher="mpirun")
    )
    complete(scripts.start(*draw, tmp_path / "one.png"))
    with np.load(tmp_path / "two.npz") as two, np.load(tmp_path / "one.npz") as one:
        # Rounding may move a pixel that lies next to a boundary by one.
        assert np.abs(two["arr_0"].astype(int) - one["arr_0"]).max() <= 1
    a, b = soak.arrays(run, last), soak.arrays(other, last)
    for x, y in zip(jax.tree.leaves(a["ema"]), jax.tree.leaves(b["ema"]), strict=True):
        # Adam divides by the root of a mean square, so that rounding grows where gradients are next to nothing.
        np.testing.assert_allclose(x, y, atol=2e-3)


@pytest.mark.slow
def test_a_run_restored_on_eight_one_two_times_four_and_eight_devices_is_the_same(tmp_path):
    """By a script that reads the newest checkpoint where the mesh has it, and writes it to the next folder."""
    first = tmp_path / "8"
    complete(scripts.start(TRAIN, *FLAGS, "--mesh.data", 1, "--mesh.fsdp", 8, "--run", first, "--steps", 3, devices=8))
    script = scripts.ROOT / "tests" / "helpers" / "resave.py"
    complete(scripts.start(script, first, tmp_path / "1"))
    complete(*scripts.start_together(script, tmp_path / "1", tmp_path / "2x4", launcher="srun"))
    complete(scripts.start(script, tmp_path / "2x4", tmp_path / "back", devices=8))
    state, (step,) = soak.arrays(first, 3), checkpoint.steps(tmp_path / "back" / "checkpoints")
    assert step == 3 and max(float(abs(leaf).max()) for leaf in jax.tree.leaves(state["ema"])) > 0
    for name in ("1", "2x4", "back"):
        jax.tree.map(np.testing.assert_array_equal, soak.arrays(tmp_path / name, 3), state)


@pytest.mark.slow
def test_two_processes_find_the_fid_of_one_while_they_train(tmp_path):
    reference = scripts.write_reference(tmp_path / "reference.npz", digits().images[::125])
    flags = [*FLAGS, "--steps", 3, "--sampling.steps", 2, "--eval-every", 3, "--eval-samples", 24]
    fids = []
    for start in (scripts.start, scripts.start_together):
        started, run = (
            start(TRAIN, *flags, "--eval-stats", reference, "--run", tmp_path / start.__name__),
            start.__name__,
        )
        complete(*(started if isinstance(started, list) else [started]))
        fids.append([line["fid"] for line in metrics(tmp_path / run) if "fid" in line])
    assert len(fids[0]) == 1 and fids[0] == pytest.approx(fids[1], rel=1e-2)  # a pixel may be rounded otherwise


@pytest.mark.slow
def test_mistakes_of_one_process_end_all_of_them_in_one_sentence(tmp_path):
    flags = [*FLAGS, "--run", tmp_path / "run", "--steps", 3]
    first, second = scripts.start_together(TRAIN, *flags)
    second.kill()
    second.communicate()
    # In its place, one with other flags.
    arguments = [*second.args[1:], "--seed", 1]
    code, output = scripts.finish(scripts.start(*arguments, devices=4))
    assert code == 2 and "process 1 has other flags or other data than process 0" in output, output
    code, output = scripts.finish(first)
    assert code == 2 and "process 1 has other flags" in output and not (tmp_path / "run").exists(), output


@pytest.mark.slow
def test_killed_one_by_one_and_together_nothing_is_lost(tmp_path):
    """The short form of `tests/helpers/soak.py`."""
    told = soak.soak(tmp_path, kills=2, steps=15, seed=2, devices=2)
    assert told["kills"] == 2 and told["runs"] >= 1
