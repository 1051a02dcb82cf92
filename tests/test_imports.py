import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ditx").rglob("*.py"))
SCRIPTS = [path for path in (ROOT / "train.py", ROOT / "sample.py") if path.exists()]
HOMES = {
    "grain": {"ditx/data/loader.py"},
    "array_record": {"ditx/data/latents.py"},
    "orbax": {"ditx/training/checkpoint.py"},
    "optax": {"ditx/training/step.py"},
    "hypothesis": {"ditx/testing.py"},
}
# Rooms from the bottom up. A file imports its own room and the rooms on lines above its own.
ROOMS = [
    {"checks", "files", "pickles"},
    {"nn", "diffusion"},
    {"kernels", "parallel", "testing"},
    {"cli", "pictures", "sampling"},
    {"training"},
    {"data", "costs"},
    {"weights", "flags"},
    {"evaluation"},
    {"train", "sample"},
    {"commands"},
]


def imports(path):
    """Absolute names of all that a file imports, at whatever depth; `from a import b` counts as a and a.b."""
    names = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] in ("ditx", "train", "sample")}


def within(names, package):
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def brings(path, library):
    """Whether a file takes a library from a module of ours that imports it."""
    return any(name.startswith("ditx.") and name.endswith(f".{library}") for name in imports(path))


def relative(path):
    return path.relative_to(ROOT).as_posix()


def room(parts):
    """The room of a module or file, by the parts of its name; None outside ditx and its scripts."""
    if parts[0] == "ditx":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ("train", "sample") else None


def rooms(path):
    """The rooms that a file imports."""
    return {room(name.split(".")) for name in imports(path)} - {None}


def test_the_walk_sees_imports():
    assert "ditx.nn.dit" in imports(ROOT / "ditx/weights/convert.py")
    assert any(name.startswith("grain") for name in imports(ROOT / "ditx/data/loader.py"))
    assert {"nn", "files"} <= rooms(ROOT / "ditx/weights/convert.py") | rooms(ROOT / "ditx/weights/files.py")


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: relative(path))
def test_imports_point_down(path):
    own = room(path.relative_to(ROOT).with_suffix("").parts)
    if own in ("__init__", "__main__"):
        return
    level = next(level for level, names in enumerate(ROOMS) if own in names)
    below = set().union(*ROOMS[:level]) | {own}
    exported = {"__version__", "DIT_CONFIGS", "DiT", "DiTConfig"}
    assert rooms(path) - exported <= below, f"{relative(path)} imports {sorted(rooms(path) - exported - below)}"


@pytest.mark.parametrize("package", ["nn", "diffusion"])
def test_networks_and_diffusion_import_only_themselves_and_the_checks(package):
    for path in (ROOT / "ditx" / package).rglob("*.py"):
        others = rooms(path) - {package, "checks"}
        assert not others, f"{relative(path)} imports {sorted(others)}"
        assert "ditx" not in ours(path), f"{relative(path)} imports the whole package"


def test_metrics_import_nothing_of_ours():
    assert not ours(ROOT / "ditx/evaluation/metrics.py")


@pytest.mark.parametrize("library", sorted(HOMES))
def test_heavy_libraries_stay_in_their_files(library):
    users = {relative(path) for path in FILES + SCRIPTS if within(imports(path), library) or brings(path, library)}
    assert users <= HOMES[library]


def test_annotations_stay_objects_that_can_be_checked():
    for path in FILES + SCRIPTS:
        assert "__future__.annotations" not in imports(path), relative(path)


def test_import_is_light():
    code = "import sys, ditx; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "jax" in loaded
    assert not loaded & {"grain", "orbax", "optax", "tyro", "PIL", "beartype"}
