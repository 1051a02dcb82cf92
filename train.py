"""Train a class-conditional diffusion transformer: `train.py [preset] [--field value ...]`.

Reads from top to bottom: configuration, data, step, state, loop. A run is a folder; the same command, started again,
resumes from its newest checkpoint as if it had never stopped.
"""

import signal
import sys
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not {"-h", "--help", "-H", "--help-verbose"} & {*sys.argv}:
    print("loading   JAX and ditx for:", *sys.argv, file=sys.stderr, flush=True)  # Their imports take seconds.

from jaxtyping import install_import_hook

with install_import_hook("ditx", "beartype.beartype"):
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh
    from jaxtyping import Array

    from ditx import cli, costs, flags
    from ditx.data import loader, sources
    from ditx.diffusion.objective import Objective, make_objective
    from ditx.evaluation.hooks import Hooks, make_hooks
    from ditx.parallel import distributed
    from ditx.parallel.compile import tune_malloc
    from ditx.parallel.distributed import is_main_process, sync_errors
    from ditx.parallel.mesh import local_batch_indices, make_mesh, put_batch, replicated
    from ditx.training import checkpoint
    from ditx.training import run as runs
    from ditx.training.compile import AbstractStep
    from ditx.training.config import PRESETS, Config
    from ditx.training.logger import MetricsLogger, Profiler
    from ditx.training.run import Run, Sums
    from ditx.training.step import TrainState, adamw, train_step
    from ditx.weights import pretrained

REMEDY = "--remat full, a higher --accumulate, --mesh.fsdp, or a smaller --batch-size"


def train(
    config: Config, *, preset: str = "", objective: Objective | None = None, source: sources.Source | None = None
) -> int:
    """Check everything a user can get wrong, compile the step, and train; returns the exit code.

    `objective` and `source` replace the objective and the data of the configuration. A second call with the same
    arguments resumes.
    """
    config = config if config.run else replace(config, run="runs/own")
    distributed.initialize(config.distributed)
    with sync_errors():  # a mistake in one process ends all of them with the same sentence
        config.check_fields()
        if source is None:
            print(f"reading   {config.data_path or config.dataset}", flush=True)
            side = config.model.side
            dataset = sources.open_dataset(config.dataset, config.data_path, side, strict=config.strict)
        else:
            dataset = sources.check_source(source)
        config = config.matched_to(dataset, PRESETS.get(preset, config))
        tune_malloc()
        mesh = make_mesh(config.mesh)
        config.check_devices(mesh)
        hooks = make_hooks(config, mesh, dataset)
        if config.init_from and not checkpoint.steps(Path(config.run) / "checkpoints"):
            pretrained.describe_initial(Path(config.init_from), config.model)
    described = config.describe(preset, dataset, objective=objective, source=source)
    finished = Run.check(config, described)  # refuses other data, or another configuration
    step = make_step(config, mesh, objective, latent=bool(dataset.latents))
    print(summary(config, dataset, step, described["own"]["source"] or config.dataset), flush=True)
    if finished:
        described["compile_seconds"] = runs.read_config(Path(config.run)).get("compile_seconds")
    else:  # before the folder exists, so that a step that is too large leaves nothing
        described["compile_seconds"] = round(compile_step(step, Path(config.run))[1], 1)
    with closing(Run.open(config, described)) as run:
        return fit(config, dataset, step, hooks, run)


def make_step(config: Config, mesh: Mesh, objective: Objective | None = None, *, latent: bool) -> AbstractStep:
    """The training step, and the shapes of everything that enters and leaves it."""
    optimizer = adamw(
        config.learning_rate,
        warmup=config.warmup,
        decay_steps=config.steps if config.decay == "cosine" else 0,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
    )
    function = partial(
        train_step,
        objective=objective or make_objective(config),
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        ema_warmup=config.ema_warmup,
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
def compile_step(step: AbstractStep, run: Path) -> tuple[Any, float]:
    """The compiled step and the seconds this took; a second call returns the same."""
    before = runs.read_config(run).get("compile_seconds") if (run / runs.CONFIG).exists() else None
    print("compiling the step" + (f"; it took {before} s last time" if before else ""), flush=True)
    with sync_errors():
        program, seconds, needed = step.compiled
    print(f"compiled  in {seconds:.1f} s; a step takes {needed / 2**20:,.1f} MiB a device", flush=True)
    return program, seconds


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


def fit(config: Config, dataset: sources.Source, abstract: AbstractStep, hooks: Hooks, run: Run) -> int:
    """Train in a locked run folder; returns the exit code."""
    state, sums, start, key = begin(config, abstract, run)
    if start >= config.steps:
        return finish(config, hooks, run, state, f"{run.folder} has all its {config.steps:,} steps")
    run.start(start)
    (program, _), save_due = compile_step(abstract, run.folder), False
    rows = local_batch_indices(abstract.mesh, config.batch_size)
    options = {"batch_size": config.batch_size, "seed": config.seed, "flip": config.flip, "workers": config.workers}
    with (
        distributed.stop_signals() as stop,
        closing(loader.batches(dataset, start=start, rows=rows, **options)) as batches,
        closing(MetricsLogger(run.folder, config, sums, start)) as metrics,
        closing(Profiler(run.folder / "profile", start, config.steps, config.profile_steps)) as profiler,
        distributed.exit_if_peer_dies(),
    ):
        # Ends at the same batch in every process.
        synced = distributed.SyncedBatches(metrics.timed(batches), abstract.mesh, stop)
        for step, batch in zip(range(start + 1, config.steps + 1), synced, strict=False):
            profiler.before(step)
            state, terms = program(state, put_batch(batch, abstract.mesh, rows, config.batch_size), key)
            profiler.after(step, terms)
            metrics.add(step, terms)  # read one step late, so that the host never waits for the device
            if step % config.log_every == 0 or step == config.steps:
                metrics.write()
            results = {}
            for name, (every, hook) in hooks.items():
                if step % every == 0 or step == config.steps:
                    with metrics.paused():
                        results[name] = hook(run, state, step)
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
        print(f"stopped after step {metrics.step:,}; run the same command to resume")
        return 128 + stop[0]
    return finish(config, hooks, run, state, f"{run.folder}")


def finish(config: Config, hooks: Hooks, run: Run, state: TrainState, note: str) -> int:
    """Write the loss curve, and the last picture if a kill has prevented it; returns the exit code."""
    missing = is_main_process() and not run.picture(config.steps).exists()
    if "samples" in hooks and distributed.broadcast_from_main(missing):
        hooks["samples"][1](run, state, config.steps)
    run.write_loss_curve()
    written = ", ".join(name for name in ("samples/", "loss.png") if (run.folder / name).exists())
    vae = " --vae ft-mse" if config.dataset == "latents" and not config.vae else ""
    note += f" ({written})" if written else ""
    print(f"done      {note}; draw samples with: {cli.script('sample')} {run.folder}{vae}")
    return 0


def summary(config: Config, dataset: sources.Source, step: AbstractStep, name: str) -> str:
    """The lines that a run prints first."""
    shape, epochs = "x".join(map(str, dataset.image_shape)), config.steps * config.batch_size / len(dataset)
    kind = "latents" if dataset.latents else "images"
    undrawn = dataset.latents and config.sample_every and not config.vae
    derivative = "attention by XLA, which has the forward derivative that mean velocities need\n"
    return (
        f"model     DiT of {costs.parameters(config.model):,} parameters, {costs.describe_macs(config.model)},"
        f" {config.model.num_tokens} tokens, {config.dtype}\n"
        f"{derivative if config.is_mean else ''}{step.summary()}\n"
        f"data      {name}: {len(dataset):,} {kind} of {shape}, {config.model.num_classes} classes\n"
        f"steps     {config.steps:,} of {config.batch_size} {kind} ({epochs:,.1f} epochs)\n"
        f"run       {config.run}{'; no pictures, which need --vae to decode latents' if undrawn else ''}"
    )


def main() -> int:
    """Run the command line; a mistake is one sentence and exit code 2."""
    return cli.run(cli.script("train"), lambda: train(**flags.parse(sys.argv[1:])), out_of_memory=f"try {REMEDY}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C just ends
    sys.exit(main())
