"""The preset fitted to a folder of images and to the devices."""

from dataclasses import replace

from ditx.nn.dit import DIT_CONFIGS
from ditx.training.config import PRESETS
from ditx.training.fit import Facts, fit_fields

PRESET = PRESETS["images"]


def fit(images, side, platform="cpu", devices=1, **own):
    """The fitted configuration and its lines; `own` are the user's fields of the run, in the preset's place."""
    return fit_fields(replace(PRESET, **own), set(own), Facts(images, side, platform, devices))


def test_a_cpu_trains_a_small_network_for_minutes_and_an_accelerator_a_large_one_for_epochs():
    config, lines = fit(120, 96)
    model = config.model
    assert (model.input_size, model.patch_size, model.hidden_size, config.batch_size) == (32, 4, 128, 16)
    assert config.dtype == "float32" and config.steps < 2_000 and config.checkpoint_every <= config.steps // 4
    assert any("--model.input-size 32: the images have 96 pixels; on a CPU" in line for line in lines), lines
    for count, name, steps in ((120, "DiT-S/4", 10_000), (50_000, "DiT-B/4", 39_062), (2_000_000, "DiT-B/4", 400_000)):
        config, _ = fit(count, 500, "gpu")
        assert (config.model.hidden_size, config.model.depth) == (DIT_CONFIGS[name].hidden_size, 12)
        assert (config.model.input_size, config.model.num_tokens, config.dtype) == (64, 256, "bfloat16")
        assert (config.steps, config.learning_rate) == (steps, 1e-4)


def test_every_folder_gets_a_network_that_fits():
    for platform in ("cpu", "gpu"):
        for count, side, devices in ((1, 3, 1), (12, 4000, 8), (30, 97, 1), (2000, 32, 3), (50, 28, 1)):
            config, _ = fit(count, side, platform, devices)
            config.check_fields()
            assert config.model.input_size <= max(side, 4) and config.model.num_tokens <= 256
            assert config.batch_size % devices == 0 and config.batch_size <= max(count, devices)


def test_the_users_own_fields_stay_and_the_others_fit_them():
    own = replace(PRESET.model, **{"input_size": 48, "hidden_size": 384, "num_heads": 6})
    given = {"model.input_size", "model.hidden_size", "model.num_heads", "steps", "batch_size"}
    config = replace(PRESET, **{"model": own, "steps": 50, "batch_size": 7})
    config, lines = fit_fields(config, given, Facts(120, 96, "cpu", 1))
    assert (config.model.input_size, config.model.patch_size, config.model.hidden_size) == (48, 6, 384)
    assert (config.steps, config.batch_size, config.sample_every, config.learning_rate) == (50, 7, 10, 1e-4)
    assert not any("--steps" in line or "--batch-size" in line or "--model.input-size" in line for line in lines)
