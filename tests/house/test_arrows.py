"""Imports go one way. The contracts stand in pyproject.toml, where `lint-imports` reads them too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = ("Imports go one way", "The toolkit names no adapter", "Adapters see families and errors alone")
# A process of its own: the linter changes sys.path, and reads the packages of the tree it is given.
LINT = """
import sys
sys.path[:0] = sys.argv[2:]
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True, no_logo=True))
"""


def lint(config: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, str(config), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.parent)


def test_contracts_are_kept() -> None:
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    for contract in CONTRACTS:
        assert f"{contract} KEPT" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("rlhfkit/config/load.py", "import rlhfkit.chat.template", CONTRACTS[0]),
        ("rlhfkit/data/batch.py", "import rlhfkit.stages.common", CONTRACTS[0]),
        ("rlhfkit/algo/kl.py", "import rlhfkit.errors", CONTRACTS[0]),
        ("rlhfkit/homeless.py", "", CONTRACTS[0]),
        ("rlhfkit/families/registry.py", "import rlhfkit_adapters.qwen", CONTRACTS[1]),
        ("rlhfkit_adapters/qwen.py", "import rlhfkit.config.blocks", CONTRACTS[2]),
    ],
    ids=("config-chat", "data-stages", "algo-errors", "no-layer", "rlhfkit-adapters", "adapters-config"),
)
def test_an_arrow_that_points_back_is_found(tmp_path: Path, file: str, line: str, contract: str) -> None:
    for folder, package in (("rlhfkit", "rlhfkit"), ("adapters", "rlhfkit_adapters")):
        shutil.copytree(ROOT / folder, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as planted:
        planted.write(f"\n{line}\n")
    done = lint(tmp_path / "pyproject.toml", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
