import json
import sys
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest

from ditx.training import run as runs
from ditx.training.config import Config
from ditx.training.logger import MAX_SKIPPED, MetricsLogger, Profiler

TERMS = {"loss": np.float32(2.0), "grad_norm": np.float32(0.5), "skipped": np.float32(0)}
FAILED = {"loss": np.float32(np.nan), "grad_norm": np.float32(np.inf), "skipped": np.float32(1)}


@pytest.fixture
def make(tmp_path):
    """Monitors of one run, closed at the end."""
    with ExitStack() as stack:

        def made(**options):
            sums = {name: np.zeros(()) for name in ("count", *TERMS)}
            config = Config(batch_size=8, seed=5, **options)
            return stack.enter_context(closing(MetricsLogger(tmp_path, config, sums)))

        yield made


def test_a_line_has_the_means_of_the_updates_that_were_made(make, tmp_path, capsys):
    metrics = make()
    for step, terms in enumerate([TERMS, FAILED, TERMS | {"loss": np.float32(4.0)}], 1):
        metrics.add(step, terms)
    assert metrics.mean_loss() == 2.0  # the last terms are read when the next ones come, or for a line
    line = metrics.write()
    assert (line["step"], line["loss"], line["grad_norm"], line["skipped"]) == (3, 3.0, 0.5, 1)
    assert metrics.mean_loss() == 3.0 and not any(total.any() for total in metrics.sums.values())
    assert "step 2 is not finite (loss nan, gradient norm inf, seed 5)" in capsys.readouterr().err
    for step in (4, 5):
        metrics.add(step, FAILED)
    assert metrics.skipping() and metrics.consecutive_skips == 2
    metrics.write()
    metrics.add(6, TERMS)
    assert not metrics.skipping()
    metrics.add(7, FAILED)
    metrics.close()
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in (tmp_path / runs.METRICS).read_text().splitlines()
    ]
    assert [line["loss"] for line in lines] == [3.0, None] and lines[1]["skipped"] == 2


def test_losses_by_time_are_means_of_the_examples_there(make):
    metrics = make()
    metrics.sums["by_time"] = np.zeros((2, 3))
    for by_time in ([[0.25, 0.75, 0], [1.0, 0.75, 0]], [[0.5, 0.5, 0], [0.5, 1.5, 0]]):
        metrics.add(1, TERMS | {"by_time": np.array(by_time, np.float32)})
    metrics.add(3, FAILED | {"by_time": np.full((2, 3), np.nan, np.float32)})
    line = metrics.write()
    assert line["loss_by_time"] == [2.0, 1.8, None] and line["count_by_time"] == [6, 10, 0]
    assert "by_time" not in line and metrics.sums["by_time"].shape == (2, 3) and not metrics.sums["by_time"].any()


def test_too_many_skipped_updates_in_a_row_end_the_run(make):
    metrics = make()
    metrics.add(1, TERMS)
    for step in range(2, MAX_SKIPPED + 2):
        metrics.add(step, FAILED)
    with pytest.raises(ValueError, match=r"10 updates in a row were skipped, up to step 11 \(loss nan.*seed 5"):
        metrics.settle()


def test_waiting_for_data_is_measured_and_warned_of_once(make, capsys):
    def slow():
        while True:
            time.sleep(0.02)
            yield 1

    metrics = make()
    batches = metrics.timed(slow())
    for step in (1, 2):
        next(batches)
        time.sleep(0.01)
        metrics.add(step, TERMS)
        assert 0.3 < metrics.write()["data_wait"] < 1
    assert capsys.readouterr().err.count("of the time since the last line was spent waiting for data") == 1
    time.sleep(0.05)
    assert metrics.write()["data_wait"] == 0
    next(batches)
    metrics.write()
    assert "waiting for data" in capsys.readouterr().err


def test_time_of_other_work_does_not_count(make):
    metrics = make()
    metrics.add(4, TERMS)
    with metrics.paused():
        time.sleep(0.2)
    time.sleep(0.02)
    metrics.add(8, TERMS)
    assert metrics.speed() > 8 * 4 / 0.2


def test_memory_is_in_the_line_where_the_device_has_a_figure(make, monkeypatch):
    metrics = make()
    assert "peak_memory" not in metrics.write()
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 123, "bytes_in_use": 45})
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    assert metrics.write()["peak_memory"] == 123


@pytest.mark.parametrize(
    ("start", "last", "count", "traced"),
    [(0, 100, 3, (4, 6)), (0, 100, 0, None), (0, 4, 2, (3, 4)), (0, 2, 5, (1, 2)), (49, 51, 1, (51, 51))],
)
def test_a_profile_is_of_steps_that_exist(tmp_path, monkeypatch, start, last, count, traced):
    now, seen = [0], []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: seen.append(now[0]))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: seen.append(now[0]))
    with closing(Profiler(tmp_path, start, last, count)) as profiler:
        for now[0] in range(start + 1, last + 1):
            profiler.before(now[0])
            profiler.after(now[0], ())
    assert tuple(seen) == (traced or ())


def test_lines_and_pictures_go_to_wandb_under_one_id(make, tmp_path, monkeypatch):
    """By a stand-in for the service."""
    opened, logged = [], []
    service = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    stub = SimpleNamespace(
        init=lambda **options: opened.append(options) or service, Image=lambda path: path, __spec__=None
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for _ in range(2):
        metrics = make(wandb="project", steps=3)
        metrics.add(1, TERMS)
        metrics.write()
        metrics.log({"samples": tmp_path / "picture.png", "averages": None, "fid": 2.5})
        metrics.close()
    assert opened[0] == opened[1] and opened[0]["project"] == "project" and opened[0]["config"]["steps"] == 3
    assert opened[0]["id"] == (tmp_path / "wandb-id").read_text() and opened[0]["resume"] == "allow"
    assert logged[0][0] == 1 and logged[0][1]["loss"] == 2.0
    assert (1, {"samples": f"{tmp_path}/picture.png"}) in logged and (1, {"step": 1, "fid": 2.5}) in logged


def test_wandb_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed; put --extra wandb"):
        Config(wandb="project").check_fields()
