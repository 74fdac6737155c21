"""PPO killed with SIGKILL at ten random moments ends with what the unbroken run ends with, bit for bit: policy, value
function, KL weight and reward statistics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import read_metrics, write_jsonl
from killing import Start, assert_same_weights, finish, kill_at_every_file_call, kill_at_random, nursery

STEPS = 12
SAME = ("loss", "grad_norm", "lr", "reward_mean", "kl", "kl_coef", "value_loss", "tokens_total", "eval_reward_mean")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with nursery(tmp_path_factory.mktemp("logs")) as function:
        yield function


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path, start: Start) -> list[str]:
    """Policy, reference, reward model and value function on one base; both running statistics in use."""
    pairs = [{"prompt": f"film {i}?", "chosen": "good " * (i % 4 + 1), "rejected": f"bad {i}"} for i in range(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    shape = ("--model", str(tiny_model), "--precision", "fp32", "--max-length", "128", "--trackers", "none")
    finish(
        start, ["rm", *shape, "--data", str(data), "--lora-rank", "4", "--lr", "0.02", "--out", str(tmp_path / "rm")]
    )
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {i} words"} for i in range(7)])
    return [
        *("ppo", *shape, "--data", str(prompts), "--eval-data", str(prompts), "--reward", str(tmp_path / "rm/final")),
        *("--lora-rank", "4", "--value-model", "adapter", "--rollout-size", "4", "--samples-per-prompt", "2"),
        *("--batch-size", "2", "--ppo-epochs", "2", "--max-new-tokens", "8", "--lr", "0.003", "--weight-decay", "0.1"),
        *("--kl-target", "0.5", "--set", "ppo.kl_horizon=50", "--reward-normalize", "--missing-eos-penalty", "0.5"),
        *(
            "--scheduler",
            "cosine",
            "--max-steps",
            str(STEPS),
            "--epochs",
            "99",
            "--save-every",
            "2",
            "--eval-every",
            "5",
        ),
    ]


def assert_same_run(out: Path, whole: Path) -> None:
    for part in ("final", "value"):
        assert_same_weights(out / part, whole / part)
    rows, expected = read_metrics(out), read_metrics(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in SAME:
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    states = [json.loads((run / f"checkpoints/step-{STEPS}/state.json").read_text())["stage"] for run in (out, whole)]
    assert states[0] == states[1]
    assert states[0]["running"]["count"] == 4 * STEPS
    assert states[0]["kl_coef"] != 0.05  # it has moved
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"step-{STEPS - 2}", f"step-{STEPS}"]


def test_killed_at_ten_random_moments(words: list[str], start: Start, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    finish(start, [*words, "--out", str(whole)])
    moments = kill_at_random(start, [*words, "--out", str(out)], out, steps=STEPS, kills=10, seed=0, within=0.3)
    print(*moments, sep="\n")
    assert_same_run(out, whole)


@pytest.mark.slow
def test_killed_at_every_call_that_changes_a_file(words: list[str], start: Start, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    finish(start, [*words, "--out", str(whole)])
    assert kill_at_every_file_call(start, [*words, "--out", str(out)], out) > 20
    assert_same_run(out, whole)
