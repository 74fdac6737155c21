"""What a run shows on a terminal, in a file, and to a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics
from rich.console import Console

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import SftConfig
from rlhfkit.runtime.screen import Screen, clock, sparkline
from rlhfkit.stages import sft


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], ""),
        ([0.0, 7.0], "▁█"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([3.0, 3.0, 3.0], "▄▄▄"),
        ([0.0, float("nan"), 7.0, float("inf")], "▁█"),
    ],
)
def test_sparkline(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_a_long_course_is_averaged_into_the_width() -> None:
    assert sparkline([float(i // 100) for i in range(800)], width=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([float(i % 7) for i in range(1001)])) == 32


def test_clock() -> None:
    assert [clock(s) for s in (0.2, 59.4, 59.6, 185, 3720)] == ["0 s", "59 s", "1:00 min", "3:05 min", "1:02 h"]


def test_the_live_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rlhfkit.runtime.screen.Live.start", lambda self, refresh=False: None
    )  # draws nothing by itself
    screen = Screen()
    screen.console = Console(force_terminal=True, width=80, record=True, quiet=False)
    screen._moves = True
    with screen.steps("ppo", 10, 0):
        for step, reward in enumerate((0.0, 1.0, 2.0), start=1):
            row = {"reward_mean": reward, "kl": 0.5, "tokens_per_second": 812.0, "peak_memory_gib": 1.25, "lr": 1e-6}
            screen.step(step, 10, row, ("reward_mean", "kl", "eval_reward_mean"), speak=True)
        assert screen._live is not None
        with screen.console.capture() as shown:
            screen.console.print(screen._live.renderable)
    text = shown.get()
    assert "3/10" in text
    assert " left" in text
    reward, kl = (next(line for line in text.splitlines() if name in line) for name in ("reward_mean", "kl"))
    assert "▁▄█" in reward or "▁▅█" in reward
    assert "▄▄▄" in kl
    assert "812 tokens/s" in text
    assert "1.25 GiB" in text
    assert "eval_reward_mean" not in text  # not measured yet
    assert "lr" not in text  # not asked for


def trained(settings: Callable[..., Any], data: Path, view: str) -> Path:
    flags = settings(view, data__train=[str(data)], run__view=view, optim__epochs=2)
    return sft.run(load_config(SftConfig, flags=flags)).out


def test_json_is_the_records_and_nothing_else(
    settings: Callable[..., Any], sft_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = trained(settings, sft_file, "json")
    said = capfd.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == read_metrics(out)
    assert said.err == ""


def test_quiet_says_nothing(settings: Callable[..., Any], sft_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained(settings, sft_file, "quiet")
    assert capfd.readouterr() == ("", "")


def test_plain_lines_where_there_is_no_terminal(
    settings: Callable[..., Any], sft_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(settings, sft_file, "auto")
    said = capfd.readouterr()
    assert said.out == ""
    assert "step 6/6  loss " in said.err
    assert "\x1b" not in said.err
    assert "▁" not in said.err
