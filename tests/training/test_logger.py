import json
import sys
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest

from ditx.training import run as runs
from ditx.training.logger import MetricsLogger, Profiler, check_wandb

TERMS = {"loss": np.float32(2.0), "grad_norm": np.float32(0.5), "skipped": np.float32(0)}
FAILED = {"loss": np.float32(np.nan), "grad_norm": np.float32(np.inf), "skipped": np.float32(1)}


@pytest.fixture
def make(tmp_path):
    """Monitors of one run, closed at the end."""
    with ExitStack() as stack:

        def made(**options):
            sums = {name: np.zeros(()) for name in ("count", *TERMS)}
            options = {"step": 0, "batch_size": 8, "seed": 5, "max_skipped": 3} | options
            return stack.enter_context(closing(MetricsLogger(tmp_path, sums, **options)))

        yield made


def test_a_line_has_the_means_of_the_updates_that_were_made(make, tmp_path, capsys):
    monitor = make()
    for step, terms in enumerate([TERMS, FAILED, TERMS | {"loss": np.float32(4.0)}], 1):
        monitor.add(step, terms)
    assert monitor.mean_loss() == 3.0
    line = monitor.write(3)
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (3.0, 0.5, 1)
    assert monitor.mean_loss() == 3.0 and not any(total.any() for total in monitor.sums.values())
    assert "step 2 is not finite (loss nan, norm of the gradients inf; seed 5)" in capsys.readouterr().err
    for step in (4, 5):
        monitor.add(step, FAILED)
    monitor.write(5)
    monitor.add(6, TERMS)  # which ends the row
    monitor.add(7, FAILED)
    monitor.close()
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in (tmp_path / runs.METRICS).read_text().splitlines()
    ]
    assert [line["loss"] for line in lines] == [3.0, None] and lines[1]["skipped"] == 2


def test_losses_by_time_are_means_of_the_examples_there(make):
    monitor = make()
    monitor.sums["by_time"] = np.zeros((2, 3))
    for by_time in ([[0.25, 0.75, 0], [1.0, 0.75, 0]], [[0.5, 0.5, 0], [0.5, 1.5, 0]]):
        monitor.add(1, TERMS | {"by_time": np.array(by_time, np.float32)})
    monitor.add(3, FAILED | {"by_time": np.full((2, 3), np.nan, np.float32)})
    line = monitor.write(3)
    assert line["loss_by_time"] == [2.0, 1.8, None] and line["count_by_time"] == [6, 10, 0]
    assert "by_time" not in line and monitor.sums["by_time"].shape == (2, 3) and not monitor.sums["by_time"].any()


def test_too_many_in_a_row_end_the_run(make):
    monitor = make()
    monitor.add(1, TERMS)
    monitor.add(2, FAILED)
    monitor.add(3, FAILED)
    with pytest.raises(ValueError, match=r"3 updates in a row were skipped, up to step 4 \(loss nan.*seed 5"):
        monitor.add(4, FAILED)


def test_waiting_for_data_is_measured_and_said_once(make, capsys):
    def slow():
        while True:
            time.sleep(0.02)
            yield 1

    monitor = make()
    batches = monitor.waiting(slow())
    for step in (1, 2):
        next(batches)
        time.sleep(0.01)
        line = monitor.write(step)
        assert 0.3 < line["data_wait"] < 1
    assert capsys.readouterr().err.count("of the time since the last line was spent waiting for data") == 1
    time.sleep(0.05)
    assert monitor.write(3)["data_wait"] == 0
    next(batches)
    monitor.write(4)
    assert "waiting for data" in capsys.readouterr().err


def test_time_that_is_not_the_trainings_does_not_count(make):
    monitor = make()
    with monitor.paused(4):
        time.sleep(0.2)
    time.sleep(0.02)
    assert monitor.measure(8) > 8 * 4 / 0.2


def test_memory_is_in_the_line_where_the_device_tells_it(make, monkeypatch):
    monitor = make()
    assert "peak_memory" not in monitor.write(1)
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 123, "bytes_in_use": 45})
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    assert monitor.write(2)["peak_memory"] == 123


@pytest.mark.parametrize(
    ("first", "last", "count", "traced"),
    [(1, 100, 3, (4, 6)), (1, 100, 0, None), (1, 4, 2, (3, 4)), (1, 2, 5, (1, 2)), (50, 51, 1, (51, 51))],
)
def test_a_profile_is_of_steps_that_there_are(tmp_path, monkeypatch, first, last, count, traced):
    now, seen = [0], []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: seen.append(now[0]))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: seen.append(now[0]))
    with closing(Profiler(tmp_path, first, last, count)) as profile:
        for now[0] in range(first, last + 1):
            profile.before(now[0])
            profile.after(now[0], ())
    assert tuple(seen) == (traced or ())


def test_lines_go_to_wandb_under_one_name(make, tmp_path, monkeypatch):
    """By a stand-in for the service: what is handed to it."""
    opened, logged = [], []
    service = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    stub = SimpleNamespace(
        init=lambda **options: opened.append(options) or service, Image=lambda path: path, __spec__=None
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for _ in range(2):
        monitor = make(wandb="project", config={"steps": 3})
        monitor.add(1, TERMS)
        monitor.write(1)
        monitor.show(1, tmp_path / "picture.png")
        monitor.close()
    assert opened[0] == opened[1] and opened[0]["project"] == "project" and opened[0]["config"] == {"steps": 3}
    assert opened[0]["id"] == (tmp_path / "wandb-id").read_text() and opened[0]["resume"] == "allow"
    assert (
        logged[0][0] == 1 and logged[0][1]["loss"] == 2.0 and logged[1] == (1, {"samples": f"{tmp_path}/picture.png"})
    )


def test_wandb_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed; put --extra wandb"):
        check_wandb()
