"""Options that change nothing beside the others: each is refused where it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from settings_given import GRPO, NEEDED, SFT, fault_lines

from rlhfkit.config.load import dump_config, load_config
from rlhfkit.config.stages import STAGES
from rlhfkit.errors import ConfigError

URL = "without a reward that is a URL"
IDLE: list[tuple[str, dict[str, Any], str, tuple[Any, ...], str]] = [
    ("sft", {}, "lora.alpha", (None, 8.0), "while lora.rank is 0; set --lora-rank"),
    ("rm", {}, "lora.targets", ("auto", "q_proj"), "while lora.rank is 0; set --lora-rank"),
    ("sft", {}, "run.eval_every", (0, 5), "without held-out rows; give --eval-data"),
    ("sft", {"run.view": "json"}, "run.log_every", (1, 5), "with run.view 'json', which shows no lines of steps"),
    ("rm", {"run.view": "quiet"}, "run.log_every", (1, 5), "with run.view 'quiet', which shows no lines of steps"),
    ("ppo", GRPO, "ppo.gamma", (1.0, 0.9), "with advantage 'grpo', which needs no value model"),
    ("ppo", GRPO, "ppo.whiten_advantages", (True, False), "with advantage 'grpo', which needs no value model"),
    ("ppo", GRPO, "ppo.value_model", ("shared", "separate"), "with advantage 'grpo', which needs no value model"),
    ("ppo", {}, "ppo.kl_horizon", (10000.0, 5.0), "while ppo.kl_target is 0"),
    ("ppo", {"ppo.kl_coef": 0}, "ppo.kl_estimator", ("auto", "k2"), "while ppo.kl_coef is 0; metrics always have k1"),
    ("ppo", {"ppo.value_coef": 0}, "ppo.value_cliprange", (0.2, 0.1), "while ppo.value_coef is 0"),
    ("ppo", {"ppo.ppo_epochs": 1}, "ppo.early_stop_kl", (0.0, 0.1), "with one pass over each rollout"),
    ("ppo", {}, "ppo.eval_samples", (1, 2), "without held-out prompts; give --eval-data"),
    ("ppo", {}, "ppo.reward_timeout", (60.0, 5.0), URL),
    ("rloo", {}, "rloo.reward_retries", (3, 5), URL),
    ("ppo", {"ppo.episodes": 64}, "optim.epochs", (1.0, 2.0), "beside ppo.episodes; give one of them"),
    ("grpo", {"grpo.episodes": 64}, "optim.epochs", (1.0, 2.0), "beside grpo.episodes; give one of them"),
    ("dpo", {}, "dpo.label_smoothing", (0.0, 0.1), "on the loss 'sigmoid'; give --loss robust"),
    ("generate", {}, "output", ("", "o"), "without input; give --input FILE"),
    ("generate", {}, "batch_size", (16, 4), "without input; give --input FILE"),
    ("generate", {"temperature": 0}, "top_p", (1.0, 0.5), "at temperature 0"),
    ("generate", {"input": "i", "output": "o"}, "stream", (True,), "with input, whose answers go to a file"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "flags", "path", "values", "words"), IDLE)
def test_an_option_without_effect_is_a_fault(
    stage: str, flags: dict[str, Any], path: str, values: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    """Whether its value is the default or another; and a resolved recipe, which gives every key, is none."""
    needed = NEEDED[stage] | flags
    for value in values:
        if value is not None:  # a flag has a value
            assert fault_lines(stage, flags=needed | {path: value}) == [f"{path}: has no effect {words}"]
            assert fault_lines(stage, flags=needed, sets=[f"{path}={json.dumps(value)}"]) == [
                f"{path}: has no effect {words}"
            ]
    recipe = tmp_path / "resolved.yaml"
    recipe.write_text(dump_config(load_config(STAGES[stage], flags=needed)))  # type: ignore[type-var]
    load_config(STAGES[stage], recipe=str(recipe))  # type: ignore[type-var]


def test_every_option_that_may_be_idle_is_tried() -> None:
    """What a configuration of the table lists, some row of it tries; of what GAE alone has, a part."""
    tried = {path.rpartition(".")[2] for _, _, path, _, _ in IDLE} | {"value_coef", "lam"}
    for stage, flags, *_ in IDLE:
        config = load_config(STAGES[stage], flags=NEEDED[stage] | flags)  # type: ignore[type-var]
        assert {path.rpartition(".")[2] for path in config.without_effect} <= tried


def test_weights_of_sources_are_checked_with_the_rest() -> None:
    """Where each row counts once a weight has no effect; one that is no number is a fault everywhere."""
    given = {"data.train": ["a.jsonl=2", "b.jsonl=0"], "data.eval": ["c.jsonl", "d.jsonl=3"], "optim.lr": 3}
    assert fault_lines("sft", flags=SFT | given) == [
        "optim.lr: input should be less than or equal to 1 (found 3)",
        'data.train: the data source "b.jsonl=0": its weight "0" is not a number above 0, and there is no file of the '
        "whole name; write path=weight, like rows.jsonl=0.5",
        "data.eval: the weight of d.jsonl=3 has no effect: held-out rows count once each; leave it out",
    ]
    (line,) = fault_lines("score", flags={"model": "m", "data": ["b.jsonl=3"]})
    assert line == "data: the weight of b.jsonl=3 has no effect: each row is scored once; leave it out"
    (line,) = fault_lines("generate", flags={"model": "m", "input": "i.jsonl=2", "output": "o"})
    assert line == "input: the weight of i.jsonl=2 has no effect: each prompt is answered once; leave it out"


@pytest.mark.parametrize(
    "given", [{"temperature": 0, "seed": 1}, {"input": "i.jsonl", "output": "o.jsonl", "stream": False}]
)
def test_what_is_kept_anyway_may_be_asked_for(given: dict[str, Any]) -> None:
    """Equal answers of greedy decoding, and no streaming into a file."""
    load_config(STAGES["generate"], flags=NEEDED["generate"] | given)  # type: ignore[type-var]


def test_beside_a_recipe_of_a_run_only_what_is_given_counts(tmp_path: Path) -> None:
    """It has values for what was left to the run, and for what other options made idle."""
    recipe = tmp_path / "config.resolved.yaml"
    ppo = load_config(STAGES["ppo"], flags=NEEDED["ppo"])  # type: ignore[type-var]
    recipe.write_text(dump_config(ppo, {"ppo.kl_estimator": "k1"}))
    load_config(STAGES["ppo"], recipe=str(recipe), flags={"ppo.kl_coef": 0})  # type: ignore[type-var]
    sft = load_config(STAGES["sft"], flags=SFT | {"lora.rank": 8, "lora.alpha": 4})  # type: ignore[type-var]
    recipe.write_text(dump_config(sft))
    load_config(STAGES["sft"], recipe=str(recipe), flags={"lora.rank": 0})  # type: ignore[type-var]
    given = {"lora.rank": 0, "lora.alpha": 4}
    with pytest.raises(ConfigError, match=r"lora\.alpha: has no effect"):
        load_config(STAGES["sft"], recipe=str(recipe), flags=given)  # type: ignore[type-var]
    recipe.rename(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match=r"lora\.alpha: has no effect"):
        load_config(STAGES["sft"], recipe=str(tmp_path / "own.yaml"), flags={"lora.rank": 0})  # type: ignore[type-var]
