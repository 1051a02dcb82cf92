"""Scripts and commands as a user runs them, in this process or in one of their own."""

import gc
import subprocess
import sys
from pathlib import Path

import ditx.__main__
import sample
import train

ROOT = Path(train.__file__).parent


def call(module, monkeypatch, capsys, *arguments):
    """A script's main in this process: its exit code and what it said, with single spaces."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    # Python 3.11 can fail in `ast.parse`, which tyro calls, when JAX's garbage is collected within it.
    gc.disable()
    try:
        code = module.main()
    except SystemExit as exit:
        code = exit.code
    finally:
        gc.enable()
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


class Runner:
    """`call` for one test: `run.train("digits", ...)`, `run.sample(...)`, `run.ditx("info", ...)`."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def train(self, *arguments):
        return call(train, self.monkeypatch, self.capsys, *arguments)

    def sample(self, *arguments):
        return call(sample, self.monkeypatch, self.capsys, *arguments)

    def ditx(self, *arguments):
        # The cache of compiled programs is the user's, not the tests'.
        self.monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        self.monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        return call(ditx.__main__, self.monkeypatch, self.capsys, *arguments)


def start(*arguments):
    """A script in a process of its own, with one device."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output
