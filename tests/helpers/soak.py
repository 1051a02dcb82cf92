"""Kill a run of two processes at random moments, again and again, and see that nothing is lost.

`uv run python tests/helpers/soak.py --kills 50` takes about forty minutes on two cores. Every restart must go on from
the newest complete checkpoint, every line of metrics must be readable, and the final weights, moments and averages must
be, bit for bit, those of a run that nobody disturbed.
"""

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import resave
import scripts

from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import checkpoint

FLAGS = (
    "digits --model.hidden-size 16 --model.depth 1 --model.num-heads 8 --model.patch-size 14 --batch-size 8"
    " --sample-every 0 --log-every 4 --checkpoint-every 5 --distributed.heartbeat 10 --mesh.data 1 --mesh.fsdp -1"
).split()
SURVIVORS_END_WITHIN = 40  # seconds, of which the heartbeat is 10


def launch(run, steps, flags, devices):
    flags = [*FLAGS, *flags, "--steps", steps, "--run", run]
    return scripts.start_together(scripts.ROOT / "train.py", *flags, devices=devices)


def strike(distributed, run, rng, span):
    """Kill one process or both, at any moment within `span` seconds or while a checkpoint is being written.

    Says which, or None if the run was quicker.
    """
    before = set((run / "checkpoints").glob("*tmp*"))
    saves, wait = rng.choice([(0, rng.uniform(0, span)), (rng.randint(1, 4), rng.uniform(0, 0.2))])
    while wait > 0:
        if any(process.poll() is not None for process in distributed):
            return None
        time.sleep(0.01)
        now = set((run / "checkpoints").glob("*tmp*"))
        saves, before = saves - len(now - before), now
        wait -= 0.01 if saves <= 0 else 0
    which = rng.choice([[0], [1], [0, 1]])
    for index in which:
        distributed[index].send_signal(signal.SIGKILL)
    return which


def outputs_of(distributed, which):
    """What they have said, once they have ended: by themselves, where they were not killed."""
    if which is None:
        ended = [scripts.finish(process) for process in distributed]
        assert all(code == 0 for code, _ in ended), ended
        return [output for _, output in ended]
    end, outputs = time.monotonic() + SURVIVORS_END_WITHIN, []
    for process in distributed:
        try:
            outputs.append(process.communicate(timeout=max(1, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0])
            # To meet the others takes longer, and they had not begun.
            assert "Gloo" not in outputs[-1], outputs
    return outputs


def check_start(output, newest):
    """Whether a start has resumed; if it came that far, then from the newest complete checkpoint."""
    resumed = re.search(r"resume    from step ([\d,]+)\n", output)
    assert "moved to" not in output, output
    if resumed:
        assert int(resumed[1].replace(",", "")) == newest, (newest, output)
    elif "init " in output:
        assert newest == 0, (newest, output)
    return resumed is not None


def check_left(run):
    """What a kill has left: the newest complete checkpoint, and whether there is one half-written."""
    lines = run / "metrics.jsonl"
    for line in lines.read_text().splitlines() if lines.exists() else []:
        json.loads(line)
    folder = run / "checkpoints"
    return max(checkpoint.steps(folder), default=0), any(folder.glob("*tmp*"))


def arrays(run, step):
    """The state in a checkpoint, on one device."""
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return checkpoint.load(run / "checkpoints", step, resave.abstract_state(run, one))


def assert_same(run, other, step):
    a, b = arrays(run, step), arrays(other, step)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    written = [
        [(line["step"], line["loss"]) for line in map(json.loads, (each / "metrics.jsonl").read_text().splitlines())]
        for each in (run, other)
    ]
    assert written[0] == written[1], written


def soak(folder, *, kills, steps, seed, flags=(), devices=4, say=lambda line: None):
    """Disturb runs of `steps` steps with so many kills in all; returns what happened. Raises AssertionError."""
    rng, counts = random.Random(seed), dict.fromkeys(("kills", "of both", "half-written", "resumed", "runs"), 0)
    began = time.monotonic()
    outputs_of(launch(folder / "undisturbed", steps, flags, devices), None)
    span = time.monotonic() - began
    say(f"the undisturbed run took {span:.0f} s")
    while counts["kills"] < kills:
        run, newest, which = folder / f"disturbed-{counts['runs']}", 0, []
        while which is not None:
            distributed = launch(run, steps, flags, devices)
            which = strike(distributed, run, rng, span) if counts["kills"] < kills else None
            counts["resumed"] += check_start(outputs_of(distributed, which)[0], newest)
            if which is not None:
                before, (newest, half) = newest, check_left(run)
                assert newest >= before, f"checkpoint {before} is lost, {newest} is left"
                counts["kills"] += 1
                counts["of both"] += len(which) == 2
                counts["half-written"] += half
                say(f"kill {counts['kills']}, of {which}: checkpoint {newest} is left{' and a part of one' * half}")
        assert newest == 0 or counts["resumed"]
        if devices > 1:  # both processes write
            written = {file.name for file in (run / "checkpoints" / str(steps) / "model").iterdir()}
            assert {"ocdbt.process_0", "ocdbt.process_1"} <= written, written
        assert_same(run, folder / "undisturbed", steps)
        shutil.rmtree(run)
        counts["runs"] += 1
    return counts | {"seconds": round(time.monotonic() - began)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all (50)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (300)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, behind --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(
            Path(folder),
            kills=given.kills,
            steps=given.steps,
            seed=given.seed,
            flags=given.flags,
            say=lambda line: print(line, flush=True),
        )
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
