import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from networks import NETWORKS, abstract_dit, example
from references import load
from traced import equations

import ditx
from ditx.testing import dit_configs

TABLES = load("paper_tables.json")
ROWS = TABLES["table4"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}@{row['image_size']} {row['block']}")
def test_macs_are_those_of_the_papers_table(row):
    config = dataclasses.replace(ditx.DIT_CONFIGS[row["model"]], input_size=row["latent_size"], block=row["block"])
    printed, counted = row["gmacs"], ditx.costs.macs(config) / 1e9
    # The authors' remaining terms are unknown: 0.03 % above 10, the rounding of the print below.
    assert counted == pytest.approx(printed, **({"rel": 3e-4} if printed > 10 else {"rel": 0, "abs": 0.0055}))


@pytest.mark.parametrize("name", sorted(TABLES["parameters_including_fixed_positions"]))
def test_parameters_are_those_of_the_released_networks(name):
    config = ditx.DIT_CONFIGS[name]
    fixed = config.num_tokens * config.hidden_size
    assert ditx.costs.parameters(config) == TABLES["parameters_including_fixed_positions"][name] - fixed


def test_the_paper_has_twelve_networks():
    assert sorted(ditx.DIT_CONFIGS) == sorted(TABLES["parameters_including_fixed_positions"])
    assert ditx.DIT_CONFIGS["DiT-XL/2"] == ditx.DiTConfig()


@pytest.mark.parametrize(("name", "count"), TABLES["trainable_parameters_exact"].items())
def test_parameters_of_each_block_are_the_papers(name, count):
    model, block = name.split()
    assert ditx.costs.parameters(dataclasses.replace(ditx.DIT_CONFIGS[model], block=block)) == count


def matmul_dtype(jaxpr):
    """Multiply-adds of every matrix product in a traced program."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += times * math.prod(output) * math.prod(left[axis] for axis in contracted)
    return total


@NETWORKS
@given(dit_configs())
def test_macs_are_those_of_the_traced_network(config):
    forward = jax.vmap(lambda model, x, t, y: model(x, t, y), (None, 0, 0, 0))
    traced = jax.make_jaxpr(forward)(abstract_dit(config), *(jnp.asarray(one)[None] for one in example(config)))
    # What the bias of its values makes of attention's result, once for all tokens of all images, is not counted.
    assert ditx.costs.macs(config) == matmul_dtype(traced.jaxpr) - config.depth * config.hidden_size**2


@given(dit_configs())
def test_parameters_are_those_of_the_design(config):
    d, mlp, patch = config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.patch_size**2
    rows = config.num_classes + (config.label_dropout > 0)
    linears = [(patch * config.in_channels, d), (256, d), (d, d)]
    linears += config.depth * [(d, 3 * d), (d, d), (d, mlp), (mlp, d)]
    linears += [(d, patch * config.in_channels * (1 + config.learn_sigma))]
    condition = {"adaln-zero": [(d, 6 * d)], "adaln": [(d, 4 * d)], "cross-attention": 4 * [(d, d)], "in-context": []}
    linears += config.depth * condition[config.block] + ([(d, 2 * d)] if config.block.startswith("adaln") else [])
    norms = {"cross-attention": 3 * config.depth + 1, "in-context": 2 * config.depth + 1}.get(config.block, 0)
    assert ditx.costs.parameters(config) == (rows + 2 * norms) * d + sum(i * o + o for i, o in linears)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
    ],
)
def test_peaks_that_makers_state(kind, tflops):
    assert ditx.costs.nominal_peak(kind) == 1e12 * tflops


def test_no_peak_is_made_up():
    assert ditx.costs.nominal_peak("cpu") is ditx.costs.nominal_peak("NVIDIA A1000") is None
