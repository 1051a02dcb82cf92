"""Train a class-conditional diffusion transformer: `train.py [preset] [--field value ...]`.

Top to bottom: command line, data, the step compiled from shapes, run folder, state, loop. A run
is a folder; started again, it goes on from its newest checkpoint exactly as if it had never stopped.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C just ends
    # Read by JAX as it is imported: compiled programs are kept for the next start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "ditx" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, install_import_hook
from tqdm import tqdm

with install_import_hook("ditx", "beartype.beartype"):
    from ditx import costs, pictures
    from ditx.data import loader, sources
    from ditx.diffusion.objective import make_objective
    from ditx.evaluation.evaluate import draw_labels, make_fid
    from ditx.evaluation.features import FeatureNetwork
    from ditx.evaluation.reference import Reference, read_reference
    from ditx.kernels.block import KernelConfig
    from ditx.nn.dit import DiT, DiTConfig
    from ditx.parallel.compile import compile_checked, compiler_options, tune_malloc
    from ditx.parallel.distributed import (
        assert_same_everywhere,
        broadcast_from_main,
        end,
        exit_if_peer_dies,
        initialize,
        is_main_process,
        stop_signals,
        sync_errors,
        synced_batches,
    )
    from ditx.parallel.fsdp import bytes_per_device, table, with_shardings
    from ditx.parallel.mesh import (
        batch_sharding,
        check_batch,
        check_mesh,
        local_batch_indices,
        make_mesh,
        put_batch,
        replicated,
    )
    from ditx.sampling import Decode, make_decode, make_sampler
    from ditx.training import checkpoint
    from ditx.training import run as runs
    from ditx.training.config import CHANGEABLE_ON_RESUME, PRESETS, Config, check, power_ema_gammas
    from ditx.training.logger import MetricsLogger, Profiler
    from ditx.training.step import TrainState, adamw, train_step
    from ditx.weights import pretrained
    from ditx.weights.frozen import load_decoder, load_inception
    from ditx.weights.pretrained import describe_initial

# Of too little memory.
REMEDY = "--remat full, a higher --accumulate, --mesh.fsdp, or a smaller --batch-size"


def parse(argv: list[str]) -> tuple[str, Config]:
    """The preset's name and the configuration. Raises ValueError for an unknown preset; exits with 2 on a bad flag."""
    preset, flags = ("digits", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; choose {', '.join(PRESETS)}")
    usage = f"Train a diffusion transformer. Presets: {', '.join(PRESETS)}; below, the fields and defaults of {preset}."
    config = tyro.cli(Config, default=PRESETS[preset], args=flags, prog=f"train.py {preset}", description=usage)
    return preset, replace(config, run=config.run or f"runs/{preset}")


def fitted(config: Config, preset: str, seen: sources.Source) -> DiTConfig:
    """The model, with the data's number of classes and channels wherever no flag has set these."""
    size, (height, width, channels) = config.model.input_size, seen.image_shape
    if (height, width) != (size, size):
        raise ValueError(f"the images are {height}x{width}, model.input_size is {size}; make the two agree")
    found, usual = {"num_classes": len(seen.class_names), "in_channels": channels}, PRESETS[preset].model
    if config.model.num_classes == 0:
        del found["num_classes"]  # of which the network is told nothing
    for name, value in found.items():
        if getattr(config.model, name) not in (value, getattr(usual, name)):
            raise ValueError(f"model.{name} is {getattr(config.model, name)}, but the data has {value}")
    return replace(config.model, **found)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW at the configured learning rate."""
    constant = config.decay == "constant"
    decay = optax.constant_schedule(1.0) if constant else optax.cosine_decay_schedule(1.0, config.steps)

    def rate(step):
        return config.learning_rate * decay(step) * jnp.minimum(1, (step + 1) / max(config.warmup, 1))

    return adamw(rate, beta2=config.beta2, weight_decay=config.weight_decay)


def read_decoder(config: Config, seen: sources.Source, mesh: Mesh) -> Decode | None:
    """What decodes latents, where the data are latents."""
    if seen.latents is None:
        return None
    vae, _ = load_decoder(config.vae, config.model.in_channels, seen.latents["scale"])
    return make_decode(vae, mesh)


def open_reference(config: Config, seen: sources.Source) -> tuple[Reference, FeatureNetwork] | None:
    """What FIDs compare with, if any are to be computed. Raises ValueError if it does not fit the data."""
    if not config.eval_every:
        return None
    reference = read_reference(Path(config.eval_stats))
    if reference.pool is None:
        raise ValueError(
            f"{config.eval_stats} has images alone; make statistics of them with ditx evaluate --make-stats"
        )
    network = reference.classifier or load_inception(config.eval_inception)[0]
    features = FeatureNetwork(network, reference.resize)
    side = seen.latents["image_size"] if seen.latents else 0
    reference.check(features, (side, side, 3) if seen.latents else seen.image_shape)
    return reference, features


def make_picture(config: Config, seen: sources.Source, mesh: Mesh) -> Callable[[DiT, Path], None] | None:
    """The function that writes samples of averaged weights: the same noise and up to ten classes every time."""
    if not config.sample_every or (seen.latents and not config.vae):
        return None
    num_classes = config.model.num_classes
    columns = min(num_classes, 10) or 10
    labels = np.resize(np.linspace(0, max(num_classes - 1, 0), columns).astype(np.int32), 4 * columns)
    decode = read_decoder(config, seen, mesh)
    # The default block function: the averaged weights are float32.
    sampler = make_sampler(config.sampling, config.model, config, mesh, batch_size=len(labels), decode=decode)

    def picture(ema, path):
        try:
            images = sampler(ema, labels, seed=config.seed)
        except ValueError as error:  # Training may still recover.
            print(f"warning: no {path.name}: {error}", file=sys.stderr)
            return
        if is_main_process():
            path.parent.mkdir(exist_ok=True)
            pictures.grid(images, columns).save(path)

    return picture


@dataclass(frozen=True)
class Step:
    """The training step, and the shapes and places of all that goes in and out of it."""

    function: Callable[..., tuple[TrainState, dict[str, Array]]]
    create: Callable[..., TrainState]
    """the state before the first step, of the key `init_key`"""
    init_key: Array
    key: Array
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    sums: dict[str, np.ndarray]
    """zeros, to sum up in what a step returns"""
    places: Any
    """where the state lies"""

    def compiled(self, mesh: Mesh, compute: KernelConfig) -> jax.stages.Compiled:
        """The program of all processes. Raises ValueError where it takes more memory than a device has."""
        options = compiler_options(mesh, fp8=compute.matmul_dtype == "fp8")
        jitted = jax.jit(self.function, donate_argnums=0, out_shardings=(self.places, None), compiler_options=options)
        with sync_errors():
            program, took, needed = compile_checked(jitted, self.state, self.batch, self.key, remedy=REMEDY)
        print(f"compiled in {took:.1f} s; a step takes {needed / 2**20:,.1f} MiB on each device", flush=True)
        return program


def make_step(config: Config, latent: bool, mesh: Mesh) -> Step:
    """The step of a configuration that fits its data; nothing is compiled or allocated yet."""
    optimizer, size = make_optimizer(config), config.model.input_size
    function = partial(
        train_step,
        objective=make_objective(config),
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        ema_gammas=power_ema_gammas(config),
        dtype=jnp.dtype(config.dtype),
        unroll=config.unroll,
        remat=config.remat,
        apply_block=config.apply_block(),
        accumulate=config.accumulate,
        mesh=mesh,
    )
    init_key, key = jax.jit(lambda: jax.random.split(jax.random.key(config.seed)), out_shardings=replicated(mesh))()
    create = partial(TrainState.create, config.model, optimizer, power_emas=len(power_ema_gammas(config)))
    state = with_shardings(jax.eval_shape(lambda key: create(key=key), init_key), mesh)
    rows = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    shape = (config.batch_size, size, size, config.model.in_channels)
    batch = {"x": rows(shape, jnp.float16 if latent else jnp.float32), "y": rows(shape[:1], jnp.int32)}
    if latent:
        batch["std"] = rows(shape, jnp.float16)
    terms = jax.eval_shape(function, state, batch, key)[1]
    sums = {"count": np.zeros(())} | {name: np.zeros(term.shape) for name, term in terms.items()}
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Step(function, create, init_key, key, state, batch, sums, places)


def train(preset: str, config: Config) -> int:
    """Check everything that a user can get wrong, then run to the last step, or to a signal; returns the exit code.

    First the data is opened, then the step is compiled.
    """
    initialize(config.distributed)
    with sync_errors():
        check(config)
        source = seen = sources.open_dataset(config.dataset, config.data_path, config.model.input_size)
        config = replace(config, model=fitted(config, preset, seen))
        check(config)
        tune_malloc()
        mesh = make_mesh(config.mesh)
        check_mesh(mesh, num_heads=config.model.num_heads, mlp_size=config.model.mlp_size)
        config.check_kernels(mesh, config.dtype, config.model)
        check_batch(mesh, config.batch_size, config.accumulate)
        compared = open_reference(config, seen)
        if config.init_from and not checkpoint.steps(Path(config.run) / "checkpoints"):
            describe_initial(Path(config.init_from), config.model)
    described: dict[str, Any] = {
        "preset": preset,
        **asdict(config),
        "class_names": seen.class_names[: config.model.num_classes],
        **({"latents": seen.latents} if seen.latents else {}),
    }
    assert_same_everywhere({name: value for name, value in described.items() if name not in ("data_path", "processes")})
    free, run = CHANGEABLE_ON_RESUME | ({"steps"} if config.decay == "constant" else set()), Path(config.run)
    done = False
    with sync_errors():
        if is_main_process():
            runs.check_run(run, described, free=free)
            done = config.steps <= max(checkpoint.steps(run / "checkpoints"), default=0)
    options = compiler_options(mesh, fp8=config.matmul_dtype == "fp8")
    print(
        f"model    DiT of {costs.parameters(config.model):,} parameters, {costs.macs(config.model) / 1e9:.3f} G"
        f" multiply-adds, {config.model.num_tokens} tokens, schedule {config.schedule}, output {config.prediction}\n"
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}"
        f" ({', '.join(f'{axis} {count}' for axis, count in mesh.shape.items())}), computing in {config.dtype}"
        f"{''.join(f', {name}={value}' for name, value in options.items())}",
        flush=True,
    )
    step = make_step(config, seen.latents is not None, mesh)
    if mesh.size > 1:
        print(table(step.state.model))
    held = {"weights": step.state.model, "average": (step.state.ema, step.state.power_emas)}
    held |= {"moments": step.state.opt_state}
    shares = ", ".join(f"{name} {bytes_per_device(part) / 2**20:,.1f}" for name, part in held.items())
    print(f"holds    {bytes_per_device(step.state) / 2**20:,.1f} MiB on each device: {shares}", flush=True)
    # A run that is done needs no program.
    program = None if broadcast_from_main(done) else step.compiled(mesh, config)

    with sync_errors():
        described["data_checksum"] = source.checksum
    assert_same_everywhere(described["data_checksum"])
    with ExitStack() as stack:
        with sync_errors():
            if is_main_process():
                stack.enter_context(runs.open_run(run, described, free=free))
        token = str(broadcast_from_main(time.time_ns() % 2**31))
        with sync_errors():
            if is_main_process():
                runs.write(run / "shared", token)
        with sync_errors():
            if not (run / "shared").exists() or (run / "shared").read_text() != token:
                raise ValueError(f"{run} is not where the first process made it; give a --run that all processes share")
        undrawn = seen.latents and config.sample_every and not config.vae
        size = "x".join(map(str, source.image_shape))
        print(
            f"data     {config.dataset}: {len(source):,} images of {size}, {config.model.num_classes} classes\n"
            f"plan     {config.steps:,} steps of {config.batch_size} images"
            f" ({config.steps * config.batch_size / len(source):,.1f} epochs)\n"
            f"writes   {run}" + ("; no pictures, for which latents need --vae" if undrawn else ""),
            flush=True,
        )
        return fit(config, seen, source, mesh, step, program, compared)


def fit(
    config: Config,
    seen: sources.Source,
    source: sources.Source,
    mesh: Mesh,
    built: Step,
    program: jax.stages.Compiled | None,
    compared: tuple[Reference, FeatureNetwork] | None = None,
) -> int:
    """Train in a folder that is this run's, and locked; returns the exit code."""
    run = Path(config.run)
    checkpoints, loss_picture, time_picture = (run / name for name in ("checkpoints", "loss.png", "loss-by-time.png"))

    # State: read where it is to live, or born there.
    parts = [part.name for part in fields(TrainState) if jax.tree.leaves(getattr(built.state, part.name))]
    wanted, sums = {part: getattr(built.state, part) for part in parts}, built.sums
    restored = checkpoint.load_newest(checkpoints, wanted | {"window": sums})
    if restored is None:
        with sync_errors():
            reached = max((line["step"] for line in runs.read_metrics(run)), default=0)
            # The second save waits for the first, so that a kill alone cannot lead here.
            if reached >= 2 * config.checkpoint_every or loss_picture.exists():
                raise ValueError(
                    f"{run} has come to step {reached:,} but has no checkpoint; bring back {checkpoints}, or choose"
                    " another --run"
                )
        begun = jax.jit(lambda key: built.create(key=key), out_shardings=built.places)(built.init_key)
        start, state, note = 0, begun, "random weights"
        if config.init_from:
            with sync_errors():
                model, note = pretrained.load_initial(Path(config.init_from), state.model, mesh)
            averages = [jax.tree.map(jnp.copy, model) for _ in range(1 + len(state.power_emas))]
            state = replace(state, model=model, ema=averages[0], power_emas=tuple(averages[1:]))
        print(f"begins   from {note}", flush=True)
    else:
        start, trees, damaged = restored
        state, sums = TrainState(**{part: trees[part] for part in parts}), jax.tree.map(np.asarray, trees["window"])
        for step, sentence in damaged:
            aside = checkpoint.quarantine(checkpoints, step)
            print(f"warning: {sentence}; moved to {aside}, going back to step {start:,}", file=sys.stderr)
        print(f"goes on  from step {start:,}", flush=True)
    draw_picture, fid_of = make_picture(config, seen, mesh), None
    if compared:
        reference, features = compared
        unguided, count = replace(config.sampling, guidance_scale=1.0), config.eval_samples
        decode = read_decoder(config, seen, mesh)
        sampler = make_sampler(unguided, config.model, config, mesh, batch_size=min(128, count), decode=decode)
        labels = draw_labels(config.model.num_classes, count, config.seed)
        fid_of = make_fid(sampler, labels, config.seed, features, reference, mesh)

    def finish(state):
        """Write the pictures of the last step, where they are missing."""
        missing, last = [], run / "samples" / f"step-{config.steps:07d}.png"
        with sync_errors():
            missing = [path for path in (last, loss_picture, time_picture) if is_main_process() and not path.exists()]
        if draw_picture and broadcast_from_main(last in missing):
            draw_picture(state.ema, last)
        lines = [line for line in runs.read_metrics(run) if missing and "loss" in line]
        names = ("step", "loss", "loss_by_time", "count_by_time")
        steps, losses, by_time, counts = (np.array([line[name] for line in lines], np.float64) for name in names)
        if loss_picture in missing:
            pictures.loss_curve(steps, losses).save(loss_picture)
        if time_picture in missing:
            pictures.loss_by_time(by_time, counts).save(time_picture)

    # In half precision, and whole in each process.
    halves = jax.jit(partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float16)), out_shardings=replicated(mesh))

    def store(power_emas, step):
        """Write the averages of this step, unless a run that was killed since has done so."""
        for length, average in zip(config.ema_lengths, power_emas, strict=True):
            file, half = runs.average_file(run, step, length), halves(average)
            if is_main_process() and not file.exists():
                file.parent.mkdir(exist_ok=True)
                pretrained.write(file, half, pretrained.Description.of(runs.read_config(run), run), np.float16)

    if start >= config.steps:
        finish(state)
        print(f"{run} has all its {config.steps:,} steps; draw from it with sample.py, or train anew in another --run")
        return 0

    program = program or built.compiled(mesh, config)  # for a run that was done, but has lost its last checkpoint
    with sync_errors():
        if is_main_process():
            # Of a shorter run that now goes on, and of a kill.
            for file in (loss_picture, time_picture, *run.glob("averages/*.partial")):
                file.unlink(missing_ok=True)
            runs.trim_metrics(run, start)
    batches = loader.batches(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        flip=config.flip,
        start=start,
        rows=local_batch_indices(mesh, config.batch_size),
        workers=config.workers,
    )
    monitor = MetricsLogger(
        run,
        sums,
        step=start,
        batch_size=config.batch_size,
        seed=config.seed,
        max_skipped=config.max_skipped,
        wandb=config.wandb,
        config=asdict(config),
    )
    manager = checkpoint.Checkpoints(
        checkpoints,
        keep=config.keep,
        keep_every=config.keep_every,
        keep_best=max(config.keep_best, config.eval_every > 0),
        best="fid" if config.eval_every else "loss",
        described=runs.read_config(run),
    )
    bar = tqdm(
        total=config.steps,
        initial=start,
        disable=None if is_main_process() else True,  # None: where nobody watches; lines are printed instead
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    )
    with (
        stop_signals() as stopped,
        closing(batches),
        closing(manager),
        closing(monitor),
        closing(Profiler(run / "profile", start + 1, config.steps, config.profile_steps)) as profile,
        bar,
        exit_if_peer_dies(),
    ):
        pending, failure, step, saved, due = None, None, start, start, False
        feed = synced_batches(monitor.waiting(batches), mesh, stopped)

        def settle():
            """Count what the last step returned, which is read late, so that the host does not wait at every step."""
            nonlocal pending
            if pending is not None:
                terms, pending = jax.device_get(pending), None
                monitor.add(step, terms)

        def save(fid=None):
            nonlocal saved
            settle()
            trees = {part: getattr(state, part) for part in parts} | {"window": monitor.sums}
            manager.save(step, trees, metrics={"loss": monitor.mean_loss(), "fid": fid})
            saved = step

        while step < config.steps:
            try:
                batch = next(feed)
            except StopIteration:
                break
            except (ValueError, OSError) as error:  # an image that cannot be read: what was trained is kept
                failure = error
                break
            profile.before(step + 1)
            batch = put_batch(batch, mesh, local_batch_indices(mesh, config.batch_size), config.batch_size)
            state, terms = program(state, batch, built.key)
            settle()
            step, pending = step + 1, terms
            profile.after(step, terms)
            speed = monitor.measure(step)
            loss = monitor.mean_loss()
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                settle()
                line = monitor.write(step)
                if bar.disable:
                    left = (config.steps - step) * config.batch_size / monitor.speed
                    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
                    print(f"step {step:,}  loss {loss}  {monitor.speed:.0f} images/s  {left:.0f} s left", flush=True)
            if config.ema_every and (step % config.ema_every == 0 or step == config.steps):
                settle()
                with monitor.paused(step):
                    store(state.power_emas, step)
            fid = None
            if fid_of and (step % config.eval_every == 0 or step == config.steps):
                settle()
                with monitor.paused(step):
                    fid = fid_of(state.ema)
                monitor.note(step, fid=fid)
                bar.write(f"step {step:,}  FID {fid:.4f} of {config.eval_samples:,} samples")
            due |= step % config.checkpoint_every == 0 or fid is not None
            if due:
                settle()
                if not monitor.consecutive_skips:  # else the newest checkpoint stays the one from before
                    save(fid)
                    due = False
            if draw_picture and step % config.sample_every == 0:
                settle()
                with monitor.paused(step):
                    picture = run / "samples" / f"step-{step:07d}.png"
                    draw_picture(state.ema, picture)
                    if picture.exists():
                        monitor.show(step, picture)
        if saved < step:
            save()
        if failure:
            raise failure
    if stopped and step < config.steps:
        print(f"stopped after step {saved:,}; the same command goes on from there")
        return 128 + stopped[0]
    finish(state)
    print(f"done     {run}/samples, {loss_picture}; draw more with: sample.py {run}")
    return 0


def main() -> int:
    """Run the command line; a user's mistake ends in one sentence and exit code 2."""
    try:
        return train(*parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return end(2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0][:200]
        print(f"train.py: the devices have too little memory ({line}); try {REMEDY}", file=sys.stderr)
        return end(2)
    except KeyboardInterrupt:
        return end(130)


if __name__ == "__main__":
    sys.exit(main())
