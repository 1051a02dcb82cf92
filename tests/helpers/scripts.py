"""Scripts and commands as a user runs them, in this process or in one of their own."""

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

import ditx.__main__
import sample
import train
from ditx.evaluation.classifier import Classifier
from ditx.evaluation.features import FeatureNetwork, FeatureStore, make_feature_extractor
from ditx.evaluation.reference import Reference
from ditx.parallel.mesh import MeshConfig, make_mesh

ROOT = Path(train.__file__).parent

# A network that compiles in seconds, on the embedded digits; pictures in few steps.
TINY = (
    "digits --model.hidden-size 16 --model.depth 1 --model.num-heads 2 --model.patch-size 14 --batch-size 8"
    " --sampling.steps 2 --sampling.sampler euler --log-every 4 --checkpoint-every 5 --sample-every 20"
).split()


def call(module, monkeypatch, capsys, *arguments):
    """Call a script's main in this process; returns its exit code and its output, with single spaces."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # The cache in the home folder is the user's, not the tests'.
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
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
        return call(ditx.__main__, self.monkeypatch, self.capsys, *arguments)


def start(*arguments, devices=1, group=None, **environment):
    """A script in a process of its own, with `devices` devices; with `group` 0, as the first of a process group."""
    command, output = [sys.executable, *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, process_group=group, **output)


def start_together(*arguments, devices=4, launcher=""):
    """A script as two processes on this machine, started by flags, or as srun or mpirun start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    launchers = {
        "": lambda n: (["--distributed.coordinator", place, "--distributed.count", 2, "--distributed.index", n], {}),
        "srun": lambda n: ([], slurm(n)),
        "mpirun": lambda n: (["--distributed.coordinator", place], open_mpi(n)),
    }
    started = []
    for n in range(2):
        flags, environment = launchers[launcher](n)
        started.append(start(*arguments, *flags, devices=devices, **environment))
    return started


def slurm(n):
    job = str(os.getpid())  # JAX derives the port from it
    names = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    return names | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}


def open_mpi(n):
    return {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(n), "OMPI_COMM_WORLD_LOCAL_RANK": str(n)}


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def write_reference(path, images):
    """Write statistics of some images by an untrained classifier, under the name of the digits."""
    features, gathered = FeatureNetwork(Classifier(images.shape[-1], 10, key=jax.random.key(0))), FeatureStore()
    gathered.add(make_feature_extractor(features, make_mesh(MeshConfig()), 5)(images))
    Reference.of(gathered, features, "digits", images.shape[1:]).write(path)
    return path
