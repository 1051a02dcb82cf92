"""What makes up a training run: its configuration, and the named ones, all of the paper's among them."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ditx.diffusion.objective import ObjectiveConfig
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DIT_CONFIGS, DiTConfig
from ditx.parallel.distributed import DistributedConfig
from ditx.parallel.mesh import MeshConfig
from ditx.sampling import SamplingConfig
from ditx.training import ema
from ditx.training.logger import check_wandb
from ditx.training.step import Remat


@dataclass(frozen=True)
class Config(KernelConfig, ObjectiveConfig):
    """One training run. The defaults are the paper's; a preset changes what its data needs."""

    dataset: Literal["digits", "cifar10", "images", "latents"] = "images"
    """the embedded digits, CIFAR-10, a folder with a subfolder of images for each class, or what ditx extract wrote"""
    data_path: str = ""
    """where CIFAR-10 (its batches, an .npz or a folder), the image folder or the latents lie"""
    vae: str = ""
    """latents alone: what decodes the pictures (ft-ema, ft-mse, original, or a path); without it, none are drawn"""
    model: DiTConfig = field(default_factory=DiTConfig)
    init_from: str = ""
    """run or weights to begin from instead of random ones; with other classes, the label table begins anew"""
    steps: int = 400_000
    """training steps in all"""
    batch_size: int = 256
    """images a step, over all devices"""
    learning_rate: float = 1e-4
    decay: Literal["constant", "cosine"] = "constant"
    """the learning rate over the run: constant, or falling to 0 at the last step"""
    warmup: int = 0
    """steps over which the learning rate rises, on top of its decay"""
    weight_decay: float = 0.0
    beta2: float = 0.999
    """Adam's averaging of squared gradients"""
    ema_decay: float = 0.9999
    """averaging of the weights, from which all samples are drawn"""
    ema_every: int = 0
    """steps between those at which averages by power profiles are stored, for ditx ema; 0 keeps none"""
    ema_lengths: tuple[float, ...] = (0.05, 0.1)
    """their lengths, as shares of the training so far"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """what the network computes in; weights, average and moments are float32 in any case"""
    flip: bool = True
    """mirror half of the images left to right"""
    seed: int = 0
    """of weights, data order, noise: everything random"""
    unroll: int = 1
    """blocks compiled in a row: more is faster on a GPU and slower to compile"""
    remat: Remat = "none"
    """what the backward pass recomputes: none; all but the products with weights (dots); whole blocks (full)"""
    accumulate: int = 1
    """parts of a batch that follow each other within one step: less memory, the same result"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    workers: int = 0
    """processes that decode images; 0 decodes in threads"""
    run: str = ""
    """folder to write to, or to go on in; runs/PRESET if not given"""
    log_every: int = 100
    """steps over which one line of metrics.jsonl is the mean"""
    checkpoint_every: int = 5_000
    keep: int = 3
    """newest checkpoints to keep"""
    keep_every: int = 0
    """of the others, those of every so many steps are kept, too; 0 keeps none"""
    keep_best: int = 0
    """of the others, so many of the lowest mean loss or, with eval_every, at least one, of the lowest FID, are kept"""
    max_skipped: int = 10
    """updates in a row that are skipped, for a loss or a gradient that is not finite, before the run ends"""
    sample_every: int = 10_000
    """steps between pictures; 0 draws none"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """how the pictures are drawn"""
    eval_every: int = 0
    """steps between FIDs of the averaged weights, drawn as the pictures but without guidance; 0 computes none"""
    eval_stats: str = ""
    """what they compare with: a file that ditx evaluate --make-stats has written, or an ADM reference"""
    eval_samples: int = 2_000
    """samples of each; fewer than 10,000 tell one step from another, and no more"""
    eval_inception: str = ""
    """file of the Inception weights; pytorch-fid's, fetched once, if not given"""
    profile_steps: int = 0
    """steps, soon after the start, of which a trace is written to the run's folder profile; 0 writes none"""
    wandb: str = ""
    """project of Weights and Biases to which metrics and pictures go, too (--extra wandb)"""


def paper(name: str, steps: int = 400_000, **changes: Any) -> Config:
    """A run of the paper, on latents: what the defaults are made of, and pictures as in the released code."""
    model = replace(DIT_CONFIGS[name], **changes)
    sampling = SamplingConfig(guidance_scale=4.0, guidance_channels=3)
    return Config(dataset="latents", model=model, steps=steps, sampling=sampling)


PRESETS = {
    # 5,000 digits, legible after some minutes on two CPU cores: few tokens and small batches, so that there are many
    # updates, and times that lean towards the noise, where the shape of a digit is decided.
    "digits": Config(
        dataset="digits",
        model=DiTConfig(28, 7, 1, 128, 4, 4, num_classes=10, learn_sigma=False),
        schedule="flow",
        prediction="velocity",
        flow_times=(0.5, 1.0),
        steps=4000,
        batch_size=32,
        learning_rate=2e-3,
        decay="cosine",
        warmup=100,
        beta2=0.99,
        ema_decay=0.995,
        dtype="float32",
        flip=False,
        unroll=4,
        log_every=20,
        checkpoint_every=500,
        sample_every=1000,
        sampling=SamplingConfig(steps=25, sampler="euler", guidance_scale=2.5),
    ),
    # 32x32 colour pixels in the token grid of the paper's latents: 200 epochs. Objective, sampler and average are those
    # that were best on small stand-ins (README).
    "cifar10": Config(
        dataset="cifar10",
        model=replace(DIT_CONFIGS["DiT-S/2"], in_channels=3, num_classes=10, learn_sigma=False),
        schedule="flow",
        prediction="velocity",
        steps=40_000,
        warmup=1000,
        decay="cosine",
        ema_decay=0.9995,
        sampling=SamplingConfig(sampler="dpm-solver", steps=25),
    ),
    # Any folder of images, as pixels.
    "images": Config(
        dataset="images",
        model=replace(DIT_CONFIGS["DiT-B/4"], input_size=64, in_channels=3),
        sampling=SamplingConfig(guidance_scale=1.5),
    ),
    # The paper's Table 4, with the FID-50K it reports: no guidance, 250 DDPM steps, the ft-MSE decoder.
    "imagenet256-s8": paper("DiT-S/8"),  # 153.60
    "imagenet256-s4": paper("DiT-S/4"),  # 100.41
    "imagenet256-s2": paper("DiT-S/2"),  # 68.40
    "imagenet256-b8": paper("DiT-B/8"),  # 122.74
    "imagenet256-b4": paper("DiT-B/4"),  # 68.38
    "imagenet256-b2": paper("DiT-B/2"),  # 43.47
    "imagenet256-l8": paper("DiT-L/8"),  # 118.87
    "imagenet256-l4": paper("DiT-L/4"),  # 45.64
    "imagenet256-l2": paper("DiT-L/2"),  # 23.33
    "imagenet256-xl8": paper("DiT-XL/8"),  # 106.41
    "imagenet256-xl4": paper("DiT-XL/4"),  # 43.01
    # 19.47 after 400,000 steps, 10.67 after 2,352,000, 9.62 after all; 2.27 with guidance 1.5 and the ft-EMA decoder.
    "imagenet256-xl2": paper("DiT-XL/2", steps=7_000_000),
    "imagenet256-xl2-in-context": paper("DiT-XL/2", block="in-context"),  # 35.24
    "imagenet256-xl2-cross-attention": paper("DiT-XL/2", block="cross-attention"),  # 26.14
    "imagenet256-xl2-adaln": paper("DiT-XL/2", block="adaln"),  # 25.21
    # 11.93; with the ft-EMA decoder 12.03, and 3.04 with guidance 1.5.
    "imagenet512-xl2": paper("DiT-XL/2", steps=3_000_000, input_size=64),
}
# What may differ when a run goes on: it changes neither the data nor the arithmetic (beyond rounding).
CHANGEABLE_ON_RESUME = {
    "preset",
    "run",
    "data_path",
    "vae",
    "workers",
    "mesh",
    "processes",
    "unroll",
    "remat",
    "kernels",
    "attention",
}
CHANGEABLE_ON_RESUME |= {
    "log_every",
    "checkpoint_every",
    "keep",
    "keep_every",
    "keep_best",
    "max_skipped",
    "sample_every",
    "sampling",
}
CHANGEABLE_ON_RESUME |= {"profile_steps", "wandb", "init_from", "accumulate"}
CHANGEABLE_ON_RESUME |= {"eval_every", "eval_stats", "eval_samples", "eval_inception"}


def check(config: Config) -> None:
    """Raise ValueError for values that the parts do not check themselves."""
    for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep", "max_skipped", "unroll", "accumulate"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    least_zero = ("learning_rate", "warmup", "weight_decay", "sample_every", "workers", "seed")
    for name in (*least_zero, "keep_every", "keep_best", "profile_steps", "ema_every", "eval_every"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must not be negative")
    if config.seed >= 2**32:
        raise ValueError(f"seed is {config.seed}; it goes from 0 to {2**32 - 1}")
    for name in ("ema_decay", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it goes from 0 up to, not with, 1")
    if config.vae and config.dataset != "latents":
        raise ValueError(f"vae is {config.vae!r}, but dataset {config.dataset} is of pixels; leave it out")
    config.check(config.model.learn_sigma and not config.model.sit)
    if config.sample_every:
        config.sampling.check(config.model, config)
    if config.ema_every:
        power_ema_gammas(config)
    if config.eval_every:
        if not config.eval_stats:
            raise ValueError("eval_every needs --eval-stats; make them with: ditx evaluate --make-stats OUT DATA")
        if config.dataset == "latents" and not config.vae:
            raise ValueError("eval_every needs --vae, which decodes the latents")
        if config.eval_samples < 2:
            raise ValueError(f"eval_samples is {config.eval_samples}; a covariance needs at least 2")
    if config.wandb:
        check_wandb()


def power_ema_gammas(config: Config) -> tuple[float, ...]:
    """The powers of the profiles of which averages are kept. Raises ValueError for an impossible length."""
    return tuple(map(ema.gamma_of, config.ema_lengths)) if config.ema_every else ()
