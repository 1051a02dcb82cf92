"""The command line of train.py as a configuration: preset, flags, `--resume`, and a folder of images to fit to."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ditx import cli
from ditx.data import folders
from ditx.parallel import distributed
from ditx.parallel.compile import tune_malloc
from ditx.training import run as runs
from ditx.training.config import PRESETS, PRESETS_HELP, Config
from ditx.training.fit import Facts, fit_fields


def parse(argv: list[str]) -> dict[str, Any]:
    """The arguments of `train`: `preset`, the first word, and `config`, the preset's values changed by the flags.

    Raises ValueError for an unknown preset or a run that cannot be resumed so; exits with 2 on a bad flag.
    """
    parser = argparse.ArgumentParser(cli.script("train"), add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", default="")
    resume, argv = parser.parse_known_args(argv)
    preset, flags = cli.split_preset(cli.expand_model(argv), PRESETS, default="digits")
    default = replace(PRESETS[preset], run=f"runs/{preset}")
    if resume.resume:
        if flags != argv:
            raise ValueError(f"--resume takes the preset of {resume.resume}; leave out {preset}")
        described = runs.read_config(Path(resume.resume))
        own = " and ".join(f"{kind} {name}" for kind, name in described.get("own", {}).items() if name)
        if own:
            how = "resume it by the program that passes them"
            raise ValueError(f"{resume.resume} was trained by your own {own}; {how}")
        preset, default = described["preset"], replace(Config.of(described), run=resume.resume)
    usage = f"--help-verbose explains the flags; their defaults are those of {preset}. --model DiT-S/4 sets the sizes"
    usage += f" of a network by its name. --resume RUN goes on with a run.\n{PRESETS_HELP}"
    options: Any = {"prog": f"{cli.script('train')} {preset}", "description": usage, "compact_help": True}
    config = cli.parse(Config, default=default, args=flags, **options)
    if (preset, config.dataset, resume.resume) == ("images", "images", "") and config.data_path:
        if not (Path(config.run) / runs.CONFIG).exists():
            return {"preset": preset, "config": fit_to_images(config, cli.given_fields(flags))}
        # The same command resumes: the choices of its first start are in the run.
        chosen = replace(Config.of(runs.read_config(Path(config.run))), run=config.run)
        config = cli.parse(Config, default=chosen, args=flags, **options)
    return {"preset": preset, "config": config}


def fit_to_images(config: Config, given: set[str]) -> Config:
    """The configuration with all but the `given` fields fitted to images and devices; prints each choice."""
    distributed.initialize(config.distributed)
    tune_malloc()
    with distributed.sync_errors():
        folder = folders.find_images(config.data_path, quiet=True).undamaged(strict=config.strict)
        facts = Facts(len(folder.files), folder.median_side, jax.default_backend(), jax.device_count())
        config, lines = fit_fields(config, given, facts)
    head = f"fitted    to {facts.images:,} images and {facts.devices} x {facts.platform}; flags of your own win"
    print("\n".join([head, *lines]), flush=True)
    return config
