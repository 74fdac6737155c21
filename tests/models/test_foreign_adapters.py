"""Adapters that peft made, with settings that our own runs do not choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig
from rlhfkit.errors import ModelError
from rlhfkit.models.adapter_folders import load_frozen_adapter
from rlhfkit.models.adapters import (
    POLICY,
    REFERENCE,
    VALUE,
    active_adapter,
    add_frozen_adapter,
    add_value_adapter,
    fits_on,
)
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.stages import ppo

IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param)


def adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that has learned something, as peft saves it."""
    settings.setdefault("target_modules", ["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftLora(r=4, task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def load(folder: Path, rank: int) -> LoadedModel:
    source = open_model(str(folder))
    lora = LoraConfig(rank=rank)
    return load_model(source, load_text_side(source), "causal", lora=lora, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_changes_it_once(base: Path, tmp_path: Path, start: str) -> None:
    folder = adapter(base, tmp_path / "sft", init_lora_weights=start)
    loaded = load(folder, 4)
    before = logits(loaded.model)
    load_frozen_adapter(loaded.model, str(folder), REFERENCE)
    torch.testing.assert_close(logits(loaded.model), before, rtol=1e-4, atol=1e-4)
    with active_adapter(loaded.model, REFERENCE):
        torch.testing.assert_close(logits(loaded.model), before, rtol=1e-4, atol=1e-4)
    add_value_adapter(loaded.model, POLICY)
    torch.testing.assert_close(logits(loaded.model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "fits"), [(True, True), ("gaussian", True), ("pissa", False), ("olora", False)])
def test_only_what_leaves_the_base_alone_goes_on_the_policys(
    base: Path, tmp_path: Path, start: bool | str, fits: bool
) -> None:
    folder = adapter(base, tmp_path / "judge", init_lora_weights=start)
    assert fits_on(load(base, 4), open_model(str(folder))) is fits


def test_biases_are_refused_beside_a_reference(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "sft", bias="lora_only")
    with pytest.raises(ModelError, match="bias = 'lora_only'") as caught:
        load_frozen_adapter(load(folder, 4).model, str(folder), REFERENCE)
    assert "rlhfkit merge" in caught.value.hint


def test_an_adapted_embedding_of_a_reward_model_is_whole(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "judge", target_modules=["embed_tokens", "q_proj"])
    policy = load(base, 4)
    expected = logits(load(folder, 4).model)
    add_frozen_adapter(policy.model, str(folder), "reward")
    with active_adapter(policy.model, "reward"):
        torch.testing.assert_close(logits(policy.model), expected, rtol=1e-4, atol=1e-4)


def test_a_value_function_starts_with_an_adapted_embedding(base: Path, tmp_path: Path) -> None:
    loaded = load(adapter(base, tmp_path / "sft", target_modules=["embed_tokens", "q_proj"]), 4)
    expected = logits(loaded.model)
    add_value_adapter(loaded.model, POLICY)
    with active_adapter(loaded.model, VALUE):
        torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)
    trains = [name for name, p in loaded.model.named_parameters() if p.requires_grad and VALUE in name]
    assert any("lora_embedding_A" in name for name in trains)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_embedding_and_head_are_not_merged_into_one_tensor(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = adapter(base, tmp_path / "sft", **settings)
    expected = logits(load(folder, 4).model)
    if not open_model(str(base)).config["tie_word_embeddings"]:
        torch.testing.assert_close(logits(load(folder, 0).model), expected, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ModelError, match="which are one tensor in") as caught:
        load(folder, 0)
    assert "rlhfkit merge" in caught.value.hint


def test_a_value_function_is_saved_with_its_part_of_the_embedding(
    base: Path, tmp_path: Path, settings: Any, prompts_file: Path
) -> None:
    started = adapter(base, tmp_path / "sft", target_modules=["embed_tokens", "q_proj"])
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [0.0] * len(responses)\n")
    changes = {"model__path": str(started), "lora__rank": 4, "ppo__value_model": "adapter", "ppo__max_new_tokens": 8}
    changes |= {"data__train": [str(prompts_file)], "ppo__reward": [f"{tmp_path}/r.py:f"], "optim__max_steps": 1}
    run = ppo.run(load_config(PpoConfig, flags=settings("run", **changes)))
    saved = {name.rsplit("embed_tokens.")[-1] for name in load_file(run.out / "value" / "value.safetensors")}
    assert {f"lora_embedding_A.{VALUE}", f"lora_embedding_B.{VALUE}"} <= saved
