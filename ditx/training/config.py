"""The configuration of a training run, and the presets, among them all of the paper's networks."""

import importlib.util
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from ditx import cli
from ditx.diffusion.objective import ObjectiveConfig
from ditx.files import first_line
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import DIT_CONFIGS, DiTConfig
from ditx.parallel.distributed import DistributedConfig
from ditx.parallel.mesh import MeshConfig, check_batch, check_mesh
from ditx.sampling import SamplingConfig
from ditx.training import ema
from ditx.training.step import Remat

_UNTITLED: Any = tyro.conf.arg(help="")  # The names of the fields say enough, and --help stays within two screens.


@dataclass(frozen=True)
class Common:
    """The fields that most runs set: a base class, so that `train.py --help` lists them first."""

    dataset: Literal["digits", "cifar10", "images", "latents"] = "images"
    """embedded digits, CIFAR-10, a folder of images per class, or latents of ditx extract"""
    data_path: str = ""
    """CIFAR-10 (batches, .npz or folder), images or latents"""
    run: str = ""
    """folder to write, or to resume; runs/PRESET if empty"""
    steps: int = 400_000
    """training steps in all"""
    batch_size: int = 256
    """images a step, over all devices"""
    learning_rate: float = 1e-4
    """of AdamW"""
    warmup: int = 0
    """steps over which the learning rate rises"""
    decay: Literal["constant", "cosine"] = "constant"
    """learning rate: constant, or falling to 0 at the last step"""
    ema_decay: float = 0.9999
    """of the averaged weights, from which samples are drawn"""
    ema_warmup: bool = True
    """average over fewer steps at first: after t steps, decay at most (1 + t) / (10 + t)"""
    flip: bool = True
    """mirror half of the images left to right"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of the network's arithmetic; weights, averages and moments are float32"""
    seed: int = 0
    """of weights, data order, times and noise"""
    vae: str = ""
    """decoder of latents for pictures: ft-ema, ft-mse, original or a path"""
    init_from: str = ""
    """run or weights to start from; other classes get a new label table"""


@dataclass(frozen=True)
class Config(KernelConfig, ObjectiveConfig, Common):
    """One training run. The defaults are the paper's; a preset changes the fields that its data need."""

    log_every: int = 100
    """steps averaged into one line of metrics.jsonl"""
    checkpoint_every: int = 5_000
    """steps between checkpoints"""
    sample_every: int = 10_000
    """steps between pictures of samples; 0: none"""
    eval_every: int = 0
    """steps between FIDs of unguided samples; 0: none"""
    eval_stats: str = ""
    """reference of the FIDs: a file of ditx evaluate --make-stats, or an ADM .npz"""
    eval_samples: int = 2_000
    """samples of each FID; fewer than 10,000 only compare steps"""
    eval_inception: str = ""
    """file of Inception weights; pytorch-fid's are fetched if empty"""
    unroll: int = 1
    """blocks compiled in a row: faster on a GPU, slower to compile"""
    remat: Remat = "none"
    """backward pass recomputes: nothing, all but matmuls (dots), blocks (full)"""
    accumulate: int = 1
    """parts of a batch computed in turn: less memory, the same result"""
    workers: int = 0
    """processes that decode images; 0: threads"""
    strict: bool = False
    """stop at a damaged image instead of skipping it"""
    weight_decay: float = 0.0
    """of AdamW"""
    beta2: float = 0.999
    """of AdamW"""
    ema_every: int = 0
    """steps between stored power-function EMAs, for ditx ema; 0: none"""
    ema_lengths: tuple[float, ...] = (0.05, 0.1)
    """lengths of the EMAs, as shares of the training so far"""
    keep: int = 3
    """newest checkpoints to keep"""
    keep_every: int = 0
    """also keep checkpoints at multiples of this step; 0: none"""
    keep_best: int = 0
    """also keep this many of the lowest loss (with eval_every: FID, at least 1)"""
    profile_steps: int = 0
    """steps to trace into the run's folder profile; 0: none"""
    wandb: str = ""
    """Weights & Biases project to log to (--extra wandb)"""
    model: Annotated[DiTConfig, _UNTITLED] = field(default_factory=DiTConfig)
    sampling: Annotated[SamplingConfig, _UNTITLED] = field(default_factory=SamplingConfig)
    mesh: Annotated[MeshConfig, _UNTITLED] = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """several processes; srun, mpirun and TPU pods need no flags"""

    @classmethod
    def of(cls, described: dict[str, Any]) -> "Config":
        """The configuration in a run's `config.json`, without the processes. Raises ValueError if it cannot be read."""

        def read(default: Any, values: dict[str, Any]) -> Any:
            changes = {}
            for name in {part.name for part in fields(default)} & values.keys():
                before: Any = getattr(default, name)
                value: Any = values[name]
                value = tuple(value) if isinstance(value, list) else value  # JSON has only lists.
                changes[name] = read(before, value) if is_dataclass(before) else value
            return replace(default, **changes)

        try:
            return read(cls(), {name: value for name, value in described.items() if name != "distributed"})
        except Exception as error:  # Type checks raise types of their own.
            cause = f"{described.get('run')}: its config.json is damaged, or of another version of ditx"
            raise ValueError(f"{cause} ({first_line(error)}); give its flags instead of --resume") from error

    def start_left(self, step: int) -> float:
        """The share of the weights before the first step in the average after `step` steps."""
        return 0.0 if self.ema_warmup else self.ema_decay**step

    @property
    def ema_gammas(self) -> tuple[float, ...]:
        """The powers of the stored EMAs. Raises ValueError for an impossible length."""
        return tuple(map(ema.gamma_of, self.ema_lengths)) if self.ema_every else ()

    def matched_to(self, dataset: Any, preset: "Config") -> "Config":
        """With the data's number of classes and channels, where no flag has changed the preset's.

        Raises ValueError where the data, or the model that results, does not fit.
        """
        size, (height, width, channels) = self.model.input_size, dataset.image_shape
        if (height, width) != self.model.input_shape[:2]:
            raise ValueError(f"the images are {height}x{width}, model.input_size is {size}; make the two agree")
        values = {"in_channels": channels}
        if self.model.num_classes:  # 0 is a network without labels
            values["num_classes"] = len(dataset.class_names)
        for name, value in values.items():
            if getattr(self.model, name) not in (value, getattr(preset.model, name)):
                mismatch = f"model.{name} is {getattr(self.model, name)}, but the data has {value}"
                raise ValueError(f"{mismatch}; leave it out, or bring back the data of --resume")
        matched = replace(self, model=replace(self.model, **values))
        if not dataset.class_names and self.sampling == preset.sampling:  # guidance needs classes
            matched = replace(matched, sampling=replace(self.sampling, guidance_scale=1.0))
        if self.is_mean:
            matched = matched._for_mean_velocity(new_pictures=self.sampling == preset.sampling)
        matched.check_fields()
        return matched

    def _for_mean_velocity(self, *, new_pictures: bool) -> "Config":
        """With the second embedding, attention that has a forward derivative and, if asked for, pictures in one step.

        Raises ValueError for kernels without a forward derivative.
        """
        self.check_forward_derivative()
        model, sampling = replace(self.model, mean_velocity=True), self.sampling
        if new_pictures:
            trained = self.mean_guidance != (1.0, 0.0)  # guidance is in the network
            scale = 1.0 if trained else sampling.guidance_scale
            sampling = replace(sampling, sampler="auto", steps=0, guidance_scale=scale)
        return replace(self, attention="xla", model=model, sampling=sampling)

    def describe(self, preset: str, dataset: Any, **own: Any) -> dict[str, Any]:
        """The contents of a run's `config.json`; `own` are the objective and the source of a program of one's own."""
        names = dataset.class_names[: self.model.num_classes]
        described = {"preset": preset, **asdict(self), "class_names": names, "data_checksum": dataset.checksum}
        described["model"] = self.model.described()
        own = {"block": self.model.own_block, **own}
        names = {kind: piece and getattr(piece, "__name__", type(piece).__name__) for kind, piece in own.items()}
        described["own"] = names
        settings: Any = jax.config  # With other settings the same flags give other numbers.
        described["jax"] = {"enable_x64": settings.jax_enable_x64, "prng_impl": settings.jax_default_prng_impl}
        described |= {"latents": dataset.latents} if dataset.latents else {}
        return described | {"skipped": getattr(dataset, "skipped", {})}

    def check_fields(self) -> None:
        """Raise ValueError for values that are impossible with any data or devices."""
        cli.at_least(self, 1, "steps", "batch_size", "log_every", "checkpoint_every", "keep", "unroll", "accumulate")
        cli.at_least(self, 0, "learning_rate", "warmup", "weight_decay", "sample_every", "workers", "keep_every")
        cli.at_least(self, 0, "keep_best", "profile_steps", "ema_every", "eval_every")
        cli.check_seed(self.seed)
        for name in ("ema_decay", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 to below 1")
        if self.vae and self.dataset != "latents":
            raise ValueError(f"vae is {self.vae!r}, but dataset {self.dataset} has pixels; leave it out")
        self.check(self.model.trains_variance)
        if self.model.mean_velocity and not self.is_mean:
            raise ValueError(f"model.mean_velocity is on, but prediction is {self.prediction}; leave it out")
        if self.mean_guidance != (1.0, 0.0) and self.model.null_label is None:
            raise ValueError(f"mean_guidance is {self.mean_guidance}, which needs model.label_dropout above 0")
        if self.sample_every:
            self.sampling.check(self.model, self)
        _ = self.ema_gammas
        if self.eval_every:
            if not self.eval_stats:
                raise ValueError("eval_every needs --eval-stats; make them with: ditx evaluate --make-stats OUT DATA")
            if self.dataset == "latents" and not self.vae:
                raise ValueError("eval_every needs --vae, which decodes the latents")
            cli.at_least(self, 2, "eval_samples")  # for a covariance
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb is not installed; put --extra wandb after uv run, or pip install wandb")

    def check_devices(self, mesh: Mesh) -> None:
        """Raise ValueError where the network, the batch or the kernels do not fit the devices."""
        check_mesh(mesh, num_heads=self.model.num_heads, mlp_size=self.model.mlp_size)
        self.check_kernels(mesh, self.dtype, self.model)
        check_batch(mesh, self.batch_size, self.accumulate)

    @property
    def changeable_on_resume(self) -> set[str]:
        """The fields that may differ when a run is resumed."""
        return CHANGEABLE_ON_RESUME | ({"steps"} if self.decay == "constant" else set())


def paper(name: str, steps: int = 400_000, **changes: Any) -> Config:
    """A run of the paper on latents, with pictures as in the released code."""
    model = replace(DIT_CONFIGS[name], **changes)
    sampling = SamplingConfig(guidance_scale=4.0, guidance_channels=3)
    return Config(dataset="latents", model=model, steps=steps, ema_warmup=False, sampling=sampling)


def modern(name: str, sampling: SamplingConfig, steps: int, changes: dict[str, Any], **options: Any) -> Config:
    """A run of a later paper, with the settings that LightningDiT and JiT share, on DiT's network with `changes`."""
    kinds: Any = {"norm": "rms", "mlp": "swiglu", "positions": "both", "learn_sigma": False}
    options = {"schedule": "flow", "batch_size": 1024, "learning_rate": 2e-4, "beta2": 0.95, **options}
    model = replace(DIT_CONFIGS[name], **kinds, **changes)
    return Config(model=model, sampling=sampling, steps=steps, ema_warmup=False, **options)


def jit(name: str, guidance_scale: float, context_start: int) -> Config:
    """A run of Li and He 2025 for 600 epochs. Its sampler guides where their t is above 0.1, in 50 steps."""
    sampling = SamplingConfig("heun", 50, guidance_scale=guidance_scale, guidance_interval=(0.0, 899.0))
    changes: dict[str, Any] = {"input_size": 256, "patch_size": 16, "in_channels": 3, "convention": "jit"}
    changes |= {"qk_norm": True, "context_tokens": 32, "context_start": context_start, "patch_bottleneck": 128}
    return modern(name, sampling, 750_600, changes, prediction="x0", flow_times=(0.8, 0.8), warmup=6_255)


PRESETS = {
    # 5,000 digits, legible after some minutes on two CPU cores. Few tokens and small batches allow many updates; most
    # training times are near the noise, where the shape of a digit is decided.
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
        sampling=SamplingConfig(guidance_scale=2.5),
    ),
    # 32x32 colour pixels in the token grid of the paper's latents, 200 epochs. Objective, sampler and average were the
    # best on small stand-ins (ditx/evaluation/README.md); the rate is U-ViT's, and falls to 0 in so short a run.
    "cifar10": Config(
        dataset="cifar10",
        model=replace(DIT_CONFIGS["DiT-S/2"], in_channels=3, num_classes=10, learn_sigma=False),
        schedule="flow",
        prediction="velocity",
        steps=40_000,
        learning_rate=2e-4,
        warmup=1000,
        decay="cosine",
        ema_decay=0.9995,
    ),
    # Any folder of images, as pixels. `fit.py` fits sizes, batch and lengths to the images and the devices.
    "images": Config(
        dataset="images",
        model=replace(DIT_CONFIGS["DiT-S/4"], input_size=64, in_channels=3, learn_sigma=False),
        schedule="flow",
        prediction="velocity",
        flow_times=(0.5, 1.0),
        decay="cosine",
        sampling=SamplingConfig(guidance_scale=1.5),
    ),
    # As many images, 64 million, as U-ViT-S/2 (Bao et al. 2023), whose FID of 3.11 is the mark at this size. Learning
    # rate, warm-up in images, weight decay, average and flips are U-ViT's; it has no dropout. The rate stays constant,
    # as there, so that --steps can lengthen the run.
    "cifar10-long": Config(
        dataset="cifar10",
        model=replace(DIT_CONFIGS["DiT-S/2"], in_channels=3, num_classes=10, learn_sigma=False),
        schedule="flow",
        prediction="velocity",
        steps=250_000,
        learning_rate=2e-4,
        warmup=1250,
        weight_decay=0.03,
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
    # Yao et al. 2025 on latents of VA-VAE, 64 epochs, without their cosine loss: 5.14, and 2.11 with guidance 10; after
    # 800 epochs 2.17, and 1.35 with guidance 6.7 up to time 875. Times are drawn without the shift, which is for
    # sampling: the logit's mean is 0 before it.
    "imagenet256-lightningdit-xl1": modern(
        "DiT-XL/2",
        SamplingConfig("euler", 249, guidance_scale=10.0, guidance_channels=3, guidance_interval=(0.0, 900.0)),
        80_000,
        {"input_size": 16, "patch_size": 1, "in_channels": 32, "convention": "sit"},
        dataset="latents",
        prediction="velocity",
        flow_times=(-math.log(10 / 3), 1.0),
        flow_shift=10 / 3,
    ),
    # Li and He 2025, with guidance.
    "imagenet256-jit-b16": jit("DiT-B/8", 2.9, context_start=4),  # 3.66
    "imagenet256-jit-l16": jit("DiT-L/8", 2.4, context_start=8),  # 2.36
}
PRESETS_HELP = """Presets, with data, network, hardware and time:
  digits            28x28 pixels, embedded; 1.3 M parameters; two CPU cores, 3 minutes
  images            a folder of images; fitted to it and to the machine; minutes on CPUs
  cifar10           32x32 pixels; S/2, 32 M parameters; one GPU, time not measured
  cifar10-long      the same for 250,000 steps, constant rate; one GPU, not measured
  imagenet256-SIZE  latents; s8 s4 s2 b8 b4 b2 l8 l4 l2 xl8 xl4; 400,000 steps of 256
  imagenet256-xl2, imagenet512-xl2: XL/2, 675 M; TPU v3-256, 7 M and 3 M steps, weeks
  imagenet256-xl2-adaln, -cross-attention, -in-context: other blocks, 400,000 steps
  imagenet256-NAME  lightningdit-xl1, on latents of VA-VAE; jit-b16 jit-l16, on pixels"""
# Fields that change neither the data nor, beyond rounding, the arithmetic.
CHANGEABLE_ON_RESUME: set[str] = set(
    "preset run data_path vae init_from workers mesh distributed unroll remat kernels attention accumulate log_every"
    " checkpoint_every keep keep_every keep_best sample_every sampling eval_every eval_stats eval_samples"
    " eval_inception profile_steps wandb strict skipped compile_seconds".split()
)
