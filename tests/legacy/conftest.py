"""Tests against what the original code computes and the real vocabularies, which lie beside the checkout.

They are big and under licences of their own, so they are no part of this repository; without them the tests of this
folder are not collected, and pytest's first lines say so. The same properties are tested on small models elsewhere.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from references import LEGACY, PRESENT, TOKENIZERS, generator

collect_ignore_glob = [] if PRESENT else ["test_*.py"]


def pytest_report_header() -> str:
    return f"legacy references: {LEGACY if PRESENT else f'not found at {LEGACY}; tests/legacy is not collected'}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the references by its name, made when it is first asked for."""
    root = tmp_path_factory.mktemp("legacy")
    entries = json.loads((LEGACY / "dev.json").read_text(encoding="utf-8"))["checkpoints"]

    def make(name: str) -> Path:
        if not (root / name).is_dir():
            generator().make_checkpoint(root / name, entries[name], TOKENIZERS)
        return root / name

    return make


def _packed(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="session")
def token_ids() -> Callable[[str], Any]:
    return lambda name: _packed(LEGACY / "token_ids" / f"{name}.json.gz")


@pytest.fixture(scope="session")
def conversations() -> list[Any]:
    found: list[Any] = _packed(LEGACY / "prompts.json.gz")["conversations"]
    return found


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    from safetensors.torch import load_file

    return lambda name: load_file(LEGACY / "reference" / f"{name}.safetensors")
