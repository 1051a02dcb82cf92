"""Periodic work of a training run: pictures, FID, stored averages of the weights."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditx import pictures
from ditx.data.sources import Source
from ditx.evaluation.evaluate import compute_metrics, draw_labels
from ditx.evaluation.features import FeatureStore, make_feature_extractor
from ditx.evaluation.reference import read_reference
from ditx.parallel.distributed import is_main_process
from ditx.parallel.mesh import replicated
from ditx.sampling import Decode, make_decode, make_sampler
from ditx.training import run as runs
from ditx.training.config import Config
from ditx.training.run import Run
from ditx.training.step import TrainState
from ditx.weights import frozen, pretrained

Hooks: TypeAlias = dict[str, tuple[int, Callable[[Run, TrainState, int], Any]]]
"""By name, the interval in steps and `hook(run, state, step)`; each is also called after the last step."""


def make_hooks(config: Config, mesh: Mesh, dataset: Source) -> Hooks:
    """The hooks that a configuration asks for. Raises ValueError where they do not fit the data."""
    hooks, decode = {}, None
    if dataset.latents and config.vae:
        vae, _ = frozen.load_decoder(config.vae, config.model.in_channels, dataset.latents["scale"])
        decode = make_decode(vae, mesh)
    if config.sample_every and (decode or not dataset.latents):
        hooks["samples"] = config.sample_every, make_grid(config, mesh, dataset, decode)
    if config.eval_every:
        hooks["fid"] = config.eval_every, make_eval(config, mesh, dataset, decode)
    if config.ema_every:
        hooks["averages"] = config.ema_every, make_averages(config, mesh)
    return hooks


def make_grid(
    config: Config, mesh: Mesh, dataset: Source, decode: Decode | None
) -> Callable[[Run, TrainState, int], Path | None]:
    """A picture of samples of the averaged weights: up to ten classes, four of each, the same noise every time."""
    count = min(config.model.num_classes, 10) or 10
    labels = np.tile(np.linspace(0, max(config.model.num_classes - 1, 0), count).astype(np.int32), 4)
    sampler = make_sampler(config.sampling, config.model, config, mesh, batch_size=len(labels), decode=decode)

    def draw(run: Run, state: TrainState, step: int) -> Path | None:
        try:
            images = sampler(state.ema, labels, seed=config.seed)
        except ValueError as error:  # training may still recover
            return print(f"warning: no picture of step {step:,}: {error}", file=sys.stderr)
        if is_main_process():
            run.picture(step).parent.mkdir(exist_ok=True)
            pictures.grid(images, labels, dataset.class_names).save(run.picture(step))
            if (left := config.start_left(step)) > 0.01:
                print(f"picture   step {step:,}: {left:.0%} of the averaged weights is still the start", flush=True)
        return run.picture(step)

    return draw


def make_eval(
    config: Config, mesh: Mesh, dataset: Source, decode: Decode | None
) -> Callable[[Run, TrainState, int], float]:
    """FID of samples of the averaged weights, without guidance. Raises ValueError where the reference does not fit."""
    reference = read_reference(Path(config.eval_stats))
    if reference.pool is None or reference.resize is None:
        raise ValueError(
            f"{config.eval_stats} has only images, or does not record how images were resized; make statistics with"
            " ditx evaluate --make-stats"
        )
    features, _ = reference.load_features(config.eval_inception)
    side = dataset.latents["image_size"] if dataset.latents else 0
    reference.check(features, (side, side, 3) if side else dataset.image_shape)
    unguided, count = replace(config.sampling, guidance_scale=1.0), config.eval_samples
    sampler = make_sampler(unguided, config.model, config, mesh, batch_size=min(128, count), decode=decode)
    labels = draw_labels(config.model.num_classes, count, config.seed)
    extract = make_feature_extractor(features, mesh)

    def fid(run: Run, state: TrainState, step: int) -> float:
        store = FeatureStore()
        for images in sampler.batches(state.ema, labels, seed=config.seed):
            store.add(extract(images))
        return compute_metrics(store, features, reference, ("fid",))[0]["fid"]

    return fid


def make_averages(config: Config, mesh: Mesh) -> Callable[[Run, TrainState, int], None]:
    """Stores the power-function EMAs in half precision, unless a killed run has stored them already."""
    halve = jax.jit(partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float16)), out_shardings=replicated(mesh))

    def store(run: Run, state: TrainState, step: int) -> None:
        for length, average in zip(config.ema_lengths, state.power_emas, strict=True):
            file, half = runs.average_file(run.folder, step, length), halve(average)
            if is_main_process() and not file.exists():
                file.parent.mkdir(exist_ok=True)
                description = pretrained.Description.of(
                    runs.read_config(run.folder), run.folder, config.model.own_block
                )
                pretrained.write(file, half, description, np.float16)

    return store
