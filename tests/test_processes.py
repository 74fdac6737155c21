"""Two processes take the steps that one takes: the same global batch, the same loss, gradient and reward."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.cli import main

# Nine rows in batches of four: the third step has one row, fewer than there are processes.
ROWS = range(9)
COMMON = (
    *("--precision", "fp32", "--max-length", "128", "--lr", "0.003", "--trackers", "none"),
    *("--micro-batch-tokens", "80", "--save-every", "1", "--keep", "9"),
)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_model)


def one_process(*words: str) -> list[dict[str, Any]]:
    """Metrics of a run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhfkit", *words])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return read_metrics(words[words.index("--out") + 1])


def two_processes(*words: str) -> list[dict[str, Any]]:
    """Metrics of the same run on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", str(port))
    # A folder of its own for accelerate's settings: those of whoever runs the tests are not meant.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(Path("hub").resolve())}
    command = [sys.executable, *launch, "-m", "rlhfkit", *words]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        err = process.communicate(timeout=300)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torch's launcher is among them, and ends what it has started
        pytest.fail(f"the processes hang: {process.communicate()[1]}")
    assert process.returncode == 0, err
    assert "2 processes, run folder two" in err
    assert err.count("done: two/final") == 1
    return read_metrics("two")


def assert_same(words: tuple[str, ...], names: tuple[str, ...], steps: int) -> None:
    one, two = one_process(*words, "--out", "one"), two_processes(*words, "--out", "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert [row["step"] for row in one] == [*range(steps + 1), steps]
    compared = 0
    for a, b in zip(one, two, strict=True):
        for name in names:
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], abs=1e-4), (name, a["step"])
                compared += 1
    assert compared > len(names)
    first, second = (load_file(f"{out}/final/model.safetensors") for out in ("one", "two"))
    assert all(first[name].allclose(second[name], atol=1e-4) for name in first)


def test_sft(capfd: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(Path("rows.jsonl"), [{"prompt": f"film {i}?", "response": "good " * (i + 1)} for i in ROWS])
    held_out = write_jsonl(Path("one.jsonl"), [{"prompt": "a film?", "response": "it was good"}])
    words = ("sft", "--model", "tiny", "--data", str(data), "--eval-data", str(held_out), "--batch-size", "4", *COMMON)
    assert_same(words, ("loss", "grad_norm", "tokens_total", "eval_loss"), steps=3)

    # One process goes on where two were stopped, and says that it is not quite the same.
    shutil.rmtree("two/final")
    shutil.rmtree("two/checkpoints/step-3")
    before = read_metrics("two")
    after = one_process(*words, "--out", "two", "--resume")
    assert "the run was started with 2 processes and goes on with 1" in capfd.readouterr().err
    assert after[-1]["resumed_from"] == 2
    assert after[-2]["loss"] == pytest.approx(before[-2]["loss"], abs=1e-4)


@pytest.mark.slow
def test_rm() -> None:
    rows = [{"prompt": f"film {i}?", "chosen": "good " * (i + 1), "rejected": f"bad {i}"} for i in ROWS]
    data = write_jsonl(Path("pairs.jsonl"), rows)
    held_out = write_jsonl(Path("one.jsonl"), [{"prompt": "a film?", "answers": ["it was good", "so so", "bad"]}])
    words = ("rm", "--model", "tiny", "--data", str(data), "--eval-data", str(held_out), "--batch-size", "4", *COMMON)
    assert_same(words, ("loss", "grad_norm", "accuracy", "margin", "eval_loss", "eval_reward_chosen"), steps=3)


@pytest.mark.slow  # the default suite has that of stages/test_ppo_processes.py
def test_ppo() -> None:
    """Two answers to one prompt: one process samples and scores, the other has nothing to do until the update."""
    data = write_jsonl(Path("prompts.jsonl"), [{"prompt": f"say {i} words"} for i in ROWS])
    held_out = write_jsonl(Path("one.jsonl"), [{"prompt": "say one word"}])
    Path("rewards.py").write_text(
        "def length(prompts, responses):\n    return [len(r) / 10 + len(p) / 7 for p, r in zip(prompts, responses)]\n"
    )
    words = (
        *("ppo", "--model", "tiny", "--data", str(data), "--eval-data", str(held_out), "--reward", "rewards.py:length"),
        *("--rollout-size", "2", "--samples-per-prompt", "2", "--batch-size", "2", "--ppo-epochs", "2"),
        *("--max-steps", "3", "--max-new-tokens", "8", *COMMON),
    )
    names = ("loss", "grad_norm", "reward_mean", "kl", "value_loss", "entropy", "eos_rate", "eval_reward_mean")
    assert_same(words, names, steps=3)
