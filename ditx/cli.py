"""Command lines: presets, checks of fields, output streams, exit codes. Shared by both scripts and all verbs."""

import errno
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from tqdm import tqdm

from ditx.checks import unknown
from ditx.files import cache_folder, first_line

T = TypeVar("T")

MAX_SEED = 2**32 - 1
C = TypeVar("C")
X = TypeVar("X")


def run(prog: str, function: Callable[[], int], *, out_of_memory: str = "try a smaller --batch-size") -> int:
    """Call a command and return its exit code: a mistake is one sentence and code 2, Ctrl-C is 130.

    A mistake is a ValueError or an OSError. Too little memory on a device ends with the advice `out_of_memory`. Of
    several processes, one that fails exits at once. Compiled programs are kept on disk for the next start. Output
    to a closed pipe or terminal is dropped.
    """
    import jax

    from ditx.parallel.distributed import end

    # JAX reads these names itself; set to nothing, the first switches the cache off.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(ValueError):  # a user without a home folder
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    output, errors = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(cast(Any, output)), redirect_stderr(cast(Any, errors)):
        try:
            code = function()
            output.flush()
            if output.lost:
                raise OSError(f"the output could not be written ({output.lost}); everything else is done")
            return code
        except (ValueError, OSError) as error:
            print(f"{prog}: {error}", file=sys.stderr)
            return end(2)
        except (RuntimeError, AssertionError) as error:
            # For some platforms JAX fails at an assertion without a message.
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if "RESOURCE_EXHAUSTED" in str(error):
                sentence = f"the devices have too little memory ({first_line(error)}); {out_of_memory}"
            elif "Unable to initialize backend" in str(error) or frame.f_code.co_name == "backends":
                sentence = f"there is no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}; unset it, or"
                sentence += " install JAX for that device: --extra cuda or --extra tpu after uv run"
            else:
                raise
            print(f"{prog}: {sentence}", file=sys.stderr)
            return end(2)
        except KeyboardInterrupt:
            return end(130)


class Output:
    """A stream that outlives its reader: text that cannot be written is dropped, as after `| head`.

    Characters outside the terminal's encoding become question marks.
    """

    def __init__(self, stream: Any):
        self.lost = ""
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (open until the process ends)
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # Nobody misses the output to a closed pipe or terminal.
                self.lost = self.lost or first_line(error)
            # From here on every write succeeds, also the one at the end of the process.
            with suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())


def script(name: str) -> str:
    """The command of a script in the form that this process was started with: `train.py`, or `ditx train`."""
    return f"ditx {name}" if Path(sys.argv[0]).name.startswith(("ditx", "__main__")) else f"{name}.py"


def parse(config: Callable[..., C], **options: Any) -> C:
    """Parse a command line into a configuration; `options` go to `tyro.cli`. Exits with 2 on a bad flag."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def choose_name(info: Any) -> Any:  # Of names and classes, a command line takes the names.
        if type not in get_args(info.type):
            return None
        names = get_args(get_args(info.type)[0])
        return PrimitiveConstructorSpec(
            1, f"{{{','.join(names)}}}", lambda words: words[0], lambda _: True, lambda name: [str(name)], choices=names
        )

    return tyro.cli(config, registry=registry, **options)


def split_preset(arguments: list[str], presets: Collection[str], *, default: str) -> tuple[str, list[str]]:
    """The preset named first, or `default`, and the other arguments. Raises ValueError for an unknown preset."""
    if not arguments or arguments[0].startswith("-"):
        return default, arguments
    if arguments[0] not in presets:
        raise unknown("preset", arguments[0], presets)
    return arguments[0], arguments[1:]


def expand_model(arguments: list[str], prefix: str = "model.") -> list[str]:
    """Arguments with `--model DiT-S/4` as the flags of that network's sizes. Raises ValueError for an unknown name."""
    from ditx.nn.dit import DIT_CONFIGS

    expanded, rest = [], iter(arguments)
    for argument in rest:
        flag, _, name = argument.partition("=")
        if flag != "--model":
            expanded.append(argument)
            continue
        name = name or next(rest, "")
        if name not in DIT_CONFIGS:
            raise unknown("network", name, DIT_CONFIGS)
        for field in ("patch_size", "hidden_size", "depth", "num_heads"):
            expanded += [f"--{prefix}{field.replace('_', '-')}", str(getattr(DIT_CONFIGS[name], field))]
    return expanded


def given_fields(arguments: list[str]) -> set[str]:
    """The fields whose flags are among the arguments: `steps`, `model.depth`."""
    return {flag.partition("=")[0][2:].replace("-", "_") for flag in arguments if flag.startswith("--")}


def at_least(config: Any, least: int, *names: str) -> None:
    """Raise ValueError for the first field of `config` that is below `least`, or not finite; `a.b` is nested."""
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if not least <= value < math.inf:
            bound = "not be negative" if least == 0 else f"be at least {least}"
            bound = bound if math.isfinite(value) else "be a finite number"
            raise ValueError(f"{name} is {value}; it must {bound}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed fits 32 bits."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; it goes from 0 to {MAX_SEED}")


class Progress:
    """A bar or, if the output is no terminal, lines: images done, images a second, and the time left."""

    SECONDS_BETWEEN_LINES = 30

    def __init__(self, done: int, total: int):
        self._bar = tqdm(total=total, initial=done, unit=" images", disable=None)
        self._done, self._total = done, total
        self._clock, self._since = time.perf_counter(), done

    def add(self, count: int) -> None:
        """Count images as done."""
        self._done += count
        self._bar.update(count)
        elapsed = time.perf_counter() - self._clock
        if self._bar.disable and elapsed > self.SECONDS_BETWEEN_LINES:
            speed = (self._done - self._since) / elapsed
            left = (self._total - self._done) / speed
            print(f"{self._done:,} of {self._total:,} images  {speed:.1f} images/s  {left:.0f} s left", flush=True)
            self._clock, self._since = self._clock + elapsed, self._done

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def in_new_process(function: Callable[[], T], *, killed: str, initializer: Callable[[], None] | None = None) -> T:
    """Call a function in a new process, which returns all its memory. Raises ValueError(killed) if it is killed."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer) as pool:
        try:
            return pool.submit(function).result()
        except KeyboardInterrupt:
            for child in active_children():
                child.kill()
            raise
        except BrokenProcessPool as error:
            raise ValueError(killed) from error


def parse_with_defaults(parse: Callable[..., C], defaults: Callable[[C], tuple[C | None, X]]) -> tuple[C, X]:
    """Parse twice: the first pass finds the run or weights; the second takes the defaults of other flags from there.

    `parse` is `tyro.cli` with all but `default` filled in. `defaults(first)` returns those, or None to keep the first
    pass, and a value to pass on.
    """
    first = parse()
    default, value = defaults(first)
    return (first if default is None else parse(default=default)), value
