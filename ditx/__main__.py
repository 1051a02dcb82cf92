"""The commands: `ditx VERB ...`, or `python -m ditx VERB ...`."""

import importlib
import runpy
import sys
from pathlib import Path

from ditx import checks, cli

VERBS = {
    "train": "train a network; train.py of a clone",
    "sample": "draw samples from a run or from released weights; sample.py of a clone",
    "bench": "time training and sampling on this machine, also against PyTorch",
    "convert": "convert weights: a run's, the authors' and diffusers', each into the others",
    "ema": "average the weights of a run over any length, after training",
    "evaluate": "FID, sFID, Inception Score, precision and recall of a run, of weights, or of images",
    "extract": "encode a folder of images into shards of latents to train on",
    "info": "parameters, multiply-adds and memory of a network; the paper's Table 4 beside our counts",
    "likelihood": "bits per dimension of images under a network of pixels",
    "study": "train and evaluate many networks alike: tables and plots of FID against cost",
}


def main() -> int:
    """Run one verb and return its exit code."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("train", "sample"):
        # The wheel carries the scripts beside this file; in a clone they are at the top.
        installed = Path(__file__).with_name("scripts")
        folder = installed if installed.is_dir() else Path(__file__).parents[1]
        sys.argv = [f"ditx {verb}", *arguments]
        runpy.run_path(str(folder / f"{verb}.py"), run_name="__main__")  # ends the process

    def call() -> int:
        if verb in ("-h", "--help"):
            print("usage: ditx VERB ... (ditx VERB --help lists the flags of a verb)\n")
            print("\n".join(f"  {name:<10}  {text}" for name, text in VERBS.items()))
            return 0
        if verb not in VERBS:
            raise checks.unknown("verb", verb, VERBS)
        return importlib.import_module(f"ditx.commands.{verb}").main(arguments)

    return cli.run("ditx" if verb not in VERBS else f"ditx {verb}", call)


if __name__ == "__main__":
    sys.exit(main())
