"""The paper's runs: each preset built by shapes alone, with the paper's hyperparameters."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from references import load

from ditx import flags
from ditx.diffusion.objective import make_objective
from ditx.nn.dit import DiTConfig
from ditx.sampling import SamplingConfig
from ditx.training import run as runs
from ditx.training.config import CHANGEABLE_ON_RESUME, PRESETS, PRESETS_HELP
from ditx.training.step import TrainState, adamw, train_step

ROWS = load("paper_tables.json")["table4"]
PAPER = sorted(name for name in PRESETS if name.startswith("imagenet") and PRESETS[name].model.convention == "dit")


def row_of(config):
    """The row of the paper's table that a configuration is."""
    model = config.model
    name = {384: "S", 768: "B", 1024: "L", 1152: "XL"}[model.hidden_size]
    key = f"DiT-{name}/{model.patch_size}", model.block, model.input_size
    (row,) = (row for row in ROWS if (row["model"], row["block"], row["latent_size"]) == key)
    return row


def test_the_whole_table_is_there():
    found = [row_of(PRESETS[name]) for name in PAPER]
    assert len(found) == len(ROWS) == 16 and all(row in found for row in ROWS)


@pytest.mark.parametrize("name", PAPER)
def test_preset_builds_and_is_the_papers(name):
    config = PRESETS[name]
    config.check_fields()
    row, optimizer = row_of(config), adamw(config.learning_rate, beta2=config.beta2)
    assert (config.batch_size, config.learning_rate, config.weight_decay, config.warmup) == (256, 1e-4, 0, 0)
    assert (config.decay, config.beta2, config.ema_decay, config.flip) == ("constant", 0.999, 0.9999, True)
    assert (config.schedule, config.prediction, config.dataset, config.model.label_dropout) == (
        "linear",
        "eps",
        "latents",
        0.1,
    )
    assert config.steps >= 1000 * row["steps_thousands"]
    sampling = config.sampling.resolved(config)
    assert (sampling.steps, sampling.guidance_channels) == (250, 3)

    state = jax.eval_shape(lambda key: TrainState.create(config.model, optimizer, key=key), jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(state.model)) / 1e6) == row["params_millions"]
    size = config.model.input_size
    latents = jax.ShapeDtypeStruct((config.batch_size, size, size, 4), jnp.float16)
    batch = {"x": latents, "std": latents, "y": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    step = partial(
        train_step,
        objective=make_objective(config),
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        dtype=jnp.dtype(config.dtype),
    )
    after, terms = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.model)} == {jnp.dtype("float32")}
    assert set(terms) == {"mse", "vb", "loss", "grad_norm", "skipped", "by_time"}


def test_kernels_may_change_on_resume_but_not_the_rounding_of_matmuls():
    before = {"kernels": "fused", "attention": "xla", "matmul_dtype": "fp8"}
    now = {"kernels": "xla", "attention": "auto", "matmul_dtype": "compute"}
    assert runs.diff(before, now, ignore=CHANGEABLE_ON_RESUME) == "matmul_dtype was 'fp8' and is 'compute'"
    del before["matmul_dtype"]  # a run of a version without this field
    assert not runs.diff(before, now, ignore=CHANGEABLE_ON_RESUME)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"accumulate": 0}, "accumulate is 0; it must be at least 1"),
        ({"keep_best": -1}, "keep_best is -1; it must not be negative"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be a finite number"),
        ({"seed": 2**32}, "seed is 4294967296; it goes from 0 to 4294967295"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; give 0 to below 1"),
        ({"vae": "ft-mse"}, "vae is 'ft-mse', but dataset digits has pixels"),
        ({"schedule": "flow", "model": DiTConfig()}, "trains no variance; add --model.no-learn-sigma"),
        ({"sampling": SamplingConfig(steps=-1)}, "steps is -1; schedule flow samples in 1 to"),
        ({"ema_every": 5, "ema_lengths": (0.4,)}, "length is 0.4 of the run; give a share"),
        ({"eval_every": 5}, "eval_every needs --eval-stats; make them with"),
        ({"eval_every": 5, "eval_stats": "a.npz", "eval_samples": 1}, "eval_samples is 1; it must be at least 2"),
        ({"eval_every": 5, "eval_stats": "a.npz", "dataset": "latents"}, "eval_every needs --vae"),
    ],
)
def test_impossible_values_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(PRESETS["digits"], **changes).check_fields()


def dataset(*shape, classes=10):
    return SimpleNamespace(image_shape=shape, class_names=tuple(map(str, range(classes))))


def test_the_model_takes_channels_and_classes_of_the_data_unless_flags_differ():
    preset = PRESETS["digits"]
    model = preset.matched_to(dataset(28, 28, 3, classes=4), preset).model
    assert (model.in_channels, model.num_classes) == (3, 4)
    matched = preset.matched_to(dataset(28, 28, 3, classes=0), preset)
    assert (matched.model.num_classes, matched.sampling.guidance_scale) == (0, 1.0)
    unlabelled = replace(
        preset, model=replace(preset.model, num_classes=0), sampling=replace(preset.sampling, guidance_scale=1.0)
    )
    assert unlabelled.matched_to(dataset(28, 28, 1), preset).model.num_classes == 0
    with pytest.raises(ValueError, match="the network has no labels; use 1"):
        replace(unlabelled, sampling=preset.sampling).matched_to(dataset(28, 28, 1), preset)
    for changes, sentence in [
        ({"num_classes": 12}, "model.num_classes is 12, but the data has 10; leave it out"),
        ({"input_size": 14}, "the images are 28x28, model.input_size is 14"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            replace(preset, model=replace(preset.model, **changes)).matched_to(dataset(28, 28, 1), preset)


def test_help_names_every_preset_on_two_screens(capsys):
    words = set(re.findall(r"[\w-]+", PRESETS_HELP))
    for name in PRESETS:
        assert {name, name.removeprefix("imagenet256-"), name.removeprefix("imagenet256-xl2")} & words, name
    with pytest.raises(SystemExit):
        flags.parse(["digits", "--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) <= 110


def test_mean_velocities_bring_their_embedding_attention_and_sampler():
    data = SimpleNamespace(image_shape=(28, 28, 1), class_names=tuple("0123456789"), latents={})
    mean = replace(PRESETS["digits"], prediction="mean-velocity", mean_guidance=(2.0, 0.0))
    matched = mean.matched_to(data, PRESETS["digits"])
    assert matched.model.mean_velocity and matched.attention == "xla"
    sampling = matched.sampling.resolved(matched)
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == ("mean-velocity", 1, 1.0)
    with pytest.raises(ValueError, match="attention is cudnn, which has no forward derivative"):
        replace(mean, attention="cudnn").matched_to(data, PRESETS["digits"])
