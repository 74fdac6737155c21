"""What is loaded when: help and configurations answer without torch, and the checkout's folders are no packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "pyarrow")
THEN_LIST = f"""
import sys
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
"""


def loaded_by(code: str, *arguments: str) -> str:
    """The heavy packages that a fresh interpreter has loaded after some code, as one line."""
    command = [sys.executable, "-c", code + THEN_LIST, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


CALL = """
from rlhfkit.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("sft", "--help"), ("ppo", "--help")], ids=" ".join)
def test_help_loads_no_torch(arguments: tuple[str, ...]) -> None:
    assert loaded_by(CALL, *arguments) == "loaded:"


def test_a_faulty_configuration_is_refused_without_torch() -> None:
    refused = """
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import STAGES
from rlhfkit.errors import ConfigError
for stage in STAGES.values():
    try:
        load_config(stage)
        raise SystemExit("a configuration without a model was taken")
    except ConfigError:
        pass
"""
    assert loaded_by(refused) == "loaded:"


def test_families_are_listed_without_torch() -> None:
    assert loaded_by(CALL, "families") == "loaded:"


@pytest.mark.parametrize("folder", ["adapters", "templates"])
def test_folders_of_the_checkout_refuse_their_own_names(folder: str) -> None:
    """`import adapters` in the checkout's root would give a second copy of every class."""
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: this package is imported as 'rlhfkit_{folder}'" in done.stderr
