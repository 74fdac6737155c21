"""Runs that are stopped from outside, as processes of their own: the run that goes on equals the unbroken one.

What goes on runs in the test's process, which spares the start of another.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.cli import main
from rlhfkit.runtime.run import Run

STEPS = 150


@pytest.fixture(scope="module")
def command(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of a second or two after its start; the blank in its folder's name has to survive quoting."""
    rows = [{"prompt": f"what do you think of film {i}?", "response": "good " * (i % 5 + 1)} for i in range(12)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
    model = ("--model", str(tiny_model), "--precision", "fp32", "--max-length", "128", "--data", str(data))
    steps = ("--batch-size", "4", "--max-steps", str(STEPS), "--epochs", "1000", "--lr", "0.001")
    return ["sft", *model, *steps, "--out", "my run", "--trackers", "none"]


@pytest.fixture(scope="module")
def unbroken(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never stopped."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run_main([*command, "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_main(words: list[str]) -> int:
    """The command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhfkit", *words])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


def start(words: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "rlhfkit", *words], env=env, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Return once the metrics of a step are written."""
    metrics = Path("my run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_equals(out: Path, unbroken: Path) -> None:
    a, b = (load_file(run / "final/model.safetensors") for run in (out, unbroken))
    assert set(a) == set(b)
    assert all(a[name].equal(b[name]) for name in a)
    rows, expected = read_metrics(out), read_metrics(unbroken)
    assert [row["step"] for row in rows[:-1]] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "tokens_total"):
        assert [row[name] for row in rows] == [row[name] for row in expected]


def test_ctrl_c_saves_and_says_the_command_that_goes_on(command: list[str], unbroken: Path) -> None:
    process = start(command)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 130, err
    assert "stopping after this step; press Ctrl-C again to stop at once without saving" in err
    said = re.search(
        rf"^stopped: stopped after step (\d+) of {STEPS}; everything is saved\n  → go on with: (.*)\n\Z", err, re.M
    )
    assert said, err
    step = int(said[1])
    assert 5 <= step < STEPS
    assert [p.name for p in Path("my run/checkpoints").iterdir()] == [f"step-{step}"]
    assert not Path("my run/final").exists()

    program, *words = shlex.split(said[2])
    assert (program, words) == ("rlhfkit", [*command, "--resume"])
    assert run_main(words) == 0
    assert read_metrics("my run")[-1]["resumed_from"] == step
    assert_equals(Path("my run"), unbroken)


@pytest.mark.slow
def test_kill_9_at_random_moments(command: list[str], unbroken: Path) -> None:
    """A checkpoint every second step: many of the moments lie within the writing of one."""
    command = [*command, "--save-every", "2", "--resume"]
    moments = [(random.randint(1, 40), random.uniform(0, 0.05)), (random.randint(60, 120), random.uniform(0, 0.05))]
    print("killed after (step, seconds):", moments)
    for step, seconds in moments:
        process = start(command)
        wait_for_step(process, step)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not Path("my run/final").exists()
    assert run_main(command) == 0
    assert read_metrics("my run")[-1]["resumed_from"] >= moments[-1][0] - 2
    assert_equals(Path("my run"), unbroken)
    assert not [p for p in Path("my run/checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("signals", "words", "saved"),
    [
        ([signal.SIGINT], "stopped: stopped after step 3 of 150; everything is saved", ["step-3"]),
        ([signal.SIGTERM], "stopped: stopped after step 3 of 150; everything is saved", ["step-3"]),
        ([signal.SIGINT, signal.SIGINT], "stopped: no step is saved: there is no checkpoint in my run to go on", []),
    ],
    ids=("ctrl-c", "terminated", "ctrl-c-twice"),
)
def test_signals_within_a_step(
    command: list[str],
    signals: list[signal.Signals],
    words: str,
    saved: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def in_step_three(self: Run, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            for number in signals:
                os.kill(os.getpid(), number)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Run, "_refuse_non_finite", in_step_three)
    assert run_main(command) == 130
    assert words in capfd.readouterr().err
    assert [p.name for p in Path("my run").glob("checkpoints/step-*")] == saved
    # The handlers are those of before: what follows in this process is stopped as usual.
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_within_the_last_step_leaves_a_finished_run(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "_refuse_non_finite", lambda self, record: os.kill(os.getpid(), signal.SIGINT))
    assert run_main([*command, "--max-steps", "1"]) == 0
    assert "done: my run/final" in capfd.readouterr().err
    assert read_metrics("my run")[-1]["event"] == "end"
