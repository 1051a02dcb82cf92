"""Setup before any test module is imported. From here on every array shape in ditx is checked."""

import gc
import os
import shutil
from pathlib import Path

# Programs that one test process compiles serve the others and the next session. JAX reads this when it is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("XDG_CACHE_HOME", str(Path(__file__).parents[1] / ".pytest_cache" / "ditx"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# The tests mostly compile small programs; less optimisation saves a third of their time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("ditx", "beartype.beartype")

# Eight devices in every test, so that sharding is tested anywhere. Other tests run on the first device.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure():
    """Keep freed memory, as train.py does: a step of a small network takes 0.16 CPU-seconds instead of 0.29."""
    from ditx.parallel.compile import tune_malloc  # not before the hook

    tune_malloc()


# Every run draws the same examples, and no deadline counts a compilation as slowness.
settings.register_profile("ditx", deadline=None, derandomize=True, max_examples=15)
settings.load_profile("ditx")


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    """Forget the programs of a module after it; kept, they grow to 7 GB a process and slow each garbage collection."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized():
    """Full optimisation, for tests that run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def highest_precision():
    """Matrix products in full float32, as the references on a CPU computed them."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Scripts and commands in this process, each call giving exit code and output."""
    from scripts import Runner  # not before the hook

    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An undisturbed training run of 40 steps, and its output."""
    import scripts

    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = scripts.finish(scripts.start(scripts.ROOT / "train.py", *scripts.TINY, "--steps", 40, "--run", run))
    assert code == 0, output
    return run, output


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run without its last checkpoint."""
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    shutil.rmtree(run / "checkpoints" / "40")
    return run
