"""The built wheel holds what the tree holds: a package or data file left out of pyproject.toml shows here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"rlhfkit": "rlhfkit", "adapters": "rlhfkit_adapters", "templates": "rlhfkit_templates"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy to build in: setuptools writes beside its sources, and an old build folder would feed the new wheel."""
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def files_of(tree: Path) -> set[str]:
    """Paths as they are to stand in the wheel."""
    return {
        f"{package}/{path.relative_to(tree / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }


def build(tree: Path) -> set[str]:
    """Build a wheel; the files in it, its own metadata aside."""
    before = files_of(tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of(tree) == before
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_tree(tree: Path) -> None:
    built = build(tree)
    assert built == files_of(tree)
    # Of each kind at least one, so that the comparison cannot be of two empty things.
    for name in ("rlhfkit/py.typed", "rlhfkit_adapters/qwen.py", "rlhfkit_templates/chatml.jinja"):
        assert name in built
    assert any(name.startswith("rlhfkit/assets/demo/") for name in built)


def test_a_forgotten_package_and_a_forgotten_file_show(tree: Path) -> None:
    """The comparison can fail: neither of these is named in pyproject.toml."""
    package = tree / "rlhfkit" / "forgotten"
    package.mkdir()
    (package / "__init__.py").touch()
    (tree / "templates" / "forgotten.txt").touch()
    assert files_of(tree) - build(tree) == {"rlhfkit/forgotten/__init__.py", "rlhfkit_templates/forgotten.txt"}
