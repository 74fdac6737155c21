"""`rlhfkit score` as it is typed: what goes where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def judge(cli: Any, pairs_file: Path) -> Path:
    data = ("--data", pairs_file, "--eval-data", pairs_file, "--max-length", "128")
    flags = ("--precision", "fp32", "--batch-size", "4", "--trackers", "none", "--max-steps", "1", "--out", "rm")
    outcome = cli("rm", "--model", "tiny", *data, *flags)
    assert outcome.code == 0, outcome.err
    # The training ends with the same tables.
    for words in ("12 pairs of 12 prompts", "calibration error", "reliability", "chosen", "rejected", "█"):
        assert words in outcome.err
    assert outcome.out == ""
    return Path("rm/final")


def test_tables_for_people_and_one_object_for_programs(cli: Any, judge: Path, pairs_file: Path) -> None:
    shown = cli("score", "--model", judge, "--data", pairs_file)
    assert shown.code == 0, shown.err
    for words in ("12 pairs of 12 prompts", "accuracy", "calibration error", "reliability", "0.95 to 1", "█"):
        assert words in shown.out
    assert "reward model rm/final (llama): cpu, fp32, at most 128 tokens" in shown.err

    plain = cli("score", "--model", judge, "--data", pairs_file, "--json", "--output", "scores.jsonl")
    assert plain.code == 0, plain.err
    totals = json.loads(plain.out)
    assert (totals["rows"], totals["pairs"], totals["skipped"]) == (12, 12, 0)
    assert f"{totals['accuracy']:.1%}" in shown.out
    assert len(Path("scores.jsonl").read_text().splitlines()) == 12
    assert "12 rows of scores in scores.jsonl" in plain.err


def test_single_answers_are_listed(cli: Any, judge: Path, sft_file: Path) -> None:
    outcome = cli("score", "--model", judge, "--data", sft_file)
    assert outcome.code == 0, outcome.err
    assert f"{sft_file}:12" in outcome.out
    assert "normalised" in outcome.out


def test_a_recipe_and_its_faults(cli: Any, judge: Path, pairs_file: Path) -> None:
    Path("score.yaml").write_text(f"stage: score\nmodel: {judge}\ndata: [{pairs_file}]\njson_totals: true\n")
    assert json.loads(cli("score", "score.yaml").out)["rows"] == 12
    outcome = cli("score", "score.yaml", "--set", "modle=x", "--max-length", "3")
    assert outcome.code == 2
    assert "modle: unknown key; did you mean model?" in outcome.err
    assert "max_length: 3 tokens hold no conversation" in outcome.err
    assert "no reward model is given" in cli("score", "--data", pairs_file).err
