import io
import os
from contextlib import closing

import jax
import pytest

from ditx import cli
from ditx.files import cache_folder


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
        (
            RuntimeError("Unable to initialize backend 'cuda': no such thing"),
            2,
            "prog: there is no device of JAX_PLATFORMS=cuda; unset it, or install JAX for that device: --extra cuda or"
            " --extra tpu after uv run\n",
        ),
    ],
)
def test_a_command_ends_in_one_sentence_and_a_code(error, code, text, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
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


def test_output_outlives_its_reader_and_small_alphabets(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:  # closing it writes what is left, and must not raise either
        output = cli.Output(stream)
        for _ in range(3):
            assert output.write("x" * 100_000) == 100_000
            output.flush()
        assert output.lost == ""
        stream.write("left")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output = cli.Output(stream)
    output.write("─ a")
    output.flush()
    assert stream.buffer.getvalue() == b"? a"
    with closing(cli.Output(None)) as output:
        output.write("closed before the start")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert cli.run("prog", lambda: print("figures") or 0) == 2
    assert "prog: the output could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err


def test_a_user_without_a_home_keeps_no_compiled_programs(monkeypatch):
    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    before = jax.config.jax_compilation_cache_dir
    assert cli.run("prog", lambda: 7) == 7 and jax.config.jax_compilation_cache_dir == before
    with pytest.raises(ValueError, match="no home folder to keep downloads in; set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/ditx"


@pytest.mark.parametrize(("started", "name"), [("/a/train.py", "sample.py"), ("/bin/ditx", "ditx sample")])
def test_a_script_is_named_as_the_process_was_started(started, name, monkeypatch):
    monkeypatch.setattr("sys.argv", [started])
    assert cli.script("sample") == name


def test_the_preset_comes_first():
    presets = {"digits": 1, "cifar10": 2}
    assert cli.split_preset([], presets, default="digits") == ("digits", [])
    assert cli.split_preset(["--steps", "3"], presets, default="digits") == ("digits", ["--steps", "3"])
    assert cli.split_preset(["cifar10", "--flip"], presets, default="digits") == ("cifar10", ["--flip"])
    with pytest.raises(ValueError, match="unknown preset 'cifar'; did you mean 'cifar10'\\? choose from digits, cif"):
        cli.split_preset(["cifar"], presets, default="digits")


def test_a_network_by_name_is_its_sizes_and_later_flags_change_them():
    flags = ["--steps", "3", "--model", "DiT-S/4", "--model.depth", "2"]
    sizes = "--model.patch-size 4 --model.hidden-size 384 --model.depth 12 --model.num-heads 6".split()
    assert cli.expand_model(flags) == ["--steps", "3", *sizes, "--model.depth", "2"]
    assert cli.given_fields(cli.expand_model(["--model=DiT-B/2", "--batch-size=8"])) == {
        *("model.patch_size", "model.hidden_size", "model.depth", "model.num_heads", "batch_size")
    }
    with pytest.raises(ValueError, match=r"unknown network 'DiT-S4'; did you mean 'DiT-S/4'\?"):
        cli.expand_model(["--model", "DiT-S4"])
