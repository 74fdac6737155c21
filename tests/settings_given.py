"""What each stage needs to be given, and the faults of what else it is given."""

from __future__ import annotations

from typing import Any

import pytest

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import STAGES
from rlhfkit.errors import ConfigError

SFT = {"model.path": "m", "data.train": ["d.jsonl"]}
NEEDED: dict[str, dict[str, Any]] = {
    "sft": SFT,
    "rm": SFT,
    "ppo": {**SFT, "ppo.reward": ["r.py:f"]},
    "dpo": SFT,
    "kto": SFT,
    "grpo": {**SFT, "grpo.reward": ["r.py:f"]},
    "rloo": {**SFT, "rloo.reward": ["r.py:f"]},
    "generate": {"model": "m"},
    "score": {"model": "m", "data": ["d.jsonl"]},
}
GRPO = {"ppo.advantage": "grpo", "ppo.samples_per_prompt": 2}


def fault_lines(stage: str, **given: Any) -> list[str]:
    """The lines of the message about a configuration that is refused, its head and hint aside."""
    with pytest.raises(ConfigError) as error:
        load_config(STAGES[stage], **given)  # type: ignore[type-var]
    head, *lines = error.value.message.splitlines()
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    assert head.startswith(f"{count} in the configuration")
    assert error.value.hint == f"all options: rlhfkit {stage} --help"
    assert error.value.exit_code == 2
    return [line.strip() for line in lines]
