import jax
import pytest

from ditx import cli


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("the value is wrong"), 2, "prog: the value is wrong\n"),
        (OSError("no disk"), 2, "prog: no disk\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 bytes\nmore"),
            2,
            "prog: the devices have too little memory (RESOURCE_EXHAUSTED: no 9 bytes); try it\n",
        ),
    ],
)
def test_a_command_ends_in_one_sentence_and_a_code(error, code, text, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

    def fail():
        raise error

    assert cli.run("prog", fail, out_of_memory="try it") == code
    assert capsys.readouterr().err == text
    assert cli.run("prog", lambda: 7) == 7


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    with pytest.raises(jax.errors.JaxRuntimeError), pytest.MonkeyPatch.context():
        cli.run("prog", lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: bug")))


def test_the_preset_comes_first():
    presets = {"digits": 1, "cifar10": 2}
    assert cli.split_preset([], presets, default="digits") == ("digits", [])
    assert cli.split_preset(["--steps", "3"], presets, default="digits") == ("digits", ["--steps", "3"])
    assert cli.split_preset(["cifar10", "--flip"], presets, default="digits") == ("cifar10", ["--flip"])
    with pytest.raises(ValueError, match="unknown preset 'cifar'; did you mean 'cifar10'\\? choose from digits, cif"):
        cli.split_preset(["cifar"], presets, default="digits")
