"""The wheel, built through an sdist as a release is: it holds the whole tree, and installed it works without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run Python outside of the repository; its output, or a failure that shows it.

    Args:
        command: what follows ``python``.
        cwd: the folder to run in.
        path: the only entry of PYTHONPATH; by default there is none.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``python -m build`` makes: an sdist of the tree, then a wheel of that sdist alone."""
    # A copy: setuptools writes beside the sources, and an egg-info that lies there would tell it old file names.
    tree = tmp_path_factory.mktemp("build") / "tree"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "demo_out")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
    run("-m", "build", "--no-isolation", "--outdir", tree.parent / "dist", tree, cwd=tree.parent)
    made = sorted(path.name for path in (tree.parent / "dist").iterdir())
    assert [name.endswith(".tar.gz") for name in made].count(True) == 1, made
    (built,) = (tree.parent / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel alone is installed."""
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_holds_every_file_of_the_tree(wheel: Path) -> None:
    tree = {
        f"{shipped}/{path.relative_to(folder).as_posix()}"
        for folder, shipped in ((ROOT / "lowrank_fx", "lowrank_fx"), (ROOT / "passes", "lowrank_fx/passes"))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert "lowrank_fx/py.typed" in names
    assert "lowrank_fx/passes/base.py" in names
    assert sorted(names) == sorted(tree)


def test_the_wheel_names_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_installed_passes_have_one_name(installed: Path, tmp_path: Path) -> None:
    script = """
import importlib.util, sys
assert importlib.util.find_spec("passes") is None, importlib.util.find_spec("passes")
try:
    import passes
except ModuleNotFoundError:
    pass
import lowrank_fx, lowrank_fx.passes.base
assert "passes" not in sys.modules
print(lowrank_fx.__file__)
print(lowrank_fx.passes.base.__file__)
"""
    package, base = (Path(line) for line in run("-c", script, cwd=tmp_path, path=installed).splitlines())
    assert package == installed / "lowrank_fx" / "__init__.py"
    assert base == installed / "lowrank_fx" / "passes" / "base.py"


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    assert "optimize" in run("-m", "lowrank_fx", "--help", cwd=tmp_path, path=installed)
