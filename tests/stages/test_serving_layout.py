"""What vLLM asks of a folder before it serves it: the layout of transformers, or of peft for a LoRA adapter.

vLLM itself needs a GPU. Its loader reads ``architectures``, the names in the safetensors index or file, the tokenizer
and ``generation_config.json``; its reader of adapters (``vllm/lora/peft_helper.py``, release 0.11) refuses what
`VLLM_RANKS` and the test of LoRA folders name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, SftConfig
from rlhfkit.stages import ppo, sft

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank; an adapter may have fewer

REWARD = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"


@pytest.fixture
def trained(
    settings: Callable[..., Any], sft_file: Path, prompts_file: Path, tmp_path: Path
) -> Callable[[str, int], Path]:
    def train(stage: str, rank: int) -> Path:
        if stage == "sft":
            flags = settings("out", data__train=[str(sft_file)], lora__rank=rank)
            return sft.run(load_config(SftConfig, flags=flags)).final
        (tmp_path / "r.py").write_text(REWARD)
        more: dict[str, Any] = {"ppo__reward": [f"{tmp_path}/r.py:length"], "ppo__max_new_tokens": 8}
        more |= {"ppo__episodes": 8, "ppo__rollout_size": 8, "ppo__value_model": "adapter" if rank else "shared"}
        flags = settings("out", data__train=[str(prompts_file)], lora__rank=rank, **more)
        return ppo.run(load_config(PpoConfig, flags=flags)).final

    return train


def names_in(folder: Path, file: str) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_full_model_has_the_layout_of_transformers(stage: str, trained: Callable[[str, int], Path]) -> None:
    final = trained(stage, 0)
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    generation = json.loads((final / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert stops  # vLLM stops at these; without them it never does
    assert (final / "tokenizer.json").is_file()
    assert json.loads((final / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(final)).state_dict()
    held = names_in(final, "model.safetensors")
    assert set(held) - set(wanted) == set()  # no value head, no reference: vLLM refuses names that it does not know
    assert set(wanted) - set(held) <= {"lm_head.weight"}  # tied
    assert not [*final.glob("*.bin"), *final.glob("*.pt")]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_an_adapter_has_what_vllm_takes_and_nothing_else(stage: str, trained: Callable[[str, int], Path]) -> None:
    final = trained(stage, 8)
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["r"] in VLLM_RANKS
    assert settings["bias"] == "none"
    assert not settings["modules_to_save"]
    assert not settings["use_dora"]
    assert not settings.get("trainable_token_indices")
    assert isinstance(settings["lora_alpha"], (int, float))
    targets = settings["target_modules"]
    for name, shape in names_in(final, "adapter_model.safetensors").items():
        head, module, part, weight = name.rsplit(".", 3)
        assert head.startswith("base_model.model.model.layers.")
        assert module in targets
        assert (part, weight) in {("lora_A", "weight"), ("lora_B", "weight")}
        assert 8 in shape
    # Subfolders with further adapters (reference, reward, value) are not beside the policy's.
    assert not [entry for entry in final.iterdir() if entry.is_dir()]
