"""What is predicted of a step's memory, beside what XLA reports of the compiled one."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.memory import step_memory
from ditx.nn.dit import DiTConfig
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from ditx.training.step import TrainState, train_step

BF16 = jnp.dtype("bfloat16")
CONFIG = DiTConfig(16, 2, 4, 64, 4, 4)


def reported(config, mesh, batch_size, options):
    """Bytes of arguments and at the peak, by XLA's own analysis of the compiled step on eight devices."""
    mesh = make_mesh(MeshConfig(**mesh))
    optimizer = optax.adamw(1e-4)
    ema_gammas = options.pop("profiles", 0) * (6.94,)
    create = partial(TrainState.create, config, optimizer, power_emas=len(ema_gammas))
    state = with_shardings(jax.eval_shape(lambda key: create(key=key), jax.random.key(0)), mesh)
    shape, rows = (batch_size, config.input_size, config.input_size, config.in_channels), batch_sharding(mesh)
    batch = {
        "x": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
        "y": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    step = partial(train_step, objective=make_objective(ObjectiveConfig()), optimizer=optimizer, ema_decay=0.9)
    step = partial(step, ema_gammas=ema_gammas)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(partial(step, mesh=mesh, **options), donate_argnums=0, out_shardings=(places, None))
    found = step.lower(state, batch, jax.random.key(0)).compile().memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    return arguments, arguments + outputs - found.alias_size_in_bytes + found.temp_size_in_bytes


@pytest.mark.parametrize(
    ("network", "mesh", "batch_size", "options"),
    [
        ((16, 2, 4, 256, 8, 4), {"data": 8}, 64, {"remat": "full"}),
        ((16, 2, 4, 320, 6, 8), {"fsdp": 8}, 64, {"dtype": BF16, "profiles": 2}),
        ((16, 2, 4, 256, 8, 4), {"data": 2, "fsdp": 2, "tensor": 2}, 64, {"remat": "dots", "accumulate": 2}),
        ((32, 2, 4, 128, 3, 4), {"data": 2, "fsdp": 4}, 64, {"unroll": 3}),
    ],
    ids=str,
)
def test_the_peak_is_what_xla_reports(network, mesh, batch_size, options):
    config, mesh = DiTConfig(*network, num_classes=10), {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    told = step_memory(config, batch_size=batch_size, mesh=mesh, **options)
    arguments, peak = reported(config, mesh, batch_size, dict(options))
    held = sum(told[name] for name in ("weights", "ema", "moments", "batch"))
    assert held <= arguments <= held + 64  # the step and a key are held, too
    assert sum(told.values()) == pytest.approx(peak, rel=0.15)


def bytes_of(batch_size=64, config=CONFIG, data=1, fsdp=1, tensor=1, **options):
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return step_memory(config, batch_size=batch_size, mesh=mesh, **options)


def test_what_is_kept_grows_with_a_devices_part_of_the_batch_and_shrinks_with_what_is_recomputed():
    none, dots, full = (bytes_of(remat=remat) for remat in ("none", "dots", "full"))
    assert none["activations"] > 2 * dots["activations"] > 4 * full["activations"]
    assert bytes_of(128)["activations"] == pytest.approx(2 * none["activations"], rel=0.01)
    assert bytes_of(128, data=2) == none
    assert bytes_of(accumulate=2)["activations"] == pytest.approx(none["activations"] / 2, rel=0.02)
    assert bytes_of(accumulate=2)["gradients"] == 2 * none["gradients"]
    split = bytes_of(fsdp=8)
    assert all(split[name] < 0.14 * none[name] for name in ("weights", "ema", "moments", "batch", "gradients"))
    # Heads and MLP are split, what is as wide as a token is not.
    assert 0.5 * none["activations"] < bytes_of(tensor=2)["activations"] < 0.8 * none["activations"]


def test_inputs_of_the_blocks_are_what_whole_recomputation_keeps():
    config = DiTConfig(16, 2, 4, 64, 40, 4)
    inputs = 40 * 8 * 64 * 64 * 4
    assert inputs <= bytes_of(8, config, remat="full")["activations"] < 1.2 * inputs


def test_what_does_not_fit_a_mesh_is_refused():
    with pytest.raises(ValueError, match=r"mesh.tensor is 3, which does not divide num_heads, 4"):
        bytes_of(tensor=3)
    with pytest.raises(ValueError, match=r"batch_size is 64; make it a multiple of the 8 devices x accumulate 3"):
        bytes_of(fsdp=8, accumulate=3)
    with pytest.raises(ValueError, match=r"batch_size is 60; make it a multiple of the 8 devices$"):
        bytes_of(60, data=2, fsdp=4)
