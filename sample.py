"""Draw samples from a trained network: `sample.py [RUN | WEIGHTS] [--labels 3 7 ...] [--num N] ...`."""

import math
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    # Read by JAX as it is imported: compiled programs are kept for the next start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "ditx" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import install_import_hook
from tqdm import tqdm

with install_import_hook("ditx", "beartype.beartype"):
    from ditx import pictures
    from ditx.data import imagenet
    from ditx.diffusion.objective import ObjectiveConfig
    from ditx.kernels.block import KernelConfig
    from ditx.nn.dit import DiT
    from ditx.parallel.compile import Dtype, resolve_dtype, tune_malloc
    from ditx.parallel.distributed import (
        DistributedConfig,
        assert_same_everywhere,
        end,
        initialize,
        is_main_process,
        sync_errors,
    )
    from ditx.parallel.fsdp import with_shardings
    from ditx.parallel.mesh import MeshConfig, check_mesh, data_parallel_size, make_mesh
    from ditx.sampling import Decode, SamplingConfig, choose_batch_size, make_decode, make_sampler
    from ditx.training import run as runs
    from ditx.weights import pretrained
    from ditx.weights.frozen import load_decoder
    from ditx.weights.pretrained import Description


@dataclass(frozen=True)
class Config(KernelConfig):
    """What to draw. Sampler, steps and guidance not given here are those that a run drew its own pictures with.

    For the authors' weights they are the paper's: 250 DDPM steps, guidance on the first 3 of 4 channels.
    """

    source: tyro.conf.Positional[str] = ""
    """folder of a run, or weights: the authors' .pt, a .safetensors, diffusers' folder; the newest run if not given"""
    vae: str = ""
    """what decodes latents: ft-ema, ft-mse, original, or the path of a file or folder; that of the run if not given"""
    labels: tuple[str, ...] = ()
    """classes to draw, by name or number, taken in turn; all of them if not given"""
    num: int = 0
    """samples in all; if not given, 10 of each label for up to 20 labels, else 1 of each"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    guide: str = ""
    """run or weights of a weaker network, smaller or trained for less, to guide by; if not given, the network's own
    predictions without the label"""
    seed: int = 0
    """sample number k depends on this and on k alone"""
    dtype: Dtype = "auto"
    """what the network computes in: float32 on CPUs, and bfloat16 elsewhere (auto); sampler and decoder keep float32"""
    unroll: int = 1
    """blocks compiled in a row: all of them are some 5 % faster on a GPU, and take long to compile"""
    out: str = ""
    """the grid to write, a PNG; a new one in the run's folder, or in samples/NAME for weights, if not given"""
    separate: bool = False
    """also write each sample as a PNG, into a folder named after the grid"""
    npz: bool = False
    """also write an .npz named after the grid: arr_0, uint8 of shape (num, h, w, c), and labels"""
    animate: bool = False
    """also write a .gif named after the grid: the way from noise to samples"""
    batch: int = 100
    """samples drawn at a time, at most; a matter of memory and speed alone. Fewer are filled up to 1, 2, 3, 4, 6, 8,
    12, 16, 24, ... a device, so that one compiled program serves many numbers; --batch NUM has none filled up"""
    decode_batch: int = 4
    """latents decoded at a time on each device; a matter of memory and speed alone"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def parse(argv: list[str]) -> tuple[Path, Description, Config]:
    """The run or weights, their description, and what to draw. Exits with 2 on a bad flag."""
    # Read twice: what is named on the command line sets the defaults of the other flags.
    description = "Draw samples from the averaged weights of a run, or from released weights."
    first = tyro.cli(Config, args=argv, prog="sample.py", description=description)
    initialize(first.distributed)
    tune_malloc()
    with sync_errors():
        source = Path(first.source) if first.source else runs.newest_run(Path("runs"))
        described = pretrained.describe(source)
    default = Config(sampling=described.sampling, vae=described.vae)
    return source, described, tyro.cli(Config, args=argv, prog="sample.py", default=default, description=description)


def read_labels(names: tuple[str, ...], class_names: tuple[str, ...]) -> list[int]:
    """Class indices of names or numbers. Raises ValueError for one that there is not, or that names several classes."""
    labels = []
    for name in names:
        if name.isascii() and name.isdigit() and name not in class_names:
            found = [int(name)] if int(name) < len(class_names) else []
        else:
            called = [{known.lower() for known in imagenet.names_of(one)} for one in class_names]
            found = [label for label, known in enumerate(called) if name.lower() in known]
        if not found:
            known = ", ".join(imagenet.usual_name(one) for one in class_names[:20])
            known += ", ..." if len(class_names) > 20 else ""
            raise ValueError(f"there is no class {name!r}; there are 0 to {len(class_names) - 1}: {known}")
        if len(found) > 1:
            raise ValueError(f"{name!r} is the name of several classes; give one of {', '.join(map(str, found))}")
        labels += found
    return labels or list(range(len(class_names)))


def outputs(source: Path, config: Config) -> dict[str, Path]:
    """Where each kind of result goes, the grid's file made already, so that nobody else takes the name.

    Raises ValueError if one of them is there already.
    """
    grid = Path(config.out) if config.out else None
    if grid is None:
        folder = source if pretrained.is_run(source) else Path("samples") / source.stem
        taken = {path.stem for path in folder.glob("drawn-*")}
        grid = folder / next(f"drawn-{n:03d}.png" for n in range(1_000_000) if f"drawn-{n:03d}" not in taken)
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
    try:
        grid.open("xb").close()
    except FileExistsError as error:
        if config.out:
            raise ValueError(f"{grid} exists already; choose another --out") from error
        return outputs(source, config)  # another process was quicker; the next name
    return wanted


def check_guide(guide: Description, described: Description) -> None:
    """Raise ValueError where another network cannot guide this one."""
    pairs = {name: (guide.objective, described.objective) for name in ("schedule", "prediction")}
    pairs |= {name: (guide.model, described.model) for name in ("input_size", "in_channels")}
    for name, (its, ours) in pairs.items():
        if getattr(its, name) != getattr(ours, name):
            raise ValueError(f"{name} of --guide is {getattr(its, name)}, and of the network {getattr(ours, name)}")
    if guide.model.num_classes and guide.class_names != described.class_names:
        raise ValueError("the classes of --guide are not those of the network; give one of the same, or of none")


def read_network(source: Path, described: Description, config: Config, mesh: Mesh) -> DiT:
    """A network as the mesh holds it."""
    abstract = with_shardings(jax.eval_shape(lambda key: DiT(described.model, key=key), jax.random.key(0)), mesh)
    network, note = pretrained.load(source, described, abstract)
    print(f"weights  {note}")
    return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.dtype)), network)


def read_decoder(described: Description, config: Config, mesh: Mesh) -> Decode | None:
    """The function that decodes what the network makes, where that is latents."""
    decode = None
    if config.vae:
        vae, name = load_decoder(config.vae, described.model.in_channels, described.latent_scale)
        decode = make_decode(vae, mesh, config.decode_batch)
        print(f"decoder  {name}")
    return decode


def draw_all(
    network: DiT,
    guide: DiT | None,
    decode: Decode | None,
    objective: ObjectiveConfig,
    config: Config,
    labels: np.ndarray,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """The samples as uint8 images and, with --animate, their states at about 40 moments, the sample last."""
    sampler = make_sampler(
        config.sampling,
        network.config,
        objective,
        mesh,
        batch_size=choose_batch_size(len(labels), config.batch, data_parallel_size(mesh)),
        stride=max(1, config.sampling.steps // 40) if config.animate else 0,
        decode=decode,
        unroll=config.unroll,
        kernels=config,
        guided_by_network=guide is not None,
    )
    total = -(-len(labels) // sampler.batch_size)
    batches = sampler.batches(network, labels, seed=config.seed, guide=guide)
    quiet = total == 1 or not is_main_process()
    images = np.concatenate(list(tqdm(batches, total=total, unit="batch", disable=quiet or None)))
    return (images[:, -1], images.swapaxes(0, 1)) if config.animate else (images, images[:0])


def check(config: Config, described: Description, num: int) -> None:
    """Raise ValueError for what cannot be drawn."""
    for name, value in {
        "num": num,
        **{name: getattr(config, name) for name in ("batch", "decode_batch", "unroll")},
    }.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}; it goes from 0 to {2**32 - 1}")
    channels = described.model.in_channels
    if channels not in (1, 3) and not config.vae:
        raise ValueError(f"the network makes latents of {channels} channels; decode them with --vae ft-ema, or a path")
    if channels in (1, 3) and config.vae:
        raise ValueError(f"vae is {config.vae!r}, but the network makes images of {channels} channels; leave it out")
    config.sampling.check(described.model, described.objective, guided_by_network=bool(config.guide))


def sample(argv: list[str]) -> int:
    """Draw and write; returns the exit code."""
    source, described, config = parse(argv)
    with sync_errors():
        class_names = described.class_names or ("any",)  # of which a network without labels has its null label for one
        wanted = read_labels(config.labels, class_names)
        num = config.num or len(wanted) * (10 if len(wanted) <= 20 else 1)
        channels, weaker = described.model.in_channels, None
        check(config, described, num)
        sampling = config.sampling.resolved(described.objective)
        config = replace(config, sampling=sampling, dtype=resolve_dtype(config.dtype))
        mesh = make_mesh(config.mesh)
        check_mesh(mesh, num_heads=described.model.num_heads, mlp_size=described.model.mlp_size)
        config.check_kernels(mesh, config.dtype, described.model)
        if config.guide:
            weaker = pretrained.describe(Path(config.guide))
            check_guide(weaker, described)
            check_mesh(mesh, num_heads=weaker.model.num_heads, mlp_size=weaker.model.mlp_size)
            config.check_kernels(mesh, config.dtype, weaker.model)
    assert_same_everywhere({name: value for name, value in asdict(config).items() if name != "processes"})
    with sync_errors():
        decode = read_decoder(described, config, mesh)
        network = read_network(source, described, config, mesh)
        guide = read_network(Path(config.guide), weaker, config, mesh) if weaker else None
    with sync_errors():
        paths = outputs(source, config) if is_main_process() else {}
    labels = np.resize(np.array(wanted, np.int32), num)
    guided = config.sampling.guidance_channels or channels
    print(
        f"draws    {num:,} samples by {config.sampling.sampler} in {config.sampling.steps} steps, guidance"
        f" {config.sampling.guidance_scale} on {guided} of {channels} channels, computing in {config.dtype}",
        flush=True,
    )
    try:
        images, frames = draw_all(network, guide, decode, described.objective, config, labels, mesh)
    except BaseException:
        if paths:
            paths["grid"].unlink()  # empty as yet
        raise
    if not is_main_process():
        return 0

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
            name = re.sub(r"[^\w-]+", "_", imagenet.usual_name(class_names[labels[k]]))
            pictures.to_picture(image).save(paths["separate"] / f"{k:06d}-{name}.png")
    print("\n".join(f"wrote {path}" for path in paths.values()))
    return 0


def main() -> int:
    """Run the command line; a user's mistake ends in one sentence and exit code 2."""
    try:
        return sample(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return end(2)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
