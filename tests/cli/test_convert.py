"""``rlhfkit convert`` as people type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from legacy_models import make_baichuan, make_qwen1


@pytest.fixture
def legacy(workplace: Path) -> Path:
    return make_qwen1(workplace / "legacy")


def test_shows_its_plan_and_asks(cli: Any, legacy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    outcome = cli("convert", "legacy", "native")
    assert outcome.code == 0
    assert "Qwen2ForCausalLM" in outcome.out
    assert "Nothing was written." in outcome.out
    assert not Path("native").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert cli("convert", "legacy", "native").code == 0
    assert Path("native/conversion.json").is_file()


def test_dry_run_then_there_and_back(cli: Any, legacy: Path) -> None:
    outcome = cli("convert", "legacy", "native", "--dry-run")
    assert (outcome.code, Path("native").exists()) == (0, False)
    outcome = cli("convert", "legacy", "native", "--yes")
    assert outcome.code == 0, outcome.err
    assert "logits: largest difference" in outcome.out
    assert "probe texts equal" in outcome.out
    outcome = cli("convert", "native", "back", "--to", "original", "--yes")
    assert outcome.code == 0, outcome.err
    assert Path("back/qwen.tiktoken").is_file()


def test_json(cli: Any, legacy: Path) -> None:
    planned = json.loads(cli("convert", "legacy", "native", "--dry-run", "--json").out)
    assert (planned["status"], planned["proof"]) == ("planned", None)
    assert planned["steps"][0]["file"] == "weights"
    done = json.loads(cli("convert", "legacy", "native", "--yes", "--json").out)
    assert done["status"] == "converted"
    assert done["proof"]["logits"] <= 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("legacy", "native", "--to", "gguf"), "--to: 'gguf' is no layout"),
        (("legacy", "native", "--original", "tiny", "--yes"), "--original has no effect with --to native"),
        (("legacy", "native", "--json"), "--json cannot ask"),
        (("legacy", "native", "--yes", "--dry-run"), "--yes has no effect with --dry-run"),
        (("nowhere", "native", "--yes"), "SRC must be a model folder, but nowhere is not there"),
        (("tiny", "native", "--yes"), "needs no conversion"),
        (("legacy", "tiny", "--yes"), "is there already and not empty"),
        (("tiny", "native", "--to", "original", "--yes"), "does not say what it was converted from"),
    ],
)
def test_wrong_words(cli: Any, legacy: Path, words: tuple[str, ...], message: str) -> None:
    outcome = cli("convert", *words)
    assert outcome.code != 0
    assert message in outcome.err
    assert not Path("native").exists()


def test_13b_is_refused_with_its_reason(cli: Any, workplace: Path) -> None:
    make_baichuan(workplace / "big", 1, hidden_size=5120)
    outcome = cli("convert", "big", "native", "--yes")
    assert outcome.code == 1
    assert "take positions from ALiBi" in outcome.err


def test_ctrl_c_leaves_nothing(cli: Any, legacy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkit.repair import convert

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_tensors", stopped)
    assert cli("convert", "legacy", "native", "--yes").code != 0
    assert sorted(p.name for p in Path().iterdir()) == ["legacy", "tiny"]
