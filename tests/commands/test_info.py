import dataclasses
import json

import pytest
from references import load

import ditx
from ditx import costs
from ditx.commands.info import TABLE_4
from ditx.parallel.mesh import MeshConfig


def test_the_papers_table_is_beside_our_counts(run):
    code, output = run.ditx("info", "--paper", "--json")
    assert code == 0
    rows = json.loads(output)
    golden = load("paper_tables.json")["table4"]
    printed = [(row["model"], row["block"], row["image_size"], row["gmacs"], row["params_millions"]) for row in golden]
    columns = ("model", "block", "image_size", "paper_gflops", "paper_millions")
    assert [tuple(row[name] for name in columns) for row in rows] == printed
    for row in rows:
        assert row["parameters_agree"], row
        assert row["deviation"] == pytest.approx(row["gigamacs"] / row["paper_gflops"] - 1)
        assert abs(row["gigamacs"] - row["paper_gflops"]) < max(3e-4 * row["paper_gflops"], 0.0055)
    code, table = run.ditx("info", "--paper")
    assert code == 0 and table.count("DiT-") == len(TABLE_4) and "parameters agree in 16 of 16" in table
    assert "DiT-XL/2 cross-attention 256 137.62 137.603 -0.01% 598 597,991,712" in table


def test_costs_of_a_published_network(run):
    code, output = run.ditx("info", "DiT-XL/2", "--json", "--batch-size", 128)
    figures = json.loads(output)
    assert code == 0 and figures["parameters"] == 674834720
    assert figures["bytes"] == {name: n * 674834720 for name, n in zip(figures["bytes"], (4, 4, 8, 4), strict=True)}
    assert figures["training_step_flops"] == 6 * 128 * figures["multiply_adds"]
    code, output = run.ditx("info", "--model", "DiT-S/4", "--depth", 2)
    assert code == 0 and "DiT-XL/2, changed by flags: adaln-zero, 2 blocks of width 384, 6 heads, 64 tokens" in output
    assert "DiT-S/4: adaln-zero, 12 blocks of width 384" in run.ditx("info", "--model", "DiT-S/4")[1]
    code, output = run.ditx("info", "DiT-XL/2", "--json", "--power-emas", 2)
    assert json.loads(output)["bytes"]["ema"] == 3 * figures["bytes"]["ema"]
    assert json.loads(output)["device_bytes"]["ema"] == 3 * figures["device_bytes"]["ema"]
    code, output = run.ditx("info", "DiT-XL/2")
    assert code == 0 and "674,834,720" in output and "118.62 G (the paper's Gflops)" in output and "GiB" in output


def test_flags_change_single_fields(run):
    code, output = run.ditx("info", "DiT-B/4", "--block", "in-context", "--input-size", 64, "--json")
    assert code == 0
    config = ditx.DiTConfig(**json.loads(output)["config"])
    assert (config.block, config.input_size, config.hidden_size) == ("in-context", 64, 768)
    assert json.loads(output)["multiply_adds"] == costs.macs(config)


def test_memory_of_one_device_of_a_mesh_that_does_not_exist(run):
    flags = ("--mesh.data", 64, "--mesh.fsdp", 4, "--batch-size", 1024, "--remat", "full", "--accumulate", 2)
    code, output = run.ditx("info", "DiT-XL/2", *flags, "--dtype", "float32", "--json")
    assert code == 0
    figures, mesh = json.loads(output), MeshConfig(64, 4, 1)
    device = figures["device_bytes"]
    assert device.pop("total") == sum(device.values())
    assert device == costs.step_memory(ditx.DiTConfig(), batch_size=1024, mesh=mesh, accumulate=2, remat="full")
    assert (figures["mesh"], figures["remat"]) == (dataclasses.asdict(mesh), "full")
    code, output = run.ditx("info", "DiT-XL/2", *flags)
    assert "one device in a training step, an estimate: data 64 x fsdp 4 x tensor 1, bfloat16, remat full" in output
    assert "estimate: data 1 x fsdp 8 x tensor 1" in run.ditx("info", "DiT-S/8", "--mesh.fsdp", 8)[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["info", "DiT-XXL/2"], "unknown network 'DiT-XXL/2'; did you mean 'DiT-XL/2'? choose from DiT-S/8"),
        (["info", "--patch-size", 5], "patch_size 5 does not divide input_size 32"),
        (["info", "--batch-size", 0], "batch_size is 0"),
        (["info", "--accumulate", 0], "accumulate is 0; it must be at least 1"),
        (["info", "--mesh.fsdp", -1], "mesh.fsdp is -1; give the number of devices, at least 1"),
        (["info", "--mesh.data", 0], "mesh.data is 0"),
        (["info", "--mesh.tensor", 3], "mesh.tensor is 3, which does not divide num_heads, 16"),
        (["info", "--mesh.fsdp", 6], "batch_size is 256; make it a multiple of 6 devices"),
        (["inform"], "unknown verb 'inform'; did you mean 'info'? choose from train, sample, bench, convert"),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, sentence):
    code, output = run.ditx(*arguments)
    assert code == 2 and sentence in output and "Traceback" not in output


def test_help_lists_the_verbs(run):
    code, output = run.ditx()
    assert code == 0 and all(verb in output for verb in ("bench", "convert", "extract", "info"))
