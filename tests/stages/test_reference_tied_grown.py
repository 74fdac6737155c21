"""Reference of a policy that goes on from an SFT adapter which trained a grown, tied vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import reference_weights
from rlhfkit.stages.ppo_models import load_reference

IDS = torch.tensor([[5, 60, 7, 330]])


@pytest.mark.parametrize("tied", [True, False])
def test_reference_is_the_sft_adapter_with_its_vocabulary(tiny_model: Path, tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            max_position_embeddings=64,
        )
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = open_model(str(tmp_path / "base"))
    text = load_text_side(source, template="chatml")
    sft = load_model(source, text, "causal", lora=LoraConfig(rank=4), dtype=torch.float32).model.eval()
    with torch.no_grad():  # as if trained
        for _name, p in sft.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    sft.save_pretrained(tmp_path / "sft")
    with torch.no_grad():
        expected = sft(IDS).logits
    loaded = load_model(open_model(str(tmp_path / "sft")), text, "causal", lora=LoraConfig(rank=4), dtype=torch.float32)
    loaded.model.eval()
    run: Any = SimpleNamespace(device=torch.device("cpu"))
    assert load_reference(loaded, run) is None
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, expected)
        with reference_weights(loaded.model):
            torch.testing.assert_close(loaded.model(IDS).logits, expected)
