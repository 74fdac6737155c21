"""The real command line, in the test's own process: quick, and with its exit code and both of its outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhfkit.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rlhfkit", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return call


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of every test here, with the model in it as ``tiny``: messages then name short paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    Path("tiny").symlink_to(tiny_model)
    return tmp_path
