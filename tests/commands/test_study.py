"""`ditx study` on two tiny networks: started, resumed, listed, and given wrong flags."""

import csv
import dataclasses
import itertools
import json
import signal
import sys
import time

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest
import scripts

from ditx.commands import study
from ditx.data.sources import digits
from ditx.training import checkpoint

CORRELATION = "correlation_of_fid_with_log_gflops"
TINY = dataclasses.replace(
    study.GRIDS["digits"],
    flags="--batch-size 8 --log-every 2 --model.num-heads 2 --model.depth 1",
    networks={
        "A/14": "--model.hidden-size 16 --model.patch-size 14",
        "A/14 adaln": "--model.hidden-size 16 --model.patch-size 14 --model.block adaln",
    },
    steps=4,
    every=2,
    num_samples=8,
    sampling_steps=(2, 1),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of 40 digits by a classifier that was never trained."""
    return scripts.write_reference(tmp_path_factory.mktemp("study") / "reference.npz", digits().images[::125])


@pytest.mark.slow
def test_networks_are_trained_and_evaluated_one_by_one_and_nothing_twice(run, tmp_path, monkeypatch, reference):
    monkeypatch.setitem(study.GRIDS, "digits", TINY)
    flags = ["digits", "--out", tmp_path, "--reference", reference]
    code, output = run.ditx("study", *flags, "--only", "A/14")
    assert code == 0 and "| A/14 | adaln-zero |" in output, output
    _, output = run.ditx("study", *flags, "--list")
    assert output == "A/14 step 4 of 4, 3 of 3 evaluations A/14 adaln step 0 of 4, 0 of 3 evaluations"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/A-14/**/*.json*")}
    assert checkpoint.steps(tmp_path / "runs" / "A-14" / "checkpoints") == [2, 4]

    code, output = run.ditx("study", *flags)
    assert code == 0, output
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
    other = ["--num-samples", 8, "--step", 4, "--steps", 2, "--metrics", "fid", "--guidance-scale", 3]
    assert run.ditx("evaluate", tmp_path / "runs" / "A-14", reference, *other)[0] == 0
    assert run.ditx("study", *flags)[0] == 0 and table == json.loads((tmp_path / "table.json").read_text())

    code, output = run.ditx("study", *flags, "--", "--batch-size", 0)
    assert code == 2 and "the training of A/14 failed with exit code 2; see above" in output, output
    code, output = run.ditx("study", *flags, "--steps", 2)
    assert code == 2 and "is a run of 4 steps with a decaying learning rate, not of 2 steps" in output, output


@pytest.mark.slow
def test_a_stopped_study_saves_the_network_in_training_and_resumes(reference, tmp_path):
    flags = ["digits", "--only", "T/14", "--out", tmp_path, "--reference", reference, "--steps", 3000]
    flags += ["--num-samples", 8, "--every", 3000, "--", "--log-every", 1]
    command = [scripts.ROOT / "ditx" / "__main__.py", "study", *flags]
    started, metrics = scripts.start(*command), tmp_path / "runs" / "T-14" / "metrics.jsonl"
    while not metrics.exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    code, output = scripts.finish(started)
    assert code == 143 and "stopped; run the same command to resume" in output and "Traceback" not in output, output
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


def test_grids_have_the_networks_of_their_names(run):
    _, output = run.ditx("study", "sizes", "--list")
    assert output.count("step 0 of") == 6 and output.startswith("S/8") and "B/2" in output
    assert len(study.GRIDS["blocks"].networks) == 4


def test_mistakes_end_in_a_sentence(run, tmp_path):
    for arguments, sentence in [
        (["sizes"], "sizes trains on CIFAR-10; give its path with --data-path"),
        (["digits", "--only", "XL/2"], "unknown network of digits 'XL/2'; choose from T/14, "),
        (["digits", "--every", "-1"], "every is -1; it must be at least 1"),
    ]:
        code, output = run.ditx("study", *arguments, "--out", tmp_path / "out")
        assert code == 2 and sentence in output and not (tmp_path / "out").exists(), output


def test_labels_of_plots_do_not_overlap(tmp_path, monkeypatch):
    fields = {"step": 4, "sampling_steps": 2, "training_flops": 1.0, "parameters": 5, "block": "adaln-zero"}
    rows = [{"network": f"A/{n}", "gflops": 1.0 + n % 2 / 10, "fid": 9.0 + n // 4 / 10, **fields} for n in range(12)]
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, path: (figures.append(f), save(f, path)))
    study.write_plots(tmp_path, {"rows": rows, "steps": 4, "sampling_steps": 2, CORRELATION: None})
    texts = figures[0].axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text() for text in texts] == [row["network"] for row in rows]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_plots_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = [{"network": "A/2", "block": "adaln-zero", "step": 1, "sampling_steps": 1, "gflops": 1, "fid": 1}]
    with pytest.raises(ModuleNotFoundError):
        study.write_plots(tmp_path, {"rows": rows, "sampling_steps": 1, "steps": 1, CORRELATION: None})
