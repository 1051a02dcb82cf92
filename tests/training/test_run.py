import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from ditx.parallel.distributed import DistributedConfig
from ditx.training.config import PRESETS, Config
from ditx.training.run import Run, check_run

DATA = SimpleNamespace(class_names=tuple("0123456789"), checksum="0123", latents=None)


@pytest.fixture
def stored(tmp_path):
    """A run that has come to step 20, and its description."""
    config = replace(PRESETS["digits"], decay="constant", steps=20, run=str(tmp_path))
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    described = config.describe("digits", DATA)
    (tmp_path / "config.json").write_text(json.dumps(described))
    return config, described


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_keeps_its_configuration(name):
    config = replace(PRESETS[name], seed=7, flow_times="uniform", distributed=DistributedConfig("here:80", 2, 1))
    read = Config.of(json.loads(json.dumps(config.describe(name, DATA))))
    assert read == replace(config, distributed=DistributedConfig())


def test_a_damaged_configuration_is_a_sentence():
    with pytest.raises(ValueError, match=r"runs/a: its config.json is damaged, or of another version"):
        Config.of({"run": "runs/a", "model": {"depth": "many"}})


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    config = replace(PRESETS["digits"], run=str(tmp_path / "file" / "runs" / "a"))
    with pytest.raises(ValueError, match=r"cannot write .*runs/a, since .*file is read-only or no folder"):
        Run.check(config, config.describe("digits", DATA))


def test_more_steps_go_on_at_a_constant_rate_and_fewer_are_refused(stored, tmp_path):
    config, _ = stored
    before = (tmp_path / "config.json").read_bytes()
    for steps, finished in (20, True), (21, False):
        config = replace(config, steps=steps)
        assert Run.check(config, config.describe("digits", DATA)) is finished
    config = replace(config, steps=14)
    with pytest.raises(ValueError, match=f"{tmp_path} has come to step 20; give at least --steps 20"):
        Run.check(config, config.describe("digits", DATA))
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_no_flag_cures_gets_a_remedy_of_its_own(stored, tmp_path):
    config, described = stored
    for name, sentence in [
        ("jax_enable_x64", "jax.enable_x64 was False and is True; set JAX_ENABLE_X64 and JAX_DEFAULT_PRNG_IMPL as"),
        ("jax_default_prng_impl", "jax.prng_impl was 'threefry2x32' and is 'rbg'; set JAX_ENABLE_X64 and"),
    ]:
        before = getattr(jax.config, name)
        jax.config.update(name, {"jax_enable_x64": True}.get(name, "rbg"))
        try:
            with pytest.raises(ValueError, match=sentence):
                Run.check(config, config.describe("digits", DATA))
        finally:
            jax.config.update(name, before)
    with pytest.raises(ValueError, match="data_checksum was '0123' and is '4567'; bring the data back, or train in"):
        check_run(tmp_path, described | {"data_checksum": "4567"}, changeable=config.changeable_on_resume)
    grown = {"data_checksum": "4567", "model": described["model"] | {"num_classes": 11}}
    with pytest.raises(ValueError, match=r"model\.num_classes was 10 and is 11, .*; bring the data back, or train in"):
        check_run(tmp_path, described | grown, changeable=config.changeable_on_resume)
    with pytest.raises(ValueError, match="seed was 0 and is 1; give its flags to resume it, or another --run"):
        check_run(tmp_path, described | {"seed": 1, "steps": 30}, changeable=config.changeable_on_resume)
