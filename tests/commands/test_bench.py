import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ditx
from ditx import costs
from ditx.commands import bench, bench_evaluation, bench_reading, bench_sweep, bench_torch, bench_work
from ditx.data.latents import LatentSource
from ditx.diffusion.objective import ObjectiveConfig
from ditx.nn.inception import Inception
from ditx.nn.vae import AutoencoderKL, VAEConfig

SMALL = ("--input-size", 4, "--in-channels", 4, "--hidden-size", 8, "--depth", 1, "--num-heads", 2)


def check_figures(told, work):
    """That the figures follow from each other and from the FLOPs of one call."""
    assert told["seconds"] == np.median(told["times"]) > 0
    assert told["quartiles"][0] <= told["seconds"] <= told["quartiles"][1]
    assert told["images_per_second"] == pytest.approx(told["batch_size"] / told["seconds"])
    assert told["tflops"] == pytest.approx(work / told["seconds"] / 1e12)
    assert told["mfu"] == pytest.approx(told["tflops"] / told["peak_tflops_measured"])
    assert told["compile_seconds"] > 0 and told["program_bytes"] > 0 and told["versions"]["ditx"] and told["date"]
    assert (told["backend"], told["peak_tflops_nominal"], told["mfu_nominal"]) == ("cpu", None, None)


def test_a_training_step_on_any_mesh(run):
    flags = ("--mesh.fsdp", 2, "--remat", "full", "--batch-size", 16)
    code, said = run.ditx("bench", "train", "tiny", *SMALL, *flags, "--repeats", 2, "--json")
    assert code == 0, said
    told = json.loads(said)
    model = ditx.DiTConfig(**told["config"]["model"])
    assert told["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and model.hidden_size == 8 and len(told["times"]) == 2
    assert told["parameters"] == costs.parameters(model)
    check_figures(told, 6 * 16 * costs.macs(model))


def test_a_draw_with_guidance_is_two_forward_passes_a_step(run):
    flags = ("--no-learn-sigma", "--sampler", "heun", "--steps", 3, "--batch-size", 8, "--unroll", 1)
    code, said = run.ditx("bench", "sample", "tiny", *SMALL, *flags, "--repeats", 1, "--json")
    assert code == 0, said
    told = json.loads(said)
    macs = costs.macs(ditx.DiTConfig(**told["config"]["model"]))
    check_figures(told, 2 * 8 * ((2 * 3 - 1) * 2) * macs)
    sampling = bench_work.SamplingConfig(steps=3)
    assert bench_work.evaluations(sampling, ObjectiveConfig()) == 3
    assert bench_work.evaluations(replace(sampling, guidance_scale=2.0), ObjectiveConfig()) == 6


def test_only_a_want_of_memory_is_taken_for_one():
    with (
        pytest.raises(ValueError, match=r"too little memory on the devices \(RESOURCE_EXHAUSTED: of HBM\)"),
        bench_work.memory_checked(),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of HBM\nmuch more")
    with pytest.raises(jax.errors.JaxRuntimeError), bench_work.memory_checked():
        raise jax.errors.JaxRuntimeError("INTERNAL: else")


def test_a_sweep_recommends_the_fastest_and_skips_what_does_not_fit(run, monkeypatch):
    tried = []

    def train(config):
        choice, computed = (config.batch_size, config.unroll, config.remat), (config.kernels, config.attention)
        tried.append((*choice, computed))
        if config.remat == "none" and config.batch_size > 8:
            raise bench_work.OutOfMemoryError("it takes 2.00 GiB on each device, which has 1.00")
        time = {(8, 2, "dots"): 0.1, (16, 1, "full"): 0.15}.get(choice, 0.4)
        time *= {("fused", "auto"): 0.5 if choice[0] == 8 else 2, ("plain", "fused"): 0.8}.get(computed, 1)
        return bench_work.Timing([time] * 3, config.batch_size, 10**9, 1.0, 2**20)

    monkeypatch.setattr(bench_work, "train", train)
    monkeypatch.setattr(bench, "devices", lambda *_: {"peak_tflops_measured": 0.1, "peak_tflops_nominal": 1.0})
    flags = ("--depth", 2, "--sweep", "--batch-sizes", 32, 8, 16, "--json")
    code, said = run.ditx("bench", "train", "tiny", *flags)
    assert code == 0, said
    told = json.loads(said)
    assert told["recommended"] == "--batch-size 16 --unroll 1 --remat full --kernels plain --attention auto"
    assert told["by_batch_size"]["8"] == "--batch-size 8 --unroll 2 --remat dots --kernels plain --attention auto"
    skipped = {(row["batch_size"], row["unroll"]): row["skipped"] for row in told["rows"] if "skipped" in row}
    assert skipped[16, 1] == "out of memory: it takes 2.00 GiB on each device, which has 1.00"
    assert (
        skipped[32, 2] == "out of memory with a smaller batch already"
        and (32, 2, "none", ("plain", "auto")) not in tried
    )
    assert len(told["rows"]) == 18 and len(skipped) == 4 and len(tried) == 16
    assert told["rows"][0]["mfu_nominal"] == pytest.approx(1e9 / 0.4 / 1e12)

    # Where there is more that can compute blocks, it is tried with what was fastest of each batch size.
    tried.clear()
    others = [("plain", "fused"), ("fused", "auto"), ("fused", "fused")]
    monkeypatch.setattr(bench_sweep, "check_compute", lambda *_: None)
    code, said = run.ditx("bench", "train", "tiny", *flags)
    assert code == 0, said
    told = json.loads(said)
    assert Counter(computed for *_, computed in tried) == {("plain", "auto"): 16} | dict.fromkeys(others, 3)
    assert [row["remat"] for row in told["rows"][18:]] == ["dots"] * 3 + ["full"] * 3 + ["dots"] * 3
    assert told["recommended"] == "--batch-size 8 --unroll 2 --remat dots --kernels fused --attention auto"
    assert told["by_batch_size"]["16"] == "--batch-size 16 --unroll 1 --remat full --kernels plain --attention fused"

    tried.clear()
    monkeypatch.setattr(bench_work, "check_compute", lambda *_: None)
    code, said = run.ditx("bench", "train", "tiny", *flags, "--kernels", "fused", "--attention", "fused")
    assert code == 0, said
    others = [("plain", "fused"), ("plain", "auto"), ("fused", "auto")]
    assert Counter(computed for *_, computed in tried) == {("fused", "fused"): 16} | dict.fromkeys(others, 3)

    def never(config):
        raise bench_work.OutOfMemoryError("no")

    monkeypatch.setattr(bench_work, "train", never)
    code, said = run.ditx("bench", "train", "tiny", *flags)
    assert code == 2 and "none of the choices fits" in said


# Beside PyTorch


def test_turns_are_taken_apart_and_a_killed_one_is_said():
    assert bench_torch.apart(partial(json.loads, "[0.1]")) == [0.1]
    with pytest.raises(ValueError, match="a turn was killed"):
        bench_torch.apart(partial(os._exit, 1))


def test_peers_are_compared_by_medians_of_all_turns():
    ours = {"batch_size": 8, "flops": 10**9, "peak_tflops_measured": 0.1, "peak_tflops_nominal": None}
    turns = {
        "ditx": [ours | {"times": [0.1, 0.2]}, ours | {"times": [0.2]}],
        "torch": [{"times": [0.3, 0.6], "parameters": 5}, {"times": [0.9]}],
    }
    told = bench.compare(turns)
    assert (told["seconds"], told["images_per_second"]) == (0.2, 40)
    peer = told["beside"]["torch"]
    assert peer["ratio"] == pytest.approx(3) and peer["turns"] == pytest.approx([0.45, 0.9])
    assert peer["tflops"] == pytest.approx(1e9 / 0.6 / 1e12) and peer["parameters"] == 5


# Data


@pytest.mark.parametrize("kind", ["latents", "png", "jpeg"])
def test_files_made_to_be_read(tmp_path, kind):
    bench_reading.make(tmp_path, kind, 20, 8)
    source = bench_reading.open_source(tmp_path, 8)
    assert isinstance(source, LatentSource) == (kind == "latents")
    assert (len(source), len(source.class_names)) == (20, 10)
    assert source.image_shape == ((8, 8, 4) if kind == "latents" else (8, 8, 3))
    batch = source.take(np.arange(2), np.zeros(2, bool))
    assert np.isfinite(batch["x"]).all() and np.std(batch["x"]) > 0.1


def test_rates_are_of_images_and_batches_are_not_counted_that_were_read_ahead(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench_reading.time, "perf_counter", lambda: clock[0])

    def batches(burst=1):
        for number in range(10**6):
            # Those read ahead are there at once; processes deliver several together.
            clock[0] += 0 if number < 8 or number % burst else 0.25 * burst
            yield number

    assert bench_reading.read_times(batches(), 3, workers=0) == pytest.approx([0.25] * 3)
    assert bench_reading.read_times(batches(burst=4), 3, workers=4) == pytest.approx([0.25] * 3)
    assert bench.rates(bench_work.Timing([0.25] * 3, 64))["images_per_second"] == 256


def test_reading_rates(run):
    flags = ("--count", 20, "--size", 8, "--batch-size", 4, "--repeats", 3)
    code, said = run.ditx("bench", "data", "--make", "latents", "png", *flags, "--json")
    assert code == 0, said
    read = json.loads(said)["read"]
    assert list(read) == ["latents", "png"] and all(len(row["times"]) == 3 for row in read.values())
    assert read["png"]["images_per_second"] == pytest.approx(4 / read["png"]["seconds"])


def test_cifar10_is_read_from_an_npz(tmp_path):
    np.savez(tmp_path / "c.npz", images=np.zeros((3, 32, 32, 3), np.uint8), labels=np.arange(3))
    assert len(bench_reading.open_source(tmp_path / "c.npz", 32)) == 3


def test_encoding_and_decoding_rates(run, tmp_path, monkeypatch):
    class Mean(AutoencoderKL):
        """It compiles at once."""

        def __init__(self):
            self.encoder, self.config = jnp.ones(()), VAEConfig(latent_channels=3)
            self.quant = self.post_quant = self.decoder = None

        def encode(self, image):
            return image[::8, ::8] * self.encoder, jnp.zeros_like(image[::8, ::8])

    monkeypatch.setattr(bench_reading, "load_vae", lambda name: (Mean(), name))
    bench_reading.make(tmp_path, "jpeg", 12, 20)
    flags = ("--vae", "mean", "--size", 16, "--batch-size", 8, "--repeats", 2)
    code, said = run.ditx("bench", "extract", tmp_path, *flags, "--json")
    assert code == 0, said
    read = json.loads(said)["read"]
    for row in (read["encode"], read["decode"]):
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"]) and len(row["times"]) == 2
    code, said = run.ditx("bench", "extract", *flags)
    assert code == 0 and said.startswith("encode ") and "decode" not in said


def test_rates_of_features_and_metrics(run, monkeypatch):
    class Found(NamedTuple):
        pool: jax.Array
        spatial: jax.Array

    class Means(Inception):
        """It compiles at once."""

        def __init__(self, *, key):
            self.stem, self.blocks, self.logits = (), (), jax.random.normal(key, (12, 5))

        def __call__(self, image, *, resize):
            rows = jnp.mean(image / 255, (1, 2))
            return Found(rows[:12], rows[12:16])

    monkeypatch.setattr(bench_evaluation, "Inception", Means)
    flags = ("--size", 16, "--batch-size", 2, "--count", 30, "--repeats", 2)
    code, said = run.ditx("bench", "evaluate", *flags, "--json")
    assert code == 0, said
    read = json.loads(said)["read"]
    assert list(read) == ["features", "moments", "fid", "sfid", "inception-score", "precision-recall"]
    assert len(read["features"]["times"]) == 2 and read["features"]["batch_size"] == 2 * 8
    for row in list(read.values())[1:]:
        assert row["batch_size"] == 30 and row["images_per_second"] == pytest.approx(30 / row["seconds"])
    code, said = run.ditx("bench", "evaluate", *flags, "--metrics", "fid")
    assert code == 0 and " moments " in said and " fid " in said and "sfid" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["training"], "there is no 'training' to time; choose train, sample, evaluate, extract, data"),
        (["train", "DiT-XXL/2"], "there is no network 'DiT-XXL/2'; give DiT-S/8"),
        (["train", "tiny", "--repeats", 0], "repeats is 0; it must be at least 1"),
        (["train", "tiny", "--mesh.fsdp", 3], "a mesh of data=-1, fsdp=3, tensor=1 does not make up the 8 devices"),
        (["train", "tiny", "--mesh.tensor", 8], "mesh.tensor is 8, which does not divide num_heads, 4"),
        (["train", "tiny", "--batch-size", 12], "batch_size is 12; make it a multiple of the 8 devices"),
        (["train", "tiny", "--sweep", "--batch-sizes", 12], "batch_size is 12; make it a multiple of the 8 devices"),
        (["train", "tiny", "--sweep", "--batch-sizes", 0], "each must be at least 1"),
        (["train", "tiny", "--sweep", "--beside", "torch"], "not both at once"),
        (["train", "tiny", "--kernels", "fused", "--mesh.tensor", 2], "needs whole examples, but mesh.tensor is 2"),
        (["sample", "tiny", "--kernels", "fused"], "for GPUs, but the devices are of the kind cpu; use plain"),
        (
            ["train", "tiny", "--attention", "cudnn"],
            "attention is cudnn, which is for GPUs, but the devices are of the",
        ),
        (["sample", "tiny", "--steps", 0], "steps is 0; schedule linear samples in 1 to 1000 steps"),
        (["sample", "tiny", "--batch-size", 12], "batch_size is 12; make it a multiple of the 8 devices"),
        (["extract", "--batch-size", 12], "batch_size is 12; make it a multiple of the 8 devices"),
        (["evaluate", "--count", 3], "count is 3; the metrics need at least 4"),
        (["data", "nowhere"], "nowhere does not exist; give latents, CIFAR-10 or a folder of images"),
        (["data", "--workers", -1], "workers is -1; it must not be negative"),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, sentence):
    code, said = run.ditx("bench", *arguments)
    assert code == 2 and sentence in said and "Traceback" not in said


def test_without_a_peer_it_is_said_what_is_missing(run, monkeypatch):
    monkeypatch.setattr(bench_torch.importlib.util, "find_spec", lambda name: None if name == "torch" else "here")
    code, said = run.ditx("bench", "train", "tiny", "--beside", "torch")
    assert code == 2 and "--beside needs torch, not installed here" in said
    monkeypatch.setattr(bench_torch.importlib.util, "find_spec", lambda name: "here")
    code, said = run.ditx("bench", "train", "tiny", "--beside", "torch", "--block", "adaln")
    assert code == 2 and "block is adaln; diffusers' network has adaln-zero alone" in said


def test_help_lists_what_can_be_timed(run):
    code, said = run.ditx("bench")
    assert code == 0 and all(f" {what} " in said for what in bench.KINDS)
