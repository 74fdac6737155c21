"""LLaMA 2, LLaMA 3.x, and models of the LLaMA architecture (SmolLM2, converted Baichuan2, ...).

Pad: LLaMA ships none. A pad equal to eos makes sequence classification read the score one token early
(transformers#35352), so a reserved token is taken where there is one, else `<unk>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfkit.families.base import Family
from rlhfkit.families.legacy import Sentencepiece


def _template(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str:
    if "<|eot_id|>" in vocabulary and "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return "chatml"
    # A converted Baichuan says `llama` too; only there does a reserved piece stand at 195 and mean the user.
    if vocabulary.get("<reserved_106>") == 195:
        return "baichuan2"
    if vocabulary.get("<reserved_102>") == 195:
        return "baichuan"
    return "llama2"


FAMILY = Family(
    name="llama",
    title="LLaMA 2, LLaMA 3.x and models of the LLaMA architecture",
    model_types=("llama", "mistral"),
    bare_sentencepiece=Sentencepiece(adds_bos=True),
    template="llama2",
    template_for=_template,
    pad_candidates=(
        "<|finetune_right_pad_id|>",  # 3.1 and later
        "<|reserved_special_token_2|>",  # 3.0: reserved for nothing, so no resize is needed
        "<pad>",
        "<|pad|>",
        "[PAD]",
        "<unk>",
        "<|endoftext|>",
    ),
    stop_candidates=("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    starters=(
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.135),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 0.362),
        ("meta-llama/Llama-3.2-1B-Instruct", 1.24),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.21),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Llama-3.1-70B-Instruct", 70.6),
    ),
    notes=(
        "pad: a reserved token or <unk>, never eos",
        "LLaMA 3 base: turns end with <|eot_id|>, which is added to the stop list",
    ),
)
