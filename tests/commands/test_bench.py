"""`ditx bench` on tiny networks: figures, sweeps, comparisons, mistakes."""

import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import ditx
from ditx import cli, costs
from ditx.commands import bench, bench_torch
from ditx.diffusion.objective import ObjectiveConfig
from ditx.kernels.block import KernelConfig
from ditx.parallel.compile import OutOfMemoryError
from ditx.sampling import SamplingConfig

SMALL = ("--input-size", 4, "--in-channels", 4, "--hidden-size", 8, "--depth", 1, "--num-heads", 2)


def check_figures(figures, flops):
    """The figures follow from each other and from the FLOPs of one call."""
    assert figures["seconds"] == np.median(figures["times"]) > 0
    assert figures["quartiles"][0] <= figures["seconds"] <= figures["quartiles"][1]
    assert figures["images_per_second"] == pytest.approx(figures["batch_size"] / figures["seconds"])
    assert figures["tflops"] == pytest.approx(flops / figures["seconds"] / 1e12)
    assert figures["mfu"] == pytest.approx(figures["tflops"] / figures["peak_tflops_measured"])
    assert (
        figures["compile_seconds"] > 0
        and figures["program_bytes"] > 0
        and figures["versions"]["ditx"]
        and figures["date"]
    )
    assert (figures["backend"], figures["peak_tflops_nominal"], figures["mfu_nominal"]) == ("cpu", None, None)


@pytest.mark.slow
def test_a_training_step_on_any_mesh(run):
    flags = ("--mesh.fsdp", 2, "--remat", "full", "--batch-size", 16)
    code, output = run.ditx("bench", "train", "tiny", *SMALL, *flags, "--repeats", 2, "--json")
    assert code == 0, output
    figures = json.loads(output)
    model = ditx.DiTConfig(**figures["config"]["model"])
    assert figures["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and model.hidden_size == 8
    assert figures["parameters"] == costs.parameters(model) and len(figures["times"]) == 2
    check_figures(figures, 6 * 16 * costs.macs(model))
    report = bench.report(figures)
    assert "batch 16" not in report and "ditx " in report and "% of the peak" in report


def test_a_guided_sample_is_two_forward_passes_a_step(run):
    flags = ("--no-learn-sigma", "--sampler", "heun", "--steps", 3, "--batch-size", 8, "--unroll", 1)
    code, output = run.ditx("bench", "sample", "tiny", *SMALL, *flags, "--repeats", 1, "--json")
    assert code == 0, output
    figures = json.loads(output)
    macs = costs.macs(ditx.DiTConfig(**figures["config"]["model"]))
    check_figures(figures, 2 * 8 * ((2 * 3 - 1) * 2) * macs)
    sampling = SamplingConfig(steps=3)
    assert bench.network_evaluations(sampling, ObjectiveConfig()) == 3
    assert bench.network_evaluations(replace(sampling, guidance_scale=2.0), ObjectiveConfig()) == 6


def fake_train(monkeypatch, attempts):
    """Replace the training step by known times, the largest batches without recomputation out of memory."""

    def train(config, mesh):
        choice, kernels = (config.batch_size, config.unroll, config.remat), (config.kernels, config.attention)
        attempts.append((*choice, kernels))
        if config.remat == "none" and config.batch_size > 8:
            raise OutOfMemoryError("it takes 2.00 GiB on each device, which has 1.00")
        if config.remat == "none" and config.unroll > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmuch more")
        time = {(8, 2, "dots"): 0.1, (16, 1, "full"): 0.15}.get(choice, 0.4)
        time *= {("fused", "auto"): 0.5 if choice[0] == 8 else 2, ("xla", "fused"): 0.8}.get(kernels, 1)
        figures = {"times": [time] * 3, "batch_size": config.batch_size, "flops": 10**9, "peak_bytes": None}
        return figures | {"compile_seconds": 1.0, "program_bytes": 2**20}

    peak = {"peak_tflops_measured": 0.1, "peak_tflops_nominal": 1.0}
    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "describe", lambda *_: peak)


def test_a_sweep_recommends_the_fastest_setting_and_skips_settings_that_do_not_fit(run, monkeypatch):
    attempts = []
    fake_train(monkeypatch, attempts)
    flags = ("--depth", 2, "--sweep", "--batch-sizes", 32, 8, 16, "--json")
    code, output = run.ditx("bench", "train", "tiny", *flags)
    assert code == 0, output
    figures = json.loads(output)
    assert figures["recommended"] == "--batch-size 16 --unroll 1 --remat full --kernels xla --attention auto"
    assert figures["by_batch_size"]["8"] == "--batch-size 8 --unroll 2 --remat dots --kernels xla --attention auto"
    skipped = {(row["batch_size"], row["unroll"]): row["skipped"] for row in figures["rows"] if "skipped" in row}
    assert skipped[16, 1] == "out of memory: it takes 2.00 GiB on each device, which has 1.00"
    assert skipped[8, 2] == "out of memory: RESOURCE_EXHAUSTED: Out of memory"
    assert skipped[32, 2] == skipped[32, 1] == "out of memory: with a smaller batch already"
    assert (32, 2, "none", ("xla", "auto")) not in attempts
    assert len(figures["rows"]) == 18 and len(skipped) == 5 and len(attempts) == 15
    assert figures["rows"][0]["mfu_nominal"] == pytest.approx(1e9 / 0.4 / 1e12)


def test_a_sweep_tries_the_other_kernels_where_they_are_supported(run, monkeypatch):
    attempts, flags = [], ("--depth", 2, "--sweep", "--batch-sizes", 8, 16, "--json")
    fake_train(monkeypatch, attempts)
    monkeypatch.setattr(KernelConfig, "check_kernels", lambda *_: None)
    code, output = run.ditx("bench", "train", "tiny", *flags)
    assert code == 0, output
    figures, others = json.loads(output), [("xla", "fused"), ("fused", "auto"), ("fused", "fused")]
    assert Counter(kernels for *_, kernels in attempts) == {("xla", "auto"): 11} | dict.fromkeys(others, 2)
    assert [row["remat"] for row in figures["rows"][12:]] == ["dots"] * 3 + ["full"] * 3
    assert figures["recommended"] == "--batch-size 8 --unroll 2 --remat dots --kernels fused --attention auto"
    assert figures["by_batch_size"]["16"] == "--batch-size 16 --unroll 1 --remat full --kernels xla --attention fused"


def test_a_sweep_in_which_nothing_fits_ends_in_a_sentence(run, monkeypatch):
    def train(config, mesh):
        raise OutOfMemoryError("no")

    fake_train(monkeypatch, [])
    monkeypatch.setattr(bench, "train", train)
    code, output = run.ditx("bench", "train", "tiny", "--sweep")
    assert code == 2 and "no setting fits" in output

    def fail(config, mesh):
        raise jax.errors.JaxRuntimeError("INTERNAL: other")

    monkeypatch.setattr(bench, "train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        run.ditx("bench", "train", "tiny", "--sweep")


# Comparison with PyTorch


def test_a_turn_is_a_new_process_and_a_killed_one_ends_in_a_sentence():
    call = partial(cli.in_new_process, killed="a turn was killed", initializer=bench_torch.use_one_gpu)
    assert call(partial(json.loads, "[0.1]")) == [0.1]
    with pytest.raises(ValueError, match="a turn was killed"):
        call(partial(os._exit, 1))


def test_peers_are_compared_by_medians_of_all_turns():
    ours = {"batch_size": 8, "flops": 10**9, "peak_tflops_measured": 0.1, "peak_tflops_nominal": None}
    turns = {
        "ditx": [ours | {"times": [0.1, 0.2]}, ours | {"times": [0.2]}],
        "torch": [{"times": [0.3, 0.6], "parameters": 5}, {"times": [0.9]}],
    }
    figures = bench.merge_turns(turns)
    assert (figures["seconds"], figures["images_per_second"]) == (0.2, 40)
    peer = figures["compare"]["torch"]
    assert peer["ratio"] == pytest.approx(3) and peer["turns"] == pytest.approx([0.45, 0.9])
    assert peer["tflops"] == pytest.approx(1e9 / 0.6 / 1e12) and peer["parameters"] == 5


def test_without_pytorch_or_a_network_of_diffusers_no_comparison_starts(run, monkeypatch):
    monkeypatch.setattr(bench_torch.importlib.util, "find_spec", lambda name: None if name == "torch" else "there")
    code, output = run.ditx("bench", "train", "tiny", "--compare", "torch")
    assert code == 2 and "--compare needs torch; try uv pip install torch diffusers" in output
    monkeypatch.setattr(bench_torch.importlib.util, "find_spec", lambda name: "there")
    code, output = run.ditx("bench", "train", "tiny", "--compare", "torch", "--block", "adaln")
    assert code == 2 and "block is adaln; the network of diffusers has adaln-zero only" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["training"], "unknown benchmark 'training'; did you mean 'train'? choose from train, sample"),
        (["train", "DiT-XXL/2"], "unknown network 'DiT-XXL/2'; did you mean 'DiT-XL/2'? choose from DiT-S/8"),
        (["train", "tiny", "--repeats", 0], "repeats is 0; it must be at least 1"),
        (["train", "tiny", "--mesh.fsdp", 3], "a mesh of data=-1, fsdp=3, tensor=1 does not fit 8 devices"),
        (["train", "tiny", "--mesh.tensor", 8], "mesh.tensor is 8, which does not divide num_heads, 4"),
        (["train", "tiny", "--batch-size", 12], "batch_size is 12; make it a multiple of 8 devices"),
        (["train", "tiny", "--sweep", "--batch-sizes", 12], "batch_size is 12; make it a multiple of 8 devices"),
        (["train", "tiny", "--sweep", "--batch-sizes", 0], "each must be at least 1"),
        (["train", "tiny", "--sweep", "--compare", "torch"], "--sweep and --compare exclude each other"),
        (["sample", "tiny", "--kernels", "fused"], "kernels is fused, which needs GPUs, not cpu; use xla"),
        (["sample", "tiny", "--steps", -1], "steps is -1; schedule linear samples in 1 to 1000 steps"),
        (["sample", "tiny", "--batch-size", 12], "batch_size is 12; make it a multiple of 8 devices"),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, sentence):
    code, output = run.ditx("bench", *arguments)
    assert code == 2 and sentence in output and "Traceback" not in output


def test_help_lists_the_benchmarks(run):
    code, output = run.ditx("bench")
    assert code == 0 and all(f" {what} " in output for what in bench.KINDS)
