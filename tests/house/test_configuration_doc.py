"""The tables of docs/configuration.md are those that the configuration classes give."""

from __future__ import annotations

import importlib.util
import sys
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
    sys.modules[spec.name] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ENGLISH", "CHINESE"])
def test_the_tables_are_fresh(maker: ModuleType, name: str) -> None:
    language = getattr(maker, name)
    page = language.page.read_text(encoding="utf-8")
    assert page == maker.page_with_tables(page, language), "run: python docs/make_configuration.py"


def test_every_key_has_one_row(maker: ModuleType) -> None:
    rows = [line for line in maker.tables().splitlines() if line.startswith("| `")]
    for table in maker.tables().split("### "):
        keys = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
        assert len(keys) == len(set(keys))
    assert {line.split("`")[1] for line in rows} == {f.path for cls in STAGES.values() for f in iterate_fields(cls)} - {
        "stage"
    }
    # A bar inside a cell would shift the columns after it.
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}


def test_defaults_of_ppo_are_told_apart(maker: ModuleType) -> None:
    others = "; ".join(f"{stage}: `1e-06`" for stage in ("ppo", "dpo", "kto", "grpo", "rloo"))
    assert f"| `optim.lr` | `--lr` | `1e-05`; {others} | number, > 0, ≤ 1 |" in maker.tables()


def test_a_page_without_markers_is_refused(maker: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lacks the markers"):
        maker.page_with_tables("# Configuration\n")
