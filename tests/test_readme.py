"""The examples of the README and of the rooms' pages run; the commands, flags and files that they name exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from ditx.training.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("ditx/*/*.md")])
}
ROOMS = sorted(path.parent.name for path in ROOT.glob("ditx/*/__init__.py"))


def run_examples(page):
    """Execute the Python blocks of a page in one namespace, which is returned."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def commands(page):
    """Command lines of a page, each as `train`, `sample` or a verb of ditx, with its arguments."""
    for block in re.findall(r"```\n(.*?)```", PAGES[page], re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split(" #")[0]
            for script, rest in re.findall(r"\b(?:(train|sample)\.py|ditx [a-z]+)\b((?:(?!train\.py).)*)", line):
                yield script or re.search(r"\bditx ([a-z]+)\b", line)[1], rest.split()


def test_every_room_has_a_page_that_the_readme_links():
    for room in ROOMS:
        assert f"ditx/{room}/README.md" in PAGES, room
        assert f"(ditx/{room}/README.md)" in PAGES["README.md"], room


def test_library_example():
    names = run_examples("README.md")
    # The output of a new network is zero, so the loss is the mean square of the noise plus a small variational term.
    assert 0.9 < float(names["loss"]) < 1.2
    assert names["image"].shape == (32, 32, 4) and np.isfinite(names["image"]).all()
    assert names["states"].shape == (250, 32, 32, 4)


def test_single_pieces_train_in_another_loop():
    names = run_examples("ditx/diffusion/README.md")
    # The data have mean 0.5 and standard deviation 0.1; samples of an untrained block have mean 0.
    assert names["samples"].shape == (4, 4, 16)
    assert abs(float(names["samples"].mean()) - 0.5) < 0.05 and float(names["samples"].std()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("room", [room for room in ROOMS if room != "diffusion"])
def test_example_of_a_room(room):
    assert run_examples(f"ditx/{room}/README.md").keys() - {"__builtins__"}


def test_commands_have_their_flags(run):
    helps = {}
    for page in PAGES:
        for verb, arguments in commands(page):
            if verb not in helps:
                script = {"train": run.train, "sample": run.sample}.get(verb)
                code, helps[verb] = script("--help") if script else run.ditx(verb, "--help")
                assert code == 0, (page, verb)
            if verb == "train" and arguments and not arguments[0].startswith(("-", ".")):
                assert arguments[0] in PRESETS, (page, arguments)
            for flag in arguments:
                if flag.startswith("--") and flag != "--help":
                    assert re.search(rf"(?<![\w-]){flag}(?![\w.-])", helps[verb]), (page, verb, flag)


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page):
    folder, prose = (ROOT / page).parent, re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    named = re.findall(r"(?<![\w/.])(?:ditx|tests)/[\w./*-]*\w", PAGES[page])
    links = re.findall(r"(?:\]\(|src=\")(?!http)([^)\"]+)", prose)
    links += re.findall(r"^\| `(\w+\.py)` \|", prose, re.MULTILINE)
    missing = [name for name in named if not list(ROOT.glob(name))]
    missing += [name for name in links if not (folder / name).exists()]
    assert not missing
