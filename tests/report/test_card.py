"""The README.md of a trained model: true, and its code loads the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import read_metrics, run_card

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, SftConfig
from rlhfkit.models.heads import stored_head
from rlhfkit.stages import reward, sft


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_card(
    settings: Callable[..., Any], sft_file: Path, pairs_file: Path, tiny_model: Path, stage: str, rank: int
) -> None:
    data = str(sft_file if stage == "sft" else pairs_file)
    flags = settings("run", data__train=[data], data__eval=[data], lora__rank=rank)
    cls, module = (SftConfig, sft) if stage == "sft" else (RmConfig, reward)
    result = module.run(load_config(cls, flags=flags))
    text = (result.final / "README.md").read_text(encoding="utf-8")

    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == str(tiny_model)
    assert facts["library_name"] == ("peft" if rank else "transformers")
    assert facts["pipeline_tag"] == ("text-generation" if stage == "sft" else "text-classification")

    rows = read_metrics(result.out)
    key, form = ("eval_loss", ".3f") if stage == "sft" else ("eval_accuracy", ".1%")
    assert f"| {format(rows[0][key], form)} | {format(rows[-1][key], form)} |" in body
    assert f"- data: {data}" in body
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", body, flags=re.DOTALL)[0])["stage"] == stage

    seen = run_card(result.final)
    model, tokenizer = seen["model"], seen["tokenizer"]
    assert tokenizer.chat_template
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n) is bool(rank)
    if stage == "rm":
        stored = stored_head(result.final)
        heads = [p for n, p in model.named_parameters() if "score" in n]
        assert stored is not None
        assert any(torch.equal(h.detach().float(), stored) for h in heads)
