"""NF4 bases on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model, read_metrics

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import GenerateConfig, PpoConfig, RmConfig, SftConfig
from rlhfkit.data.batch import collate, token_row
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import LanguageModel
from rlhfkit.stages import generate, ppo, reward, sft


@pytest.fixture(scope="module")
def wider_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantisation works on blocks of 64 weights, so a hidden size of 32 is too small for it."""
    return make_model(tmp_path_factory.mktemp("models") / "wider", hidden_size=128, intermediate_size=256)


def gradients(module: LanguageModel) -> dict[str, torch.Tensor]:
    row = token_row([5, 6, 7, 8, 9], [False, False, True, True, True])
    module.train()
    module.zero_grad()
    (-module(collate([row])).logprobs.sum()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_an_evaluation_does_not_change_the_gradients(wider_model):
    """bitsandbytes repacks weights in eval mode on some CPUs, into a form without a backward pass."""
    source = open_model(str(wider_model))
    loaded = load_model(
        source, load_text_side(source), "causal", lora=LoraConfig(rank=4), dtype=torch.bfloat16, quantize="4bit"
    )
    module = LanguageModel(loaded.model)
    for name, p in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # zero at the start, which would hide gradients of lora_A
    with torch.autocast("cpu", torch.bfloat16):
        before = gradients(module)
        module.eval()
        with torch.no_grad():
            module(collate([token_row([5, 6, 7], [False, True, True])]))
        after = gradients(module)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].abs().sum() > 0 for name in before)


def test_three_stages_in_four_bits(settings, wider_model, sft_file, pairs_file, prompts_file, capsys):
    common = {"model__path": str(wider_model), "model__quantize": "4bit", "lora__rank": 4, "model__precision": "bf16"}
    changes = {**common, "data__train": [str(sft_file)], "data__eval": [str(sft_file)], "optim__epochs": 6}
    tuned = sft.run(load_config(SftConfig, flags=settings("sft", **changes, optim__gradient_checkpointing=True)))
    rows = read_metrics(tuned.out)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]

    common["model__path"] = str(tuned.final)
    changes = {**common, "data__train": [str(pairs_file)], "data__eval": [str(pairs_file)], "optim__epochs": 8}
    rm = reward.run(load_config(RmConfig, flags=settings("rm", **changes, optim__lr=5e-3)))
    rows = read_metrics(rm.out)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]

    changes = {**common, "data__train": [str(prompts_file)], "ppo__reward": [str(rm.final)], "ppo__max_new_tokens": 8}
    tuned = ppo.run(load_config(PpoConfig, flags=settings("ppo", **changes, ppo__rollout_size=8)))
    assert read_metrics(tuned.out)[0]["kl"] == pytest.approx(0.0, abs=1e-3)

    generate.run(
        load_config(
            GenerateConfig, flags={"model": str(tuned.final), "prompt": "film", "quantize": "4bit", "max_new_tokens": 4}
        )
    )
    assert capsys.readouterr().out.strip()
