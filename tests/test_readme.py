"""The examples of the README and of the rooms' pages run; the commands, flags and files that they name exist."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("ditx/*/*.md")])
}
ROOMS = sorted(path.parent.name for path in ROOT.glob("ditx/*/__init__.py"))


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def run_examples(page):
    """Execute the Python blocks of a page in one namespace, which is returned."""
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def commands(page):
    """Commands of ditx in a page: a script or verbs, and the arguments."""
    for block in re.split(r"^```.*\n", PAGES[page], flags=re.MULTILINE)[1::2]:
        for line in block.replace("\\\n", " ").splitlines():
            command = re.search(
                r"\b(train|sample)\.py\b(.*)|\bditx (bench train|bench sample|[a-z]+) (.*)", line.split(" #")[0]
            )
            if command and line.startswith((" ", "uv", "srun", "mpirun", "gcloud")) and "import" not in line:
                yield command[1] or command[3], (command[2] or command[4] or "").replace('"', "").split()


def test_every_room_has_a_page_that_the_readme_links():
    for room in ROOMS:
        assert f"ditx/{room}/README.md" in PAGES, room
        assert f"(ditx/{room}/README.md)" in PAGES["README.md"], room


@pytest.mark.slow
def test_library_example():
    names = run_examples("README.md")
    # The output of a new network is zero, so the loss is the mean square of the noise plus a small variational term.
    assert 0.9 < float(names["loss"]) < 1.2
    assert names["image"].shape == (32, 32, 4) and np.isfinite(names["image"]).all()
    assert names["states"].shape == (250, 32, 32, 4)


@pytest.mark.slow
def test_single_pieces_train_in_another_loop():
    names = run_examples("ditx/diffusion/README.md")
    # The data have mean 0.5 and standard deviation 0.1; samples of an untrained block have mean 0.
    assert names["samples"].shape == (4, 4, 16)
    assert abs(float(names["samples"].mean()) - 0.5) < 0.05 and float(names["samples"].std()) < 0.2
    with pytest.raises(AssertionError, match=r"the order of convergence is 0\.98, not 2"):
        names["check_order"](names["my_step"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("room", [room for room in ROOMS if room != "diffusion"])
def test_example_of_a_room(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_examples(f"ditx/{room}/README.md").keys() - {"__builtins__"}


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page):
    folder, prose = (ROOT / page).parent, re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    named = re.findall(r"(?<![\w/.])(?:ditx|tests)/[\w./*-]*\w", PAGES[page])
    links = re.findall(r"(?:\]\(|src=\")(?!http)([^)\"]+)", prose)
    links += re.findall(r"^\| `(\w+\.py)` \|", prose, re.MULTILINE)
    missing = [name for name in named if not list(ROOT.glob(name))]
    missing += [name for name in links if not (folder / name).exists()]
    assert not missing
