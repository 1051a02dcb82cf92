"""Read the newest checkpoint of a run on all devices of all processes, and write it to another folder.

`resave.py RUN OTHER [--processes.coordinator HOST:PORT ...]`, for the tests of restoring.
"""

import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from ditx import checkpoint, runs
from ditx.nn.dit import DiTConfig
from ditx.processes import ProcessConfig, connect, is_first, together
from ditx.sharding import MeshConfig, make_mesh, place
from ditx.training import TrainState


@dataclass
class Config:
    run: tyro.conf.Positional[Path]
    other: tyro.conf.Positional[Path]
    processes: ProcessConfig = field(default_factory=ProcessConfig)


def abstract_state(run, mesh):
    """Shapes and places of what a run of the digits keeps in its checkpoints."""
    optimizer = train.make_optimizer(train.PRESETS["digits"])
    create = partial(TrainState.create, DiTConfig(**runs.read_config(run)["model"]), optimizer)
    state = place(jax.eval_shape(lambda: create(key=jax.random.key(0))), mesh)
    return {name: getattr(state, name) for name in ("step", "model", "ema", "opt_state")}


def main():
    config = tyro.cli(Config)
    connect(config.processes)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with together():
        if is_first():
            config.other.mkdir()
            shutil.copy(config.run / runs.CONFIG, config.other)
    step, trees, damaged = checkpoint.load_newest(config.run / "checkpoints", abstract_state(config.run, mesh))
    assert not damaged
    manager = checkpoint.Checkpoints(config.other / "checkpoints")
    manager.save(step, trees)
    manager.close()


if __name__ == "__main__":
    main()
