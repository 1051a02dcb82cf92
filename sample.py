"""Draw samples from a trained run: `sample.py [RUN] [--labels 3 7 ...] [--num N] ...`."""

import math
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    # Read by JAX as it is imported: compiled programs are kept for the next start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "ditx" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import numpy as np
import tyro
from jaxtyping import install_import_hook
from tqdm import tqdm

with install_import_hook("ditx", "beartype.beartype"):
    from ditx import checkpoint, data, pictures, runs
    from ditx.nn.dit import DiT, DiTConfig
    from ditx.sampling import SamplingConfig, make_draw, sample_keys
    from ditx.sharding import MeshConfig, batch_sharding, make_mesh, place


@dataclass(frozen=True)
class Config:
    """What to draw. Sampler, steps and guidance not given here are those that the run drew its own pictures with."""

    run: tyro.conf.Positional[str] = ""
    """folder of a run; the newest under runs/ if not given"""
    labels: tuple[str, ...] = ()
    """classes to draw, by name or number, taken in turn; all of them if not given"""
    num: int = 0
    """samples in all; if not given, 10 of each label for up to 20 labels, else 1 of each"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    seed: int = 0
    """sample number k depends on this and on k alone"""
    out: str = ""
    """the grid to write, a PNG; a new one in the run's folder if not given"""
    separate: bool = False
    """also write each sample as a PNG, into a folder named after the grid"""
    npz: bool = False
    """also write an .npz named after the grid: arr_0, uint8 of shape (num, h, w, c), and labels"""
    animate: bool = False
    """also write a .gif named after the grid: the way from noise to samples"""
    batch: int = 100
    """samples drawn at a time; a matter of memory and speed alone"""


def read_run(run: Path) -> dict:
    """The description that train.py wrote, its parts as they were. Raises ValueError if it cannot be read."""
    described = runs.read_config(run)
    try:
        parts = {"model": DiTConfig(**described["model"]), "sampling": SamplingConfig(**described["sampling"])}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{run} was written by another version of ditx ({error})") from error
    return described | parts


def parse(argv: list[str]) -> tuple[Path, dict, Config]:
    """The run's folder, its description, and what to draw. Exits with 2 on a bad flag."""
    # Read twice: the run named on the command line sets the defaults of the other flags.
    description = "Draw samples from the averaged weights of a run."
    first = tyro.cli(Config, args=argv, prog="sample.py", description=description)
    run = Path(first.run) if first.run else runs.newest_run(Path("runs"))
    described = read_run(run)
    default = Config(sampling=described["sampling"])
    return run, described, tyro.cli(Config, args=argv, prog="sample.py", default=default, description=description)


def read_labels(names: tuple[str, ...], class_names: list[str]) -> list[int]:
    """Class indices of names or numbers. Raises ValueError for one that the run does not have."""
    labels = []
    for name in names:
        if name in class_names:
            labels.append(class_names.index(name))
        elif name.isascii() and name.isdigit() and int(name) < len(class_names):
            labels.append(int(name))
        else:
            known = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            raise ValueError(f"there is no class {name!r}; the run has 0 to {len(class_names) - 1}: {known}")
    return labels or list(range(len(class_names)))


def outputs(run: Path, config: Config) -> dict[str, Path]:
    """Where each kind of result goes. Raises ValueError if one of them is there already."""
    grid = Path(config.out) if config.out else None
    if grid is None:
        taken = {path.stem for path in run.glob("drawn-*")}
        grid = run / next(f"drawn-{n:03d}.png" for n in range(1_000_000) if f"drawn-{n:03d}" not in taken)
    if grid.suffix != ".png":
        raise ValueError(f"--out is {grid}; give a name that ends in .png")
    wanted = {"grid": grid}
    wanted |= {"npz": grid.with_suffix(".npz")} if config.npz else {}
    wanted |= {"gif": grid.with_suffix(".gif")} if config.animate else {}
    wanted |= {"separate": grid.with_suffix("")} if config.separate else {}
    for path in wanted.values():
        if path.exists():
            raise ValueError(f"{path} exists already; choose another --out")
    grid.parent.mkdir(parents=True, exist_ok=True)
    return wanted


def draw_all(run: Path, described: dict, config: Config, labels: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The samples as uint8 images and, to animate, as many at about 40 moments of the way."""
    model_config = described["model"]
    draw = make_draw(config.sampling, model_config, described["objective"])
    mesh = make_mesh(MeshConfig())
    abstract = place(jax.eval_shape(lambda key: DiT(model_config, key=key), jax.random.key(0)), mesh)
    restored = checkpoint.load_newest(run / "checkpoints", {"ema": abstract})
    if restored is None:
        raise ValueError(f"{run} has no checkpoint yet; let train.py reach its first")
    step, trees, damaged = restored
    for _, sentence in damaged:
        print(f"warning: {sentence}; passed over", file=sys.stderr)
    print(f"{run} at step {step:,}: {len(labels):,} samples, {config.sampling}", flush=True)

    batch = -(-min(config.batch, len(labels)) // mesh.size) * mesh.size
    stride = max(1, config.sampling.steps // 40)
    rows = batch_sharding(mesh)

    def run_batch(network, labels, keys):
        samples, states = draw(network, labels, keys)
        return samples, states[:, ::-stride][:, ::-1] if config.animate else None

    compiled = jax.jit(run_batch, in_shardings=(None, rows, rows), out_shardings=rows)
    images, frames = [], []
    for first in tqdm(range(0, len(labels), batch), unit="batch", disable=True if len(labels) <= batch else None):
        # The last batch is filled up, so that one program serves all.
        count = min(batch, len(labels) - first)
        padded = np.resize(labels[first : first + count], batch)
        samples, states = compiled(trees["ema"], padded, sample_keys(config.seed, first, batch))
        images.append(data.to_uint8(np.asarray(samples))[:count])
        if states is not None:
            frames.append(data.to_uint8(np.asarray(states))[:count])
    return np.concatenate(images), list(np.concatenate(frames).swapaxes(0, 1)) if frames else []


def sample(argv: list[str]) -> int:
    """Draw and write; returns the exit code."""
    run, described, config = parse(argv)
    class_names = described["class_names"]
    wanted = read_labels(config.labels, class_names)
    num = config.num or len(wanted) * (10 if len(wanted) <= 20 else 1)
    if num < 1 or config.batch < 1 or not 0 <= config.seed < 2**32:
        raise ValueError(
            f"num is {num}, batch {config.batch}, seed {config.seed}; give at least 1, 1, and 0 to {2**32 - 1}"
        )
    paths = outputs(run, config)
    labels = np.resize(np.array(wanted, np.int32), num)
    images, frames = draw_all(run, described, config, labels)

    columns = min(num, len(wanted) if len(wanted) <= 20 else math.isqrt(num - 1) + 1)
    pictures.grid(images, columns).save(paths["grid"])
    if "npz" in paths:
        np.savez_compressed(paths["npz"], arr_0=images, labels=labels)
    if "gif" in paths:
        first, *others = [pictures.grid(frame, columns) for frame in [*frames, *[images] * 15]]
        first.save(paths["gif"], save_all=True, append_images=others, duration=60, loop=0)
    if "separate" in paths:
        paths["separate"].mkdir()
        for k, image in enumerate(images):
            name = re.sub(r"[^\w-]+", "_", class_names[labels[k]])
            pictures.to_picture(image).save(paths["separate"] / f"{k:06d}-{name}.png")
    print("\n".join(f"wrote {path}" for path in paths.values()))
    return 0


def main() -> int:
    """Run the command line; a user's mistake ends in one sentence and exit code 2."""
    try:
        return sample(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
