"""Qwen 1.5, 2, 2.5 and 3; Qwen 1 once it is converted.

The base models declare eos `<|endoftext|>` while the ChatML template ends turns with `<|im_end|>`
(QwenLM/Qwen3#927, open-r1#604): chat training sets the tokenizer's, config's and generation's eos to the turn end.
"""

from __future__ import annotations

from rlhfkit.families.base import Family

FAMILY = Family(
    name="qwen",
    title="Qwen 1.5, 2, 2.5 and 3; Qwen 1 after conversion",
    model_types=("qwen2", "qwen3", "qwen"),
    requires_conversion=("qwen",),
    template="qwen",
    pad_candidates=("<|endoftext|>",),
    stop_candidates=("<|im_end|>", "<|endoftext|>"),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    notes=(
        "eos: <|im_end|> for chat, with <|endoftext|> kept in the stop list; pad: <|endoftext|>",
        "the embedding has more rows than the tokenizer has tokens: never shrunk",
    ),
)
