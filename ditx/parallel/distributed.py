"""Several processes as one program: they meet, agree, stop and fail together."""

import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditx.files import first_line

# Environment variables by which srun and mpirun tell a process its index and the number of processes.
_LAUNCHERS = (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_MAX_SENTENCE = 1000
_FAILED = 1000  # above every signal
_AT_ONCE_AFTER = 1.0  # seconds


@dataclass(frozen=True)
class DistributedConfig:
    """Processes of one program; srun, Open MPI's mpirun and TPU pods need no flags."""

    coordinator: str = ""
    """HOST:PORT of process 0, or auto: JAX looks for a cluster"""
    count: int = 0
    """processes (srun and mpirun set it)"""
    index: int = -1
    """this process, from 0 (srun and mpirun set it)"""
    heartbeat: int = 60
    """seconds of silence after which a process counts as dead"""

    def __post_init__(self):
        if self.heartbeat < 1:
            raise ValueError(f"distributed.heartbeat is {self.heartbeat}; it must be at least 1 second")
        unset = (self.count, self.index) == (0, -1)
        if self.coordinator in ("", "auto"):
            if not unset:
                raise ValueError("distributed.count and distributed.index need --distributed.coordinator HOST:PORT")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"distributed.coordinator is {self.coordinator!r}; give HOST:PORT, or auto")
        if not (unset and launched()[1] > 1) and not 0 <= self.index < self.count:
            raise ValueError(
                f"distributed.index is {self.index} of {self.count}; give both, the index from 0 to count - 1"
            )


def launched() -> tuple[int, int]:
    """This process's number, and how many processes srun or mpirun has started; 0 and 1 without either."""
    for index, count in _LAUNCHERS:
        if int(os.environ.get(count, "1")) > 1:
            return int(os.environ[index]), int(os.environ[count])
    return 0, 1


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, if there are any and once; call it before JAX looks for devices.

    From here on only the main process prints. Raises ValueError if the others cannot be reached.
    """
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if (not config.coordinator and launched()[1] == 1 and not pod) or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if config.coordinator not in ("", "auto"):
        given = {"coordinator_address": config.coordinator}
        if config.count:
            given |= {"num_processes": config.count, "process_id": config.index}
        elif "OMPI_COMM_WORLD_SIZE" in os.environ:
            # JAX recognises Open MPI by this variable, for the coordinator's address; version 5 does not set it.
            os.environ.setdefault("OMPI_MCA_orte_hnp_uri", "")
    # JAX's preemption service would intercept SIGTERM, which `stop_signals` handles.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=config.heartbeat, shutdown_timeout_seconds=config.heartbeat
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes cannot be joined ({first_line(error)}); give --distributed.coordinator HOST:PORT to each,"
            " and --distributed.count and --distributed.index where neither srun nor mpirun starts them"
        ) from error
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def is_main_process() -> bool:
    """Whether this process prints, and writes everything but the other processes' parts of checkpoints."""
    return jax.process_index() == 0


@contextmanager
def sync_errors() -> Iterator[None]:
    """If one process raises ValueError or OSError, raise in all, so that none waits forever at a collective."""
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    if jax.process_count() > 1:
        sentence = b"" if failure is None else (str(failure) or repr(failure)).encode()[:_MAX_SENTENCE]
        padded = np.frombuffer(sentence.ljust(_MAX_SENTENCE, b"\0"), np.uint8)
        for index, other in enumerate(np.asarray(multihost_utils.process_allgather(padded))):
            if other.any() and failure is None:
                text = bytes(other).rstrip(b"\0").decode(errors="replace")
                failure = ValueError(f"process {index}: {text}")
    if failure is not None:
        raise failure


def max_across_processes(number: float) -> float:
    """The largest number of any process, in float32."""
    if jax.process_count() == 1:
        return number
    return float(np.max(multihost_utils.process_allgather(np.float32(number))))


def broadcast_from_main(number: int) -> int:
    """The main process's number, below 2**31."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def assert_same_everywhere(described: Any) -> None:
    """Raise ValueError in every process unless all of them have the same description, a tree of JSON values."""
    if jax.process_count() == 1:
        return
    checksum = np.uint32(zlib.crc32(json.dumps(described, sort_keys=True).encode()))
    checksums = np.asarray(multihost_utils.process_allgather(checksum))
    others = np.flatnonzero(checksums != checksums[0])
    if len(others):
        raise ValueError(f"process {others[0]} has other flags or other data than process 0; start all of them alike")


@contextmanager
def stop_signals(notice: str = "stopping within two steps, with a checkpoint") -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP, so that a loop can end between two steps; a later SIGINT ends it at once.

    Preempted machines, Kubernetes and SLURM send SIGTERM. A closed terminal sends SIGHUP, which stays ignored under
    nohup. A launcher can deliver one signal twice: once to the process group, and once forwarded.
    """
    received: list[int] = []
    at_once = 0.0

    def receive(number, _):
        nonlocal at_once
        if not received:
            at_once = time.monotonic() + _AT_ONCE_AFTER
            received.append(number)
            with suppress(OSError):  # The terminal may be gone. Python's stream may be in the middle of a write.
                os.write(2, f"\n{notice}; Ctrl-C stops at once\n".encode())
        elif number == signal.SIGINT and time.monotonic() > at_once:
            os._exit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SyncedBatches:
    """Iterates over `batches` and ends at the same one in every process: if one received a signal, or cannot read on.

    The signal is then in every process's `received`; a ValueError or OSError is in every process's `error`. Several
    processes agree on the next batch while the devices compute, so that no device waits.
    """

    def __init__(self, batches: Iterator[Any], mesh: Mesh, received: list[int]):
        self.error: ValueError | OSError | None = None
        self._batches, self._mesh, self._received = batches, mesh, received
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def __iter__(self) -> Iterator[Any]:
        ahead = self._read()
        while True:
            batch, error, agreed = ahead
            code = self._code(error) if agreed is None else int(agreed)
            if code == _FAILED:
                try:
                    with sync_errors():
                        if error:
                            raise error
                except (ValueError, OSError) as failure:
                    self.error = failure
                return
            if code:
                self._received[:] = [code]
                return
            ahead = self._read()
            yield batch

    def _code(self, error: Exception | None) -> int:
        # A signal to the whole group may have ended the processes that read.
        return max(self._received, default=_FAILED if error else 0)

    def _read(self) -> tuple[Any, ValueError | OSError | None, Any]:
        """The next batch or the error; and the largest code of all processes, not awaited (None for one process)."""
        batch, error = None, None
        try:
            batch = next(self._batches)
        except (ValueError, OSError) as caught:
            error = caught
        except RuntimeError as caught:  # Grain's, for a process that reads and was killed.
            error = OSError(f"the data cannot be read on ({first_line(caught)}); run the same command to resume")
        if jax.process_count() == 1:
            return batch, error, None
        spread, code = NamedSharding(self._mesh, P(self._mesh.axis_names)), self._code(error)
        codes = jax.make_array_from_callback((self._mesh.size,), spread, lambda _: np.full(1, code, np.int32))
        return batch, error, self._largest(codes)


@contextmanager
def exit_if_peer_dies() -> Iterator[None]:
    """End this process at once if another one dies, since no collective can finish."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        remedy = "start all of them again to resume from the newest checkpoint"
        print(f"another process has died ({first_line(error)}); {remedy}", file=sys.stderr)
        end(os.EX_TEMPFAIL)


def end(code: int) -> int:
    """Return `code`. If one of several processes has failed, it exits here: a regular exit waits for the others."""
    if jax.distributed.is_initialized() and code:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    return code
