"""The built package: what it holds, and that it installs and runs outside this checkout."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ditx

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def test_wheel_holds_code_assets_and_licences(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--installer", "uv", "--outdir", tmp_path, ROOT], check=True)
    assert list(tmp_path.glob("*.tar.gz"))
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ditx").rglob("*.py")}
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "ditx/assets").iterdir()}
    scripts = {"ditx/scripts/train.py", "ditx/scripts/sample.py"}
    assert sources | assets | scripts | {"ditx/py.typed"} <= names
    licences = {Path(name).name for name in names if "dist-info/licenses/" in name}
    assert licences == {"LICENSE", *(path.name for path in (ROOT / "ditx/assets").glob("LICENSE-*"))}


def test_pip_installs_a_clone_that_runs_elsewhere(tmp_path):
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT], check=True)
    # The dependencies are those of this environment. A path in a .pth file is added without the .pth files in it, so
    # that its editable ditx stays out.
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    command = [python, "-c", "import ditx; print(ditx.__version__, ditx.__file__)"]
    version, file = subprocess.check_output(command, cwd=tmp_path, text=True).split()
    assert version == ditx.__version__ and Path(file).is_relative_to(tmp_path)
    for arguments, words in (
        (["--help"], "evaluate"),
        (["train", "--help"], "--batch-size"),
        (["sample", "-h"], "--guide"),
    ):
        command = [tmp_path / "env/bin/ditx", *arguments]
        usage = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert usage.returncode == 0 and words in usage.stdout, usage.stderr
