import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from networks import abstract_dit
from references import load

import ditx
from ditx import costs
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DiTConfig
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.testing import dit_configs
from ditx.training.compile import AbstractStep
from ditx.training.config import PRESETS
from ditx.training.step import adamw, train_step
from ditx.weights.convert import dit_to_torch

TABLES = load("paper_tables.json")
ROWS = TABLES["table4"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}@{row['image_size']} {row['block']}")
def test_macs_are_those_of_the_papers_table(row):
    config = dataclasses.replace(ditx.DIT_CONFIGS[row["model"]], input_size=row["latent_size"], block=row["block"])
    printed, counted = row["gmacs"], costs.macs(config) / 1e9
    # The authors' remaining terms are unknown: 0.03 % above 10, the rounding of the print below.
    assert counted == pytest.approx(printed, **({"rel": 3e-4} if printed > 10 else {"rel": 0, "abs": 0.0055}))


@pytest.mark.parametrize("name", sorted(TABLES["parameters_including_fixed_positions"]))
def test_parameters_are_those_of_the_released_networks(name):
    config = ditx.DIT_CONFIGS[name]
    fixed = config.num_tokens * config.hidden_size
    assert costs.parameters(config) == TABLES["parameters_including_fixed_positions"][name] - fixed


def test_the_paper_has_twelve_networks():
    assert sorted(ditx.DIT_CONFIGS) == sorted(TABLES["parameters_including_fixed_positions"])
    assert ditx.DIT_CONFIGS["DiT-XL/2"] == ditx.DiTConfig()


@pytest.mark.parametrize(("name", "count"), TABLES["trainable_parameters_exact"].items())
def test_parameters_of_each_block_are_the_papers(name, count):
    model, block = name.split()
    assert costs.parameters(dataclasses.replace(ditx.DIT_CONFIGS[model], block=block)) == count


@given(dit_configs())
def test_macs_are_those_of_the_closed_formula(config):
    tokens, d, patch = config.num_tokens, config.hidden_size, config.patch_size**2
    n = tokens + (2 if config.block == "in-context" else 0)
    embeddings = tokens * patch * config.in_channels * d + 256 * d + d * d
    block = n * (4 * d * d + 2 * d * config.mlp_size) + 2 * n * n * d
    if config.block == "cross-attention":
        block += 2 * n * d * d + 2 * 2 * d * d + 2 * n * 2 * d
    block += {"adaln-zero": 6, "adaln": 4}.get(config.block, 0) * d * d
    final = (2 * d * d if config.block in ("adaln-zero", "adaln") else 0) + tokens * d * patch * config.out_channels
    assert costs.macs(config) == embeddings + config.depth * block + final


def test_the_modern_layers_are_counted():
    config = ditx.DiTConfig(8, 2, 3, 24, 3, 2, num_classes=5, learn_sigma=False, norm="rms", qk_norm=True, mlp="swiglu")
    config = dataclasses.replace(config, positions="rotary", context_tokens=4, context_start=1, patch_bottleneck=5)
    assert config.mlp_size == 64
    blocks = sum(n * (4 * 24**2 + 3 * 24 * 64) + 2 * n * n * 24 + 6 * 24**2 for n in (16, 20, 20))
    assert costs.macs(config) == 16 * (12 * 5 + 5 * 24) + 256 * 24 + 24**2 + blocks + 2 * 24**2 + 16 * 24 * 12
    options = {"batch_size": 8, "dtype": "bfloat16"}
    whole = costs.step_memory(config, mesh=MeshConfig(data=1), **options)
    split = costs.step_memory(config, mesh=MeshConfig(data=1, fsdp=2, tensor=2), **options)
    assert split["weights"] < 0.4 * whole["weights"] and split["activations"] < whole["activations"]


@pytest.mark.parametrize(
    ("preset", "file", "name"),
    [
        ("lightningdit-xl1", "lightningdit", "LightningDiT-XL/1"),
        ("jit-b16", "jit", "JiT-B/16"),
        ("jit-l16", "jit", "JiT-L/16"),
    ],
)
def test_parameters_of_later_networks_are_their_authors(preset, file, name):
    model, reference = PRESETS[f"imagenet256-{preset}"].model, load(f"{file}_state_dict_shapes.json")[name]
    assert costs.parameters(model) == reference["count"]["trainable"]
    fixed = model.num_tokens * model.hidden_size
    assert costs.parameters(model) + fixed == reference["count"]["all_parameters"]
    if "shapes" in reference:  # of all names, in one of the blocks
        small = abstract_dit(dataclasses.replace(model, depth=1, context_start=0))
        written = dit_to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), small))
        written = {name: list(array.shape) for name, array in written.items()}
        kept = r"(?!blocks\.)|blocks\.0\."
        assert written == {name: shape for name, shape in reference["shapes"].items() if re.match(kept, name)}


def test_macs_of_loops_branches_and_convolutions_are_counted():
    def count(function, *shapes):
        return costs.count_macs(jax.make_jaxpr(function)(*map(jnp.zeros, shapes)).jaxpr)

    square, image, kernel = (4, 4), (1, 8, 8, 3), (3, 3, 3, 5)
    assert count(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0], square) == 7 * 64
    branches = (lambda x: x @ x @ x, lambda x: x)
    assert count(lambda x: jax.lax.cond(x.sum() > 0, *branches, x), square) == 2 * 64
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="SAME", dimension_numbers=layout)
    assert count(convolve, image, kernel) == 4 * 4 * 5 * 3 * 3 * 3
    with pytest.raises(ValueError, match="a while loop contains matrix products"):
        count(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x), square)


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
    assert costs.parameters(config) == (rows + 2 * norms) * d + sum(i * o + o for i, o in linears)


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
def test_nominal_peaks_of_known_devices(kind, tflops):
    assert costs.nominal_peak(kind) == 1e12 * tflops


def test_unknown_devices_have_no_nominal_peak():
    assert costs.nominal_peak("cpu") is costs.nominal_peak("NVIDIA A1000") is None


# Memory of a training step

CONFIG = DiTConfig(16, 2, 4, 64, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "mesh", "options"),
    [
        ((16, 2, 4, 256, 8, 4), {}, {"remat": "full"}),
        ((16, 2, 4, 256, 8, 4), {"fsdp": 2, "tensor": 2}, {"remat": "dots", "accumulate": 2}),
        ((32, 2, 4, 128, 3, 4), {"fsdp": 4}, {"power_emas": 2}),
    ],
    ids=str,
)
def test_estimated_memory_is_near_the_figure_of_xla(network, mesh, options):
    config, mesh = (
        DiTConfig(*network, num_classes=10),
        MeshConfig(8 // (mesh.get("fsdp", 1) * mesh.get("tensor", 1)), **mesh),
    )
    estimate = costs.step_memory(config, batch_size=64, mesh=mesh, **options)
    devices, optimizer, emas = make_mesh(mesh), adamw(1e-4), options.pop("power_emas", 0)
    step = partial(train_step, objective=make_objective(ObjectiveConfig()), optimizer=optimizer, ema_decay=0.9)
    step = partial(step, ema_gammas=emas * (6.94,), apply_block=KernelConfig().apply_block(), mesh=devices, **options)
    program, _, size = AbstractStep(step, config, optimizer, devices, 64, power_emas=emas).compiled
    arguments = program.memory_analysis().argument_size_in_bytes
    held = sum(estimate[name] for name in ("weights", "ema", "moments", "batch"))
    assert held <= arguments <= held + 64  # the arguments include the step, a count of the optimizer, and a key
    # Measured: 0.79 to 1.13 for eight networks in float32. XLA for CPUs also copies weights and moments.
    assert 0.75 < sum(estimate.values()) / size < 1.25


def step_memory(batch_size=64, config=CONFIG, data=1, fsdp=1, tensor=1, **options):
    return costs.step_memory(config, batch_size=batch_size, mesh=MeshConfig(data, fsdp, tensor), **options)


def test_activations_grow_with_a_devices_part_of_the_batch_and_shrink_with_recomputation():
    none, dots, full = (step_memory(remat=remat) for remat in ("none", "dots", "full"))
    assert none["activations"] > 2 * dots["activations"] > 4 * full["activations"]
    assert step_memory(128)["activations"] == 2 * none["activations"]
    assert step_memory(128, data=2) == none
    assert step_memory(accumulate=2)["activations"] == none["activations"] / 2
    assert step_memory(accumulate=2)["gradients"] == 2 * none["gradients"]
    assert step_memory(dtype="bfloat16")["activations"] < 0.7 * none["activations"]
    sharded = step_memory(fsdp=8)
    assert all(sharded[name] < 0.14 * none[name] for name in ("weights", "ema", "moments", "batch", "gradients"))
    # `tensor` splits heads and MLP, not the residual stream.
    assert 0.5 * none["activations"] < step_memory(tensor=2)["activations"] < 0.8 * none["activations"]


def test_full_recomputation_saves_the_inputs_of_the_blocks():
    config = DiTConfig(16, 2, 4, 64, 40, 4)
    inputs = 40 * 8 * 64 * 64 * 4
    assert inputs <= step_memory(8, config, remat="full")["activations"] < 1.3 * inputs


def test_memory_of_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mesh.tensor is 3, which does not divide num_heads, 4"):
        step_memory(tensor=3)
    with pytest.raises(ValueError, match=r"batch_size is 64; make it a multiple of 8 devices x accumulate 3"):
        step_memory(fsdp=8, accumulate=3)
