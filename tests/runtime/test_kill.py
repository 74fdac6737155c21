"""Killed with SIGKILL at ten random moments, and at every call that changes a file, a run ends with the weights of the
unbroken one: bit for bit, in the middle of epochs, packed, with weighted sources and evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics, write_jsonl
from killing import Start, assert_same_weights, finish, kill_at_every_file_call, kill_at_random, nursery

KILLS = 10


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with nursery(tmp_path_factory.mktemp("logs")) as function:
        yield function


def common(model: Path, *more: str) -> list[str]:
    """Five passes and a half over 45 rows, seven at a time."""
    shape = ("--max-length", "128", "--batch-size", "7", "--micro-batch-tokens", "90", "--epochs", "5.5")
    course = ("--lr", "0.003", "--weight-decay", "0.1", "--save-every", "3", "--eval-every", "5", "--trackers", "none")
    return ["--model", str(model), "--precision", "fp32", *shape, *course, *more]


@pytest.fixture
def sft(tmp_path: Path, tiny_model: Path) -> list[str]:
    one = [{"prompt": f"what of film {i}?", "response": "good " * (i % 9 + 1)} for i in range(17)]
    other = [{"text": f"a text of its own, number {i}"} for i in range(11)]
    noise = ("--neftune-alpha", "5", "--label-smoothing", "0.1")
    return ["sft", *common(tiny_model, *noise), *sources(tmp_path, one, other)]


@pytest.fixture
def rm(tmp_path: Path, tiny_model: Path) -> list[str]:
    one = [{"prompt": f"of film {i}?", "chosen": "good " * (i % 4 + 1), "rejected": f"bad {i}"} for i in range(17)]
    other = [{"prompt": f"say {i}", "answers": ["good", f"so so {i}", "bad"]} for i in range(11)]
    return ["rm", *common(tiny_model), *sources(tmp_path, one, other)]


def sources(folder: Path, one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    files = [str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in (("one", one), ("other", other))]
    return ["--data", f"{files[0]}=2.3", "--data", f"{files[1]}=0.5", "--eval-data", files[0]]


def unbroken(start: Start, words: list[str], out: Path) -> int:
    """Steps of the run that nobody kills."""
    finish(start, [*words, "--out", str(out)])
    return int(read_metrics(out)[-1]["step"])


def assert_same_run(out: Path, whole: Path) -> None:
    assert_same_weights(out / "final", whole / "final")
    rows, expected = read_metrics(out), read_metrics(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in ("loss", "grad_norm", "lr", "tokens_total", "eval_loss"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )


@pytest.mark.parametrize("stage", ["sft", pytest.param("rm", marks=pytest.mark.slow)])
def test_killed_at_ten_random_moments(stage: str, request: pytest.FixtureRequest, start: Start, tmp_path: Path) -> None:
    words = request.getfixturevalue(stage)
    steps = unbroken(start, words, tmp_path / "whole")
    out = tmp_path / "killed"
    moments = kill_at_random(start, [*words, "--out", str(out)], out, steps=steps, kills=KILLS, seed=0)
    print(*moments, sep="\n")
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_killed_at_every_call_that_changes_a_file(
    stage: str, request: pytest.FixtureRequest, start: Start, tmp_path: Path
) -> None:
    words = [*request.getfixturevalue(stage), "--max-steps", "4", "--keep", "1"]
    unbroken(start, words, tmp_path / "whole")
    out = tmp_path / "killed"
    killed = kill_at_every_file_call(start, [*words, "--out", str(out)], out)
    assert killed > 20
    assert_same_run(out, tmp_path / "whole")
