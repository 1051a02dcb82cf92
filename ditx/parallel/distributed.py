"""Several processes as one program: how they find each other, agree, stop and fail together."""

import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# What srun and mpirun tell the processes that they start: the number of each, and how many there are.
_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
_MAX_SENTENCE = 1000
_FAILED = 1000  # above every signal
_AT_ONCE_AFTER = 1.0  # seconds


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of one program. Those that srun or mpirun has started find each other without any of this."""

    coordinator: str = ""
    """HOST:PORT at which the first process is reached; auto, if a TPU pod or a cluster is to say it"""
    count: int = 0
    """processes in all, where the coordinator is given by address; srun and mpirun tell it"""
    index: int = -1
    """number of this process, from 0; srun and mpirun tell it"""
    heartbeat: int = 60
    """seconds without a sign of life from one process after which the others end, too"""

    def __post_init__(self):
        if self.heartbeat < 1:
            raise ValueError(f"distributed.heartbeat is {self.heartbeat}; it must be at least 1 second")
        if self.coordinator in ("", "auto"):
            if (self.count, self.index) != (0, -1):
                raise ValueError("distributed.count and distributed.index need --distributed.coordinator HOST:PORT")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"distributed.coordinator is {self.coordinator!r}; give HOST:PORT, or auto")
        if (self.count, self.index) == (0, -1) and launched()[1] > 1:
            return
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"distributed.index is {self.index} of {self.count}; give both, the index from 0 to count - 1"
            )


def launched() -> tuple[int, int, int | None]:
    """As srun or mpirun tells it: number of this process, of how many, and on this machine; else 0 of 1."""
    for index, count, local in _LAUNCHERS:
        if int(os.environ.get(count, "1")) > 1:
            return int(os.environ[index]), int(os.environ[count]), int(os.environ[local])
    return 0, 1, None


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, if there are any; call it before JAX has looked for devices.

    From here on only the first process prints. Raises ValueError where the others cannot be reached.
    """
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not config.coordinator and launched()[1] == 1 and not pod:
        return
    given = {}
    if config.coordinator not in ("", "auto"):
        given = {"coordinator_address": config.coordinator, "num_processes": config.count, "process_id": config.index}
        if not config.count:
            index, count, local = launched()
            given |= {"num_processes": count, "process_id": index, "local_device_ids": local}
    # It would take SIGTERM for itself, which `stop_signals` answers.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=config.heartbeat, shutdown_timeout_seconds=config.heartbeat
        )
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the processes cannot be joined ({line}); give --distributed.coordinator HOST:PORT to each, and"
            " --distributed.count and --distributed.index where neither srun nor mpirun starts them"
        ) from error
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_main_process() -> bool:
    """Whether this is the process that prints, and writes all but its part of checkpoints."""
    return jax.process_index() == 0


@contextmanager
def sync_errors() -> Iterator[None]:
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


def max_across_processes(number: float) -> float:
    """The highest that a process has, in float32."""
    if jax.process_count() == 1:
        return number
    return float(np.max(multihost_utils.process_allgather(np.float32(number))))


def broadcast_from_main(number: int) -> int:
    """The number, below 2**31, that the first process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def assert_same_everywhere(described: Any) -> None:
    """Raise ValueError, in every process, where they were started for different things."""
    if jax.process_count() == 1:
        return
    mine = np.uint32(zlib.crc32(json.dumps(described, sort_keys=True).encode()))
    sums = np.asarray(multihost_utils.process_allgather(mine))
    others = np.flatnonzero(sums != sums[0])
    if len(others):
        raise ValueError(f"process {others[0]} has other flags or other data than process 0; start all of them alike")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a loop can end between two steps; a later SIGINT ends at once.

    SIGTERM is how preempted machines, Kubernetes and SLURM give notice. It comes more than once where a launcher hands
    on what the whole group has been sent.
    """
    received: list[int] = []
    at_once = 0.0

    def receive(number, _):
        nonlocal at_once
        if not received:
            at_once = time.monotonic() + _AT_ONCE_AFTER
            print("\nstopping after this step, with a checkpoint; Ctrl-C stops at once", file=sys.stderr)
            received.append(number)
        elif number == signal.SIGINT and time.monotonic() > at_once:
            os._exit(128 + number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def synced_batches(batches: Iterator[Any], mesh: Mesh, received: list[int]) -> Iterator[Any]:
    """`batches`, ended at the same one in every process: where one has `received` a signal, or cannot read on.

    The signal is in everybody's `received` then; a ValueError or OSError of one process is raised in all of them. What
    is agreed on was sent while the step before was computed, so that no device waits for it.
    """
    agree = _make_agree(mesh)

    def read():
        batch, error = None, None
        try:
            batch = next(batches)
        except (ValueError, OSError) as caught:
            error = caught
        return batch, error, agree(_FAILED if error else max(received, default=0))

    ahead = read()
    while True:
        batch, error, agreed = ahead
        code = int(agreed)
        if code == _FAILED:
            with sync_errors():
                if error:
                    raise error
        if code:
            received[:] = [code]
            return
        ahead = read()
        yield batch


def _make_agree(mesh: Mesh) -> Callable[[int], Any]:
    """The function from a number to the highest that a process has, which is not waited for."""
    if jax.process_count() == 1:
        return lambda number: number
    mine, everywhere = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    highest = jax.jit(jnp.max, out_shardings=everywhere)
    shape = (mesh.size,)
    return lambda number: highest(jax.make_array_from_callback(shape, mine, lambda index: np.full(1, number, np.int32)))


@contextmanager
def exit_if_peer_dies() -> Iterator[None]:
    """End this process at once where another one has gone, since nothing that needs it can be finished."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        line = next(iter(str(error).splitlines()), "")[:200]
        remedy = "start all of them again, to go on from the newest checkpoint"
        print(f"another process has gone ({line}); {remedy}", file=sys.stderr)
        end(os.EX_TEMPFAIL)


def end(code: int) -> int:
    """Leave the others, after a failure at once, since they may wait for what does not come; returns the exit code."""
    if jax.process_count() > 1 and code:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    return code
