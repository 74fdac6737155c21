"""Shell completion: the script, and the values that options are known to take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RLHFKIT = Path(sys.executable).with_name("rlhfkit")


def completed(line: str, *, language: str = "en") -> list[str]:
    """What bash would offer at the end of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_RLHFKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "RLHFKIT_LANG": language,
    }
    done = subprocess.run([RLHFKIT], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlhfkit sft --family ", ["auto", "baichuan", "llama", "qwen"]),
        ("rlhfkit generate --template ll", ["llama2", "llama3"]),
        ("rlhfkit ppo --view ", ["auto", "plain", "quiet", "json"]),
        ("rlhfkit inspect rows.jsonl --stage ", ["sft", "rm", "ppo", "dpo", "kto", "grpo", "rloo"]),
        ("rlhfkit doctor m --lang ", ["en", "zh"]),
        ("rlhfkit sft --data ", []),  # the shell's own: files
    ],
)
def test_what_is_offered(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


def test_in_chinese_as_well() -> None:
    assert completed("rlhfkit sft --quantize ", language="zh") == ["none", "8bit", "4bit"]


def test_bash_takes_the_script() -> None:
    environment = {**os.environ, "PATH": f"{RLHFKIT.parent}:{os.environ['PATH']}"}
    command = ["bash", "--norc", "-c", 'eval "$(rlhfkit --show-completion)"; complete -p rlhfkit']
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "complete -o default -F _rlhfkit_completion rlhfkit\n"
