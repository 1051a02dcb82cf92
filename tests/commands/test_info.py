import json

import pytest
from references import load

import ditx
from ditx import flops
from ditx.commands.info import TABLE_4, info


def test_the_papers_table_is_beside_our_counts(run):
    code, said = run.ditx("info", "--paper", "--json")
    assert code == 0
    rows = json.loads(said)
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
    code, said = run.ditx("info", "DiT-XL/2", "--json", "--batch-size", 128)
    costs = json.loads(said)
    assert code == 0 and costs["parameters"] == 674834720
    assert costs["bytes"] == {name: n * 674834720 for name, n in zip(costs["bytes"], (4, 4, 8, 4), strict=True)}
    assert costs["training_step_flops"] == 6 * 128 * costs["multiply_adds"]
    code, said = run.ditx("info", "DiT-XL/2")
    assert code == 0 and "674,834,720" in said and "118.62 G (the paper's Gflops)" in said and "GiB" in said


def test_flags_change_single_fields(run):
    code, said = run.ditx("info", "DiT-B/4", "--block", "in-context", "--input-size", 64, "--json")
    assert code == 0
    config = ditx.DiTConfig(**json.loads(said)["config"])
    assert (config.block, config.input_size, config.hidden_size) == ("in-context", 64, 768)
    assert json.loads(said)["multiply_adds"] == flops.macs(config)


@pytest.mark.parametrize("block", ["adaln-zero", "adaln", "cross-attention", "in-context"])
def test_activations_grow_with_the_batch_and_shrink_with_remat(block):
    config = ditx.DiTConfig(block=block)
    small, large = (info(config, n, "bfloat16")["activation_bytes"] for n in (1, 8))
    assert large["remat none"] == 8 * small["remat none"]
    assert small["remat blocks"] < 0.15 * small["remat none"]
    assert info(config, 1, "float32")["activation_bytes"]["remat none"] == 2 * small["remat none"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["info", "DiT-XXL/2"], "there is no network 'DiT-XXL/2'; give DiT-S/8"),
        (["info", "--patch-size", 5], "patch_size 5 does not divide input_size 32"),
        (["info", "--batch-size", 0], "batch_size is 0"),
        (["inform"], "there is no verb 'inform'; choose convert, extract, info"),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, sentence):
    code, said = run.ditx(*arguments)
    assert code == 2 and sentence in said and "Traceback" not in said


def test_help_lists_the_verbs(run):
    code, said = run.ditx()
    assert code == 0 and all(verb in said for verb in ("convert", "extract", "info"))
