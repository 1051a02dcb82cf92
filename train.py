"""Train a class-conditional diffusion transformer: `train.py [preset] [--field value ...]`.

Reads from top to bottom: configuration, data, state, compiled step, loop. A run is a folder; the same command, started
again, resumes from its newest checkpoint as if it had never stopped.
"""

import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, install_import_hook

with install_import_hook("ditx", "beartype.beartype"):
    from ditx import cli, costs, pictures
    from ditx.data import loader, sources
    from ditx.diffusion.objective import make_objective
    from ditx.evaluation.evaluate import draw_labels, make_fid
    from ditx.evaluation.features import FeatureNetwork
    from ditx.evaluation.reference import Reference, read_reference
    from ditx.parallel.compile import compiler_options, tune_malloc
    from ditx.parallel.distributed import (
        SyncedBatches,
        broadcast_from_main,
        exit_if_peer_dies,
        initialize,
        is_main_process,
        stop_signals,
        sync_errors,
    )
    from ditx.parallel.fsdp import bytes_per_device, table
    from ditx.parallel.mesh import local_batch_indices, make_mesh, put_batch, replicated
    from ditx.sampling import Decode, make_decode, make_sampler
    from ditx.training import checkpoint
    from ditx.training import run as runs
    from ditx.training.compile import AbstractStep
    from ditx.training.config import PRESETS, Config, check, check_devices
    from ditx.training.logger import MetricsLogger, Profiler
    from ditx.training.run import Run, Sums
    from ditx.training.step import TrainState, adamw, train_step
    from ditx.weights import pretrained
    from ditx.weights.frozen import load_decoder, load_inception

REMEDY = "--remat full, a higher --accumulate, --mesh.fsdp, or a smaller --batch-size"
Hook = Callable[[TrainState, int], Any]


def parse(argv: list[str]) -> tuple[str, Config]:
    """The preset named first, and the configuration: the preset's, changed by the flags."""
    preset, flags = cli.split_preset(argv, PRESETS, default="digits")
    own = [name for name in PRESETS if not name.startswith("imagenet")]
    paper = [name for name in PRESETS if name not in own]
    usage = f"Presets: {', '.join(own)}; the paper's networks: {', '.join(paper)}. Defaults below: {preset}."
    default = replace(PRESETS[preset], run=f"runs/{preset}")
    return preset, tyro.cli(Config, default=default, args=flags, prog=f"train.py {preset}", description=usage)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with a warm-up and, if configured, a cosine decay of the learning rate."""
    constant = config.decay == "constant"
    decay = optax.constant_schedule(1.0) if constant else optax.cosine_decay_schedule(1.0, config.steps)

    def rate(step):
        return config.learning_rate * decay(step) * jnp.minimum(1, (step + 1) / max(config.warmup, 1))

    return adamw(rate, beta2=config.beta2, weight_decay=config.weight_decay)


def train(preset: str, config: Config) -> int:
    """Check everything a user can get wrong, compile the step, and train; returns the exit code."""
    initialize(config.distributed)
    with sync_errors():  # a mistake in one process ends all of them with the same sentence
        check(config)
        dataset = sources.open_dataset(config.dataset, config.data_path, config.model.input_size)
        config = config.matched_to(dataset, PRESETS[preset])
        check(config)
        tune_malloc()
        mesh = make_mesh(config.mesh)
        check_devices(config, mesh)
        reference = open_reference(config, dataset)
        if config.init_from and not checkpoint.steps(Path(config.run) / "checkpoints"):
            pretrained.describe_initial(Path(config.init_from), config.model)
    described = config.describe(preset, dataset)
    finished = Run.check(config, described)  # refuses other data, or another configuration
    step = make_step(config, mesh, latent=bool(dataset.latents))
    print(summary(config, mesh, dataset, step.state), flush=True)
    if not finished:  # before the folder exists, so that a step that is too large leaves nothing
        compile_step(step)
    with closing(Run.open(config, described)) as run:
        return fit(config, mesh, dataset, step, run, reference)


def make_step(config: Config, mesh: Mesh, *, latent: bool) -> AbstractStep:
    """The training step, and the shapes of everything that enters and leaves it."""
    optimizer = make_optimizer(config)
    function = partial(
        train_step,
        objective=make_objective(config),
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        ema_gammas=config.ema_gammas,
        dtype=jnp.dtype(config.dtype),
        accumulate=config.accumulate,
        apply_block=config.apply_block(),
        remat=config.remat,
        unroll=config.unroll,
        mesh=mesh,
    )
    options: Any = {"power_emas": len(config.ema_gammas), "fp8": config.matmul_dtype == "fp8", "remedy": REMEDY}
    return AbstractStep(function, config.model, optimizer, mesh, config.batch_size, latent, **options)


@cache
def compile_step(step: AbstractStep) -> Any:
    """The compiled step, once."""
    with sync_errors():
        program, seconds, needed = step.compiled
    print(f"compiled  in {seconds:.1f} s; a step takes {needed / 2**20:,.1f} MiB a device", flush=True)
    return program


def begin(config: Config, step: AbstractStep, run: Run) -> tuple[TrainState, Sums, int, Array]:
    """State, metric sums and number of steps so far, restored or created; and the key of all steps."""
    split = jax.jit(lambda: jax.random.split(jax.random.key(config.seed)), out_shardings=replicated(step.mesh))
    init_key, key = split()
    restored = run.restore(step.state, step.sums)
    if restored:
        print(f"resume    from step {restored[2]:,}", flush=True)
        return *restored, key
    state, note = jax.jit(step.create, out_shardings=step.shardings)(init_key), "random weights"
    if config.init_from:
        with sync_errors():
            model, note = pretrained.load_initial(Path(config.init_from), state.model, step.mesh)
        ema, *power_emas = (jax.tree.map(jnp.copy, model) for _ in range(1 + len(state.power_emas)))
        state = replace(state, model=model, ema=ema, power_emas=tuple(power_emas))
    print(f"init      {note}", flush=True)
    return state, step.sums, 0, key


def fit(config: Config, mesh: Mesh, dataset: sources.Source, abstract: AbstractStep, run: Run, reference: Any) -> int:
    """Train in a locked run folder; returns the exit code."""
    state, sums, start, key = begin(config, abstract, run)
    hooks = {
        "samples": (config.sample_every, make_grid(config, mesh, dataset, run)),
        "fid": (config.eval_every, make_eval(config, mesh, dataset, reference)),
        "averages": (config.ema_every, make_averages(config, mesh, run)),
    }
    if start >= config.steps:
        return finish(config, run, state, hooks["samples"], f"{run.folder} has all its {config.steps:,} steps")
    run.start(start)
    program = compile_step(abstract)
    rows, save_due = local_batch_indices(mesh, config.batch_size), False
    options = {"batch_size": config.batch_size, "seed": config.seed, "flip": config.flip, "workers": config.workers}
    batches = loader.batches(dataset, start=start, rows=rows, **options)
    with (
        stop_signals() as stop,
        closing(batches),
        closing(MetricsLogger(run.folder, config, sums, start)) as metrics,
        closing(Profiler(run.folder / "profile", start, config.steps, config.profile_steps)) as profiler,
        exit_if_peer_dies(),
    ):
        synced = SyncedBatches(metrics.timed(batches), mesh, stop)  # ends at the same batch in every process
        for step, batch in zip(range(start + 1, config.steps + 1), synced, strict=False):
            profiler.before(step)
            state, terms = program(state, put_batch(batch, mesh, rows, config.batch_size), key)
            profiler.after(step, terms)
            metrics.add(step, terms)  # read one step late, so that the host never waits for the device
            if step % config.log_every == 0 or step == config.steps:
                metrics.write()
            results = {}
            for name, (every, hook) in hooks.items():
                if every and hook and (step % every == 0 or step == config.steps):
                    with metrics.paused():
                        results[name] = hook(state, step)
            metrics.log(results)
            save_due |= step % config.checkpoint_every == 0 or "fid" in results
            if save_due and not metrics.skipping():  # else the newest checkpoint stays a good one
                run.save(step, state, metrics.sums, loss=metrics.mean_loss(), fid=results.get("fid"))
                save_due = False
        metrics.settle()
        run.save(metrics.step, state, metrics.sums, loss=metrics.mean_loss())
        if synced.error:  # an unreadable image, for instance; the training up to it is saved
            raise synced.error
    if stop and metrics.step < config.steps:
        print(f"stopped   after step {metrics.step:,}; run the same command to resume")
        return 128 + stop[0]
    return finish(config, run, state, hooks["samples"], f"{run.folder}")


def finish(config: Config, run: Run, state: TrainState, samples: tuple[int, Hook | None], note: str) -> int:
    """Write what a kill after the last step has prevented, the last picture and the curves of the loss."""
    every, draw = samples
    if every and draw and broadcast_from_main(not run.picture(config.steps).exists()):
        draw(state, config.steps)
    run.write_loss_curves()
    print(f"done      {note}; draw samples with: sample.py {run.folder}")
    return 0


def make_grid(config: Config, mesh: Mesh, dataset: sources.Source, run: Run) -> Hook | None:
    """Draws samples of the averaged weights: up to ten classes, four of each, the same noise every time."""
    if not config.sample_every or (dataset.latents and not config.vae):
        return None
    columns = min(config.model.num_classes, 10) or 10
    classes = np.linspace(0, max(config.model.num_classes - 1, 0), columns).astype(np.int32)
    options: Any = {"batch_size": 4 * columns, "decode": read_decoder(config, dataset, mesh)}
    sampler = make_sampler(config.sampling, config.model, config, mesh, **options)

    def write(state: TrainState, step: int) -> Path | None:
        try:
            images = sampler(state.ema, np.tile(classes, 4), seed=config.seed)
        except ValueError as error:  # training may still recover
            return print(f"warning: no picture of step {step:,}: {error}", file=sys.stderr)
        if is_main_process():
            run.picture(step).parent.mkdir(exist_ok=True)
            pictures.grid(images, columns).save(run.picture(step))
        return run.picture(step)

    return write


def make_averages(config: Config, mesh: Mesh, run: Run) -> Hook:
    """Stores the power-function EMAs in half precision, unless a killed run has stored those of the step."""
    halve = jax.jit(partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float16)), out_shardings=replicated(mesh))

    def store(state: TrainState, step: int) -> None:
        for length, average in zip(config.ema_lengths, state.power_emas, strict=True):
            file, half = runs.average_file(run.folder, step, length), halve(average)
            if is_main_process() and not file.exists():
                file.parent.mkdir(exist_ok=True)
                description = pretrained.Description.of(runs.read_config(run.folder), run.folder)
                pretrained.write(file, half, description, np.float16)

    return store


def read_decoder(config: Config, dataset: sources.Source, mesh: Mesh) -> Decode | None:
    """The decoder of latents; None for pixels."""
    if not dataset.latents:
        return None
    vae, _ = load_decoder(config.vae, config.model.in_channels, dataset.latents["scale"])
    return make_decode(vae, mesh)


def open_reference(config: Config, dataset: sources.Source) -> tuple[Reference, FeatureNetwork] | None:
    """The reference of FIDs and its feature network, if FIDs are configured. Raises ValueError if they do not fit."""
    if not config.eval_every:
        return None
    reference = read_reference(Path(config.eval_stats))
    if reference.pool is None:
        raise ValueError(
            f"{config.eval_stats} has only images; make statistics of them with ditx evaluate --make-stats"
        )
    network = reference.classifier or load_inception(config.eval_inception)[0]
    features = FeatureNetwork(network, reference.resize)
    side = dataset.latents["image_size"] if dataset.latents else 0
    reference.check(features, (side, side, 3) if side else dataset.image_shape)
    return reference, features


def make_eval(config: Config, mesh: Mesh, dataset: sources.Source, reference: Any) -> Hook | None:
    """FID of samples of the averaged weights, without guidance."""
    if reference is None:
        return None
    statistics, features = reference
    unguided, count = replace(config.sampling, guidance_scale=1.0), config.eval_samples
    options: Any = {"batch_size": min(128, count), "decode": read_decoder(config, dataset, mesh)}
    sampler = make_sampler(unguided, config.model, config, mesh, **options)
    labels = draw_labels(config.model.num_classes, count, config.seed)
    fid = make_fid(sampler, labels, config.seed, features, statistics, mesh)
    return lambda state, step: fid(state.ema)


def summary(config: Config, mesh: Mesh, dataset: sources.Source, state: TrainState) -> str:
    """The lines that a run prints first."""
    axes = ", ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
    options = "".join(
        f", {name}={value}" for name, value in compiler_options(mesh, fp8=config.matmul_dtype == "fp8").items()
    )
    parts = {"weights": state.model, "averages": (state.ema, state.power_emas), "moments": state.opt_state}
    memory = ", ".join(f"{name} {bytes_per_device(part) / 2**20:,.1f}" for name, part in parts.items())
    undrawn = dataset.latents and config.sample_every and not config.vae
    images, epochs = len(dataset), config.steps * config.batch_size / len(dataset)
    lines = [
        f"model     DiT of {costs.parameters(config.model):,} parameters, {costs.macs(config.model) / 1e9:.3f} G"
        f" multiply-adds, {config.model.num_tokens} tokens",
        f"devices   {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {config.dtype}{options}",
        f"memory    {bytes_per_device(state) / 2**20:,.1f} MiB a device: {memory}",
        f"data      {config.dataset}: {images:,} images of {'x'.join(map(str, dataset.image_shape))},"
        f" {config.model.num_classes} classes",
        f"steps     {config.steps:,} of {config.batch_size} images ({epochs:,.1f} epochs)",
        f"run       {config.run}{'; no pictures, which need --vae to decode latents' if undrawn else ''}",
    ]
    return "\n".join([*lines, table(state.model)] if mesh.size > 1 else lines)


def main() -> int:
    """Run the command line; a mistake is one sentence and exit code 2."""
    return cli.run("train.py", lambda: train(*parse(sys.argv[1:])), out_of_memory=f"try {REMEDY}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C just ends
    sys.exit(main())
