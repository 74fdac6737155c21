"""The tables of docs/configuration.md are those that the configuration classes give."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from rlhfkit.config.load import iterate_fields
from rlhfkit.config.stages import STAGES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_fresh(maker: ModuleType) -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == maker.page_with_tables(page), "run: python docs/make_configuration.py"


def test_every_key_has_one_row(maker: ModuleType) -> None:
    rows = [line for line in maker.tables().splitlines() if line.startswith("| `")]
    keys = [line.split("`")[1] for line in rows]
    assert len(keys) == len(set(keys))
    assert set(keys) == {f.path for cls in STAGES.values() for f in iterate_fields(cls)} - {"stage"}
    # A bar inside a cell would shift the columns after it.
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}


def test_defaults_of_ppo_are_told_apart(maker: ModuleType) -> None:
    assert "| `optim.lr` | `--lr` | `1e-05`; ppo: `1e-06` | number, > 0, ≤ 1 |" in maker.tables()


def test_a_page_without_markers_is_refused(maker: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lacks the markers"):
        maker.page_with_tables("# Configuration\n")
