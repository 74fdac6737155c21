"""A small PPO run, and rewards of all kinds for it."""

from __future__ import annotations

from pathlib import Path

import pytest

REWARD = """
import random
from pathlib import Path

import numpy
import torch

def length(prompts, responses, n, **columns):
    assert len(prompts) == len(responses) == len(n)
    return [float(len(r)) / 10 for r in responses]

def short(prompts, responses):
    return [0.0]

def broken(prompts, responses):
    raise KeyError("no such thing")

def words(prompts, responses):
    return "12345678"

def large(prompts, responses):
    return [10**400] * len(responses)

def wide(prompts, responses):
    return [1.0] * (len(responses) - 1) + [3.5e38]

def half(prompts, responses):
    return [2e38] * len(responses)

def other_half(prompts, responses):
    return [1.0] * (len(responses) - 1) + [2e38]

def lazy(prompts, responses):
    return (1 / (len(r) - len(r)) for r in responses)

def leaves(prompts, responses):
    raise SystemExit(3)

def colour(prompts, responses, colour):
    return [0.0] * len(responses)

def questions(questions, answers):
    return [0.0] * len(answers)

CONSTANT = 3

def noisy(prompts, responses):
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in responses]

def nan(prompts, responses):
    return [float("nan")] * len(responses)

calls = 0

def late(prompts, responses, n):
    global calls
    calls += 1
    # Finite as a score, infinite once squared.
    bad = calls == 2 and not Path(__file__).with_name("mended").exists()
    return [1e30 if bad and i == 5 else 0.1 * len(r) for i, r in zip(n, responses)]
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARD)
    return path


@pytest.fixture
def flags(settings, prompts_file, rewards):
    def make(out, **changes):
        defaults = {
            "data__train": [str(prompts_file)],
            "ppo__reward": [f"{rewards}:length"],
            "ppo__max_new_tokens": 8,
            "ppo__rollout_size": 8,
            "ppo__ppo_epochs": 2,
            **({} if "ppo__episodes" in changes else {"optim__epochs": 3}),
        }
        return settings(out, **{**defaults, **changes})

    return make
