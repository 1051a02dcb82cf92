"""Draw samples from a trained network: `sample.py [RUN | WEIGHTS] [--labels 3 7 ...] [--num-samples N] ...`."""

import re
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not {"-h", "--help"} & {*sys.argv}:
    print("loading  JAX and ditx for:", *sys.argv, file=sys.stderr, flush=True)  # Their imports take seconds.

from jaxtyping import install_import_hook

with install_import_hook("ditx", "beartype.beartype"):
    import numpy as np
    import tyro
    from jax.sharding import Mesh
    from tqdm import tqdm

    from ditx import cli, pictures
    from ditx.data import imagenet
    from ditx.files import check_writable, make_folder
    from ditx.kernels.block import KernelConfig
    from ditx.nn.dit import DiT
    from ditx.parallel import distributed
    from ditx.parallel.compile import Dtype, resolve_dtype, tune_malloc
    from ditx.parallel.distributed import DistributedConfig
    from ditx.parallel.mesh import MeshConfig, check_mesh, data_parallel_size, make_mesh
    from ditx.sampling import Decode, SamplingConfig, choose_batch_size, make_decode, make_sampler
    from ditx.training import run as runs
    from ditx.weights import pretrained
    from ditx.weights.frozen import load_decoder
    from ditx.weights.pretrained import Description, SourceConfig


@dataclass(frozen=True)
class Config(KernelConfig):
    """Samples from a run or from weights. Sampler, steps and guidance default to the run's own.

    For the authors' weights they default to the paper's: 250 DDPM steps, guidance on the first 3 of 4 channels.
    """

    source: tyro.conf.Positional[str] = ""
    """folder of a run (default: the newest), or weights: a file (.pt, .safetensors), a folder of diffusers, or a name:
    DiT-XL/2-256 or DiT-XL/2-512, the authors' files, or OWNER/NAME on the Hugging Face hub"""
    origin: tyro.conf.OmitArgPrefixes[SourceConfig] = field(default_factory=SourceConfig)
    vae: str = ""
    """decoder of latents: ft-ema, ft-mse, original, or the path of a file or folder; default from the run"""
    labels: tuple[str, ...] = ()
    """classes to draw in turn, by name or number; default: all"""
    num_samples: int = 0
    """samples in all; default: 10 of each label for up to 20 labels, else 1 of each"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    guide: str = ""
    """run or weights of a weaker network (smaller, or trained less) for autoguidance; default: the same network
    without the label (classifier-free guidance)"""
    seed: int = 0
    """sample k depends on the seed and k only"""
    dtype: Dtype = "auto"
    """dtype of the network: float32 on CPUs, bfloat16 elsewhere (auto); sampler and decoder keep float32"""
    unroll: int = 1
    """blocks compiled in a row; all of them are about 5 % faster on a GPU and slow to compile"""
    out: str = ""
    """grid to write, a PNG; default: a new one in the run's folder, or in samples/NAME for weights"""
    separate: bool = False
    """also write each sample as a PNG, in a folder named after the grid"""
    npz: bool = False
    """also write an .npz named after the grid, with arr_0, uint8 of shape (n, h, w, c), and labels"""
    animate: bool = False
    """also write a .gif named after the grid, from noise to samples"""
    batch: int = 100
    """samples drawn at a time, at most; only memory and speed depend on it. Smaller batches are padded to 1, 2, 3, 4,
    6, 8, 12, 16, 24, ... per device, so that few compiled programs serve all numbers; --batch NUM avoids padding"""
    decode_batch: int = 4
    """latents decoded at a time on each device; only memory and speed depend on it"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def parse(argv: list[str]) -> tuple[Config, tuple[Path, Description]]:
    """The configuration, and the network with its description. Exits with 2 on a bad flag."""

    def defaults(first: Config) -> tuple[Config, tuple[Path, Description]]:
        distributed.initialize(first.distributed)
        tune_malloc()
        with distributed.sync_errors():
            source = Path(first.source) if first.source else runs.newest_run(Path("runs"))
            described = pretrained.describe(source, **first.origin.facts())
        return Config(sampling=described.sampling, vae=described.vae), (source, described)

    return cli.parse_with_defaults(partial(tyro.cli, Config, args=argv, prog=cli.script("sample")), defaults)


def check(config: Config, described: Description, guide: Description | None, mesh: Mesh) -> None:
    """Raise ValueError for samples that cannot be drawn."""
    cli.at_least(config, 1, "batch", "decode_batch", "unroll")
    cli.check_seed(config.seed)
    config.sampling.check(described.model, described.objective, guided_by_network=guide is not None)
    for model in (described.model, *([guide.model] if guide else [])):
        check_mesh(mesh, num_heads=model.num_heads, mlp_size=model.mlp_size)
        config.check_kernels(mesh, config.dtype, model)
    if guide:
        guide.check_guides(described)


def reserve_outputs(source: Path, config: Config) -> dict[str, Path]:
    """The paths to write; the grid's file is created, so that no other process takes its name.

    Raises ValueError if a path exists.
    """
    grid = Path(config.out) if config.out else None
    if grid is None:
        name = source.stem if source.exists() else "-".join(source.parts)
        folder = source if pretrained.is_run(source) else Path("samples") / name
        taken = {path.stem for path in folder.glob("samples-*")}
        grid = folder / next(f"samples-{n:03d}.png" for n in range(1_000_000) if f"samples-{n:03d}" not in taken)
    if grid.suffix != ".png":
        raise ValueError(f"--out is {grid}; give a name that ends in .png")
    suffixes = {"npz": ".npz", "animate": ".gif", "separate": ""}
    paths = {"grid": grid} | {name: grid.with_suffix(end) for name, end in suffixes.items() if getattr(config, name)}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"{path} exists already; choose another --out")
    make_folder(grid.parent)
    check_writable(grid.parent)
    try:
        grid.open("xb").close()
    except FileExistsError as error:
        if config.out:
            raise ValueError(f"{grid} exists already; choose another --out") from error
        return reserve_outputs(source, config)  # Another process took the name.
    return paths


def draw(
    networks: tuple[DiT, DiT | None], decode: Decode | None, described: Description, config: Config, labels: np.ndarray
) -> np.ndarray:
    """Images (n, h, w, c) or, to animate, about 40 moments of each from noise to sample (n, moments, h, w, c)."""
    (network, guide), mesh = networks, make_mesh(config.mesh)
    options: Any = {"unroll": config.unroll, "kernels": config, "guided_by_network": guide is not None}
    options["batch_size"] = choose_batch_size(len(labels), config.batch, data_parallel_size(mesh))
    options["stride"] = max(1, config.sampling.steps // 40) if config.animate else 0
    sampler = make_sampler(config.sampling, described.model, described.objective, mesh, decode=decode, **options)
    batches = sampler.batches(network, labels, seed=config.seed, guide=guide)
    total = -(-len(labels) // sampler.batch_size)
    hidden = total == 1 or not distributed.is_main_process() or None  # None: hidden unless the output is a terminal
    return np.concatenate(list(tqdm(batches, total=total, unit="batch", disable=hidden)))


def write(paths: dict[str, Path], images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Write the images in every form asked for; `names` are those of the classes."""
    *moments, images = images.swapaxes(0, 1) if images.ndim == 5 else images[None]
    pictures.grid(images, labels, names).save(paths["grid"])
    if "npz" in paths:
        np.savez_compressed(paths["npz"], arr_0=images, labels=labels)
    if "animate" in paths:
        first, *others = [pictures.grid(moment, labels, names) for moment in [*moments, *[images] * 16]]
        first.save(paths["animate"], save_all=True, append_images=others, duration=60, loop=0)
    if "separate" in paths:
        paths["separate"].mkdir()
        for k, image in enumerate(images):
            name = re.sub(r"[^\w-]+", "_", imagenet.usual_name(names[labels[k]]))
            pictures.to_picture(image).save(paths["separate"] / f"{k:06d}-{name}.png")
    print("\n".join(f"wrote {path}" for path in paths.values()))


def sample(argv: list[str]) -> int:
    """Draw and write; returns the exit code."""
    config, (source, described) = parse(argv)
    with distributed.sync_errors():
        cli.at_least(config, 0, "num_samples")
        names = described.class_names or ("any",)  # A network without labels gets its null label, 0.
        classes = imagenet.find_labels(config.labels, names)
        num = config.num_samples or len(classes) * (10 if len(classes) <= 20 else 1)
        labels = np.resize(np.array(classes, np.int32), num)
        sampling, dtype = config.sampling.resolved(described.objective), resolve_dtype(config.dtype)
        config = replace(config, sampling=sampling, dtype=dtype)
        mesh = make_mesh(config.mesh)
        weaker = pretrained.describe(Path(config.guide)) if config.guide else None
        check(config, described, weaker, mesh)
    distributed.assert_same_everywhere({**asdict(config), "distributed": None})
    channels, guide = described.model.in_channels, None
    print(f"reading  {source}" + (f", {config.vae}" if config.vae else ""), flush=True)
    with distributed.sync_errors():
        vae, vae_name = load_decoder(config.vae, channels, described.latent_scale)
        network, note = pretrained.load_on_mesh(source, described, mesh, dtype, **config.origin.choice())
        print(f"weights  {note}" + (f"\ndecoder  {vae_name}" if vae else ""))
        if weaker:
            guide, note = pretrained.load_on_mesh(Path(config.guide), weaker, mesh, dtype)
            print(f"guide    {note}")
    with distributed.sync_errors():
        paths = reserve_outputs(source, config) if distributed.is_main_process() else {}
    print(
        f"sampling {len(labels):,} samples by {sampling.sampler} in {sampling.steps} steps, guidance"
        f" {sampling.guidance_scale} on {sampling.guidance_channels or channels} of {channels} channels, computing in"
        f" {dtype}; the first batch is compiled",
        flush=True,
    )
    try:
        images = draw((network, guide), make_decode(vae, mesh, config.decode_batch), described, config, labels)
    except BaseException:
        if paths:
            paths["grid"].unlink()  # still empty
        raise
    if distributed.is_main_process():
        write(paths, images, labels, names)
    return 0


def main() -> int:
    """Run the command line."""
    remedy = "try a smaller --batch or --decode-batch"
    return cli.run(cli.script("sample"), partial(sample, sys.argv[1:]), out_of_memory=remedy)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # There is nothing to save.
    sys.exit(main())
