import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ditx").rglob("*.py"))
SCRIPTS = [path for path in (ROOT / "train.py", ROOT / "sample.py") if path.exists()]
HOMES = {
    "grain": {"ditx/data.py"},
    "array_record": {"ditx/latents.py"},
    "orbax": {"ditx/checkpoint.py"},
    "optax": {"ditx/training.py", "train.py"},
}


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


def test_the_walk_sees_imports():
    assert "ditx.nn.dit" in imports(ROOT / "ditx/convert.py")
    assert any(name.startswith("grain") for name in imports(ROOT / "ditx/data.py"))


@pytest.mark.parametrize("package", ["nn", "diffusion"])
def test_networks_and_diffusion_import_nothing_of_ours_but_themselves(package):
    for path in (ROOT / "ditx" / package).rglob("*.py"):
        outside = ours(path) - within(ours(path), f"ditx.{package}") - {"ditx"}
        assert not outside, f"{relative(path)} imports {sorted(outside)}"
        assert "ditx" not in ours(path), f"{relative(path)} imports the whole package"


def test_metrics_import_nothing_of_ours():
    assert not ours(ROOT / "ditx/metrics.py")


@pytest.mark.parametrize("library", sorted(HOMES))
def test_heavy_libraries_stay_in_their_files(library):
    users = {relative(path) for path in FILES + SCRIPTS if within(imports(path), library) or brings(path, library)}
    assert users <= HOMES[library]


def test_the_library_does_not_import_its_commands_or_scripts():
    for path in FILES:
        if path.parent.name == "commands" or path.name == "__main__.py":
            continue
        upward = within(ours(path), "ditx.commands") | within(ours(path), "train") | within(ours(path), "sample")
        assert not upward and not within(imports(path), "tyro"), f"{relative(path)} imports what is above it"


def test_annotations_stay_objects_that_can_be_checked():
    for path in FILES + SCRIPTS:
        assert "__future__.annotations" not in imports(path), relative(path)


def test_import_is_light():
    code = "import sys, ditx; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "jax" in loaded
    assert not loaded & {"grain", "orbax", "optax", "tyro", "PIL", "beartype"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 330
