"""Read the newest checkpoint of a run on all devices of all processes, and write it to another folder.

`resave.py RUN OTHER [--distributed.coordinator HOST:PORT ...]`, for the tests of restoring.
"""

import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
from ditx.nn.dit import DiTConfig
from ditx.parallel.distributed import DistributedConfig, initialize, is_main_process, sync_errors
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import checkpoint
from ditx.training import run as runs
from ditx.training.step import TrainState, adamw


@dataclass
class Config:
    run: tyro.conf.Positional[Path]
    other: tyro.conf.Positional[Path]
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def abstract_state(run, mesh):
    """Shapes and places of what a run of the digits keeps in its checkpoints."""
    optimizer = adamw(1.0)
    create = partial(TrainState.create, DiTConfig(**runs.read_config(run)["model"]), optimizer)
    state = with_shardings(jax.eval_shape(lambda: create(key=jax.random.key(0))), mesh)
    return {name: getattr(state, name) for name in ("step", "model", "ema", "opt_state")}


def main():
    config = tyro.cli(Config)
    initialize(config.distributed)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with sync_errors():
        if is_main_process():
            config.other.mkdir()
            shutil.copy(config.run / runs.CONFIG, config.other)
    step, trees, damaged = checkpoint.load_newest(config.run / "checkpoints", abstract_state(config.run, mesh))
    assert not damaged
    manager = checkpoint.Checkpoints(config.other / "checkpoints")
    manager.save(step, trees)
    manager.close()


if __name__ == "__main__":
    main()
