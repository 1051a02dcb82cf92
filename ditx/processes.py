"""Several processes as one program: how they find each other, agree, and fail together."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

# What srun and mpirun tell the processes that they start: the number of each, and how many there are.
_LAUNCHERS = (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_MAX_SENTENCE = 1000


@dataclass(frozen=True)
class ProcessConfig:
    """The processes of one program. Those that srun or mpirun has started find each other without any of this."""

    coordinator: str = ""
    """HOST:PORT at which the first process is reached; auto, if a TPU pod or a cluster is to say it"""
    count: int = 0
    """processes in all, where the coordinator is given by address"""
    index: int = -1
    """number of this process, from 0"""
    heartbeat: int = 60
    """seconds without a sign of life from one process after which the others end, too"""

    def __post_init__(self):
        if self.heartbeat < 1:
            raise ValueError(f"processes.heartbeat is {self.heartbeat}; it must be at least 1 second")
        if self.coordinator in ("", "auto"):
            if (self.count, self.index) != (0, -1):
                raise ValueError("processes.count and processes.index need --processes.coordinator HOST:PORT")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"processes.coordinator is {self.coordinator!r}; give HOST:PORT, or auto")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"processes.index is {self.index} of {self.count}; give both, the index from 0 to count - 1"
            )


def launched() -> tuple[int, int]:
    """Number of this process and how many there are, as srun or mpirun tells it; else 0 of 1."""
    for index, count in _LAUNCHERS:
        if int(os.environ.get(count, "1")) > 1:
            return int(os.environ[index]), int(os.environ[count])
    return 0, 1


def connect(config: ProcessConfig) -> None:
    """Join the other processes, if there are any; call it before JAX has looked for devices.

    From here on only the first process prints. Raises ValueError where the others cannot be reached.
    """
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not config.coordinator and launched()[1] == 1 and not pod:
        return
    given = {}
    if config.coordinator not in ("", "auto"):
        given = {"coordinator_address": config.coordinator, "num_processes": config.count, "process_id": config.index}
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=config.heartbeat, shutdown_timeout_seconds=config.heartbeat
        )
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the processes cannot be joined ({line}); give --processes.coordinator HOST:PORT, --processes.count and"
            " --processes.index to each"
        ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this is the process that prints, and writes all but its part of checkpoints."""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """Have no process go on where one has failed: its ValueError or OSError is raised in every one, as a ValueError."""
    failed = None
    try:
        yield
    except (ValueError, OSError) as error:
        failed = error
    if jax.process_count() > 1:
        sentence = np.zeros(_MAX_SENTENCE, np.uint8)
        said = str(failed or "").encode()[:_MAX_SENTENCE] or (b"" if failed is None else repr(failed).encode())
        sentence[: len(said)] = np.frombuffer(said, np.uint8)
        for index, other in enumerate(np.asarray(multihost_utils.process_allgather(sentence))):
            if other.any() and failed is None:
                told = bytes(other).rstrip(b"\0").decode(errors="replace")
                failed = ValueError(f"process {index} says: {told}")
    if failed is not None:
        raise failed


def from_first(number: int) -> int:
    """The number that the first process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def end(code: int) -> int:
    """Leave the others, after a failure at once, since they may wait for what does not come; returns the exit code."""
    if jax.process_count() > 1 and code:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    return code
