"""`ditx study` on two tiny networks: begun, gone on with, told, and mistaken."""

import csv
import dataclasses
import json
import signal
import time

import numpy as np
import PIL.Image
import pytest
import scripts

from ditx import plots
from ditx.commands import study
from ditx.data.sources import digits
from ditx.training import checkpoint

TINY = dataclasses.replace(
    study.GRIDS["digits"],
    flags=("--batch-size", "8", "--log-every", "2", "--model.num-heads", "2", "--model.depth", "1"),
    networks={
        "A/14": ("--model.hidden-size", "16", "--model.patch-size", "14"),
        "A/14 adaln": ("--model.hidden-size", "16", "--model.patch-size", "14", "--model.block", "adaln"),
    },
    steps=4,
    every=2,
    num=8,
    sampling_steps=(2, 1),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of 40 digits by a classifier that was never trained."""
    return scripts.write_reference(tmp_path_factory.mktemp("study") / "reference.npz", digits().images[::125])


def test_networks_are_trained_and_judged_one_by_one_and_nothing_twice(run, tmp_path, monkeypatch, reference):
    monkeypatch.setitem(study.GRIDS, "digits", TINY)
    flags = ["digits", "--out", tmp_path, "--reference", reference]
    code, said = run.ditx("study", *flags, "--only", "A/14")
    assert code == 0 and "| A/14 | adaln-zero |" in said, said
    _, said = run.ditx("study", *flags, "--list")
    assert said == "A/14 step 4 of 4, 3 of 3 evaluations A/14 adaln step 0 of 4, 0 of 3 evaluations"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/A-14/**/*.json*")}
    assert checkpoint.steps(tmp_path / "runs" / "A-14" / "checkpoints") == [2, 4]

    code, said = run.ditx("study", *flags)
    assert code == 0, said
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/A-14/**/*.json*")}
    table = json.loads((tmp_path / "table.json").read_text())
    found = [(row["network"], row["step"], row["sampling_steps"]) for row in table["rows"]]
    assert found == [(name, *point) for name in TINY.networks for point in ((2, 2), (4, 2), (4, 1))]
    first, *_, last = table["rows"]
    assert last["block"] == "adaln" and first["training_flops"] * 2 == table["rows"][1]["training_flops"]
    assert first["training_flops"] == pytest.approx(6e9 * first["gflops"] * 8 * 2)
    lines = [
        json.loads(line) for line in (tmp_path / "evaluations" / "A-14" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [line["metrics"]["fid"] for line in lines] == [row["fid"] for row in table["rows"][:3]]
    with (tmp_path / "table.csv").open() as file:
        assert [float(row["fid"]) for row in csv.DictReader(file)] == [row["fid"] for row in table["rows"]]
    for name in ("gflops", "parameters", "compute", "training", "sampling", "blocks"):
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image))) > 10

    assert table["features"] == "classifier"
    # Evaluations that others make of a run are no part of it.
    other = ["--num", 8, "--step", 4, "--steps", 2, "--metrics", "fid", "--guidance-scale", 3]
    assert run.ditx("evaluate", tmp_path / "runs" / "A-14", reference, *other)[0] == 0
    assert run.ditx("study", *flags)[0] == 0 and table == json.loads((tmp_path / "table.json").read_text())

    code, said = run.ditx("study", *flags, "--", "--batch-size", 0)
    assert code == 2 and "train.py ended with 2 for A/14, for the reason above" in said, said
    code, said = run.ditx("study", *flags, "--steps", 2)
    assert code == 2 and "is a run of 4 steps, with a learning rate that falls over them, and not of 2" in said, said


def test_told_to_stop_it_ends_with_a_checkpoint_of_the_network_in_training_and_goes_on_from_there(reference, tmp_path):
    flags = ["digits", "--only", "T/14", "--out", tmp_path, "--reference", reference, "--steps", 3000, "--num", 8]
    command = [scripts.ROOT / "ditx" / "__main__.py", "study", *flags, "--every", 3000, "--", "--log-every", 1]
    started, metrics = scripts.start(*command), tmp_path / "runs" / "T-14" / "metrics.jsonl"
    while not metrics.exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    code, said = scripts.finish(started)
    assert code == 143 and "stopped; the same command goes on from there" in said and "Traceback" not in said, said
    (saved,) = checkpoint.steps(metrics.parent / "checkpoints")
    assert 0 < saved < 3000 and saved == json.loads(metrics.read_text().splitlines()[-1])["step"]
    started = scripts.start(*command)
    while len(metrics.read_text().splitlines()) <= saved:
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert scripts.finish(started)[0] == 143
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()[: saved + 1]] == [
        *range(1, saved + 2)
    ]


def test_the_correlation_is_that_with_the_logarithm():
    gflops = [0.4, 1.4, 6.1, 23.0]
    assert study.correlation(gflops, [100 - 10 * np.log10(x) for x in gflops]) == pytest.approx(-1)
    assert study.correlation(gflops[:2], [1.0, 2.0]) is None


def test_grids_are_what_their_names_say(run):
    _, said = run.ditx("study", "sizes", "--list")
    assert said.count("step 0 of") == 6 and said.startswith("S/8") and "B/2" in said
    assert len(study.GRIDS["blocks"].networks) == 4


def test_mistakes_end_in_a_sentence(run, tmp_path, monkeypatch):
    for arguments, sentence in [
        (["sizes"], "sizes is of CIFAR-10; say where it lies with --data-path"),
        (["digits", "--only", "XL/2"], "there is no network 'XL/2' in digits; choose T/14, "),
        (["digits", "--every", "-1"], "every is -1; it must be at least 1"),
    ]:
        code, said = run.ditx("study", *arguments, "--out", tmp_path / "out")
        assert code == 2 and sentence in said and not (tmp_path / "out").exists(), said
    monkeypatch.setattr(study.ditx, "__file__", str(tmp_path / "site-packages" / "ditx" / "__init__.py"))
    code, said = run.ditx("study", "digits", "--out", tmp_path / "out")
    assert code == 2 and "train.py is not there; a study runs train.py, which a clone of the repository has" in said


def test_without_matplotlib_plots_are_said_to_need_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError):
        plots.write(tmp_path, {"rows": [], "sampling_steps": 1, "steps": 1, "correlation_of_fid_with_log_gflops": None})
