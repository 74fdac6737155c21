"""Baichuan 1 and 2, once their weights are in LLaMA's layout.

The roles are the vocabulary pieces 195 (user) and 196 (assistant), spelled `<reserved_106>` and `<reserved_107>` in
Baichuan 2, `<reserved_102>` and `<reserved_103>` in Baichuan 1. They are ordinary pieces, not special tokens: the chat
encoder splits them when a user types them. Pad is `<unk>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfkit.families.base import Family


def _template(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str:
    return "baichuan" if vocabulary.get("<reserved_102>") == 195 else "baichuan2"


FAMILY = Family(
    name="baichuan",
    title="Baichuan 1 and 2, after conversion",
    model_types=("baichuan",),
    compatible_model_types=("llama",),
    requires_conversion=("baichuan",),
    template="baichuan2",
    template_for=_template,
    pad_candidates=("<unk>",),
    stop_candidates=("</s>",),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    notes=(
        "roles: pieces 195 and 196 (<reserved_106>, <reserved_107>; in Baichuan 1 <reserved_102>, <reserved_103>)",
        "pad: <unk>; the last answer ends with </s>",
        "Baichuan 1 takes no system text",
    ),
)
