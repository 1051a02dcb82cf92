"""The commands: `ditx VERB ...`, or `python -m ditx VERB ...`."""

import importlib
import os
import sys
from pathlib import Path

VERBS = {
    "bench": "how fast this machine trains, draws, judges, encodes and reads, beside PyTorch, and by which choices",
    "convert": "weights of runs, of the authors and of diffusers, each into the others",
    "ema": "an average of a run's weights of any length, after training",
    "evaluate": "FID, sFID, Inception Score, precision and recall of a run, of weights, or of images",
    "extract": "a folder of images into shards of latents, to train on",
    "info": "parameters, multiply-adds and memory of a network; the paper's table beside our counts",
    "likelihood": "bits per dimension of images by a network of pixels",
    "study": "networks of many kinds, trained and judged alike: tables and plots of FID against what they cost",
}


def main() -> int:
    """Run one verb; a user's mistake ends in one sentence and exit code 2."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: ditx VERB ... (ditx VERB --help says more)\n")
        print("\n".join(f"  {name:<10}  {text}" for name, text in VERBS.items()))
        return 0
    if verb not in VERBS:
        print(f"ditx: there is no verb {verb!r}; choose {', '.join(VERBS)}", file=sys.stderr)
        return 2
    # Read by JAX as it is imported: compiled programs are kept for the next start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "ditx" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    try:
        return importlib.import_module(f"ditx.commands.{verb}").main(arguments)
    except (ValueError, OSError) as error:
        print(f"ditx {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
