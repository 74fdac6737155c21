"""Baichuan 1 and 2: the 7B models become LLaMA's class; the 13B models have none and run in one of our own.

The roles are the vocabulary pieces 195 (user) and 196 (assistant), spelled `<reserved_106>` and `<reserved_107>` in
Baichuan 2, `<reserved_102>` and `<reserved_103>` in Baichuan 1. They are ordinary pieces, not special tokens: the chat
encoder splits them when a user types them. Pad is `<unk>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhfkit.families.base import Family
from rlhfkit.families.legacy import (
    Condition,
    ConfigRule,
    LegacyLayout,
    Sentencepiece,
    Shape,
    TensorRule,
    attention,
    rms_norm,
)


def _layer(w: Mapping[str, Any], hidden: Any, shape: Shape) -> Any:
    from torch.nn.functional import linear, silu

    width = hidden.shape[-1]
    normed = rms_norm(hidden, w["input_layernorm.weight"], shape.eps)
    query, key, value = linear(normed, w["self_attn.W_pack.weight"]).split(width, dim=-1)
    mixed = attention(query, key, value, shape.heads, shape.theta)
    hidden = hidden + linear(mixed, w["self_attn.o_proj.weight"])
    normed = rms_norm(hidden, w["post_attention_layernorm.weight"], shape.eps)
    gated = silu(linear(normed, w["mlp.gate_proj.weight"])) * linear(normed, w["mlp.up_proj.weight"])
    return hidden + linear(gated, w["mlp.down_proj.weight"])


def _plain_logits(hidden: Any, head: Any) -> Any:
    return hidden @ head.T


def _norm_head_logits(hidden: Any, head: Any) -> Any:
    """Baichuan 2 scales each row of its head to length one before it is used."""
    from torch.nn.functional import normalize

    return hidden @ normalize(head).T


_L = "model.layers.{i}."
_SAME = (
    "input_layernorm.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
_BODY = (
    TensorRule(original="model.embed_tokens.weight", native=("model.embed_tokens.weight",)),
    TensorRule(
        original=_L + "self_attn.W_pack.weight", native=tuple(f"{_L}self_attn.{x}_proj.weight" for x in ("q", "k", "v"))
    ),
    *(TensorRule(original=_L + name, native=(_L + name,)) for name in _SAME),
    TensorRule(original="model.norm.weight", native=("model.norm.weight",)),
)
BAICHUAN1 = LegacyLayout(
    name="Baichuan 7B",
    native_type="llama",
    native_class="LlamaForCausalLM",
    tensors=(*_BODY, TensorRule(original="lm_head.weight", native=("lm_head.weight",))),
    dropped=(".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"),
    config=(
        ConfigRule(native="hidden_size", original=("hidden_size",)),
        ConfigRule(native="intermediate_size", original=("intermediate_size",)),
        ConfigRule(native="num_hidden_layers", original=("num_hidden_layers",)),
        ConfigRule(native="num_attention_heads", original=("num_attention_heads",)),
        ConfigRule(native="num_key_value_heads", original=("num_attention_heads",)),
        ConfigRule(native="max_position_embeddings", original=("max_position_embeddings", "model_max_length")),
        ConfigRule(native="rms_norm_eps", original=("rms_norm_eps",), default=1e-6),
        ConfigRule(native="rope_theta", original=("rope_theta",), default=10000.0),
        ConfigRule(native="initializer_range", original=("initializer_range",), default=0.02),
    ),
    constants={
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    conditions=(
        Condition(keys=("tie_word_embeddings",), value=False, why="its files hold no head"),
        Condition(keys=("hidden_act",), value="silu", why="the MLP computes something else"),
        Condition(keys=("quantization_config",), value=None, why="the weights are quantised"),
    ),
    tokenizer=Sentencepiece(roles=("<reserved_102>", "<reserved_103>")),
    template="baichuan",
    not_generation=("user_token_id", "assistant_token_id", "_from_model_config"),
    layer=_layer,
    logits=_plain_logits,
)
BAICHUAN2 = replace(
    BAICHUAN1,
    name="Baichuan2 7B",
    tensors=(*_BODY, TensorRule(original="lm_head.weight", native=("lm_head.weight",), unit_rows=True)),
    tokenizer=Sentencepiece(roles=("<reserved_106>", "<reserved_107>")),
    template="baichuan2",
    logits=_norm_head_logits,
)
_ALIBI = (
    "the 13B models take positions from ALiBi, a slope for each head that is added to the scores, and no class of "
    "transformers has that beside RMSNorm and SwiGLU; loaded as a LLaMA it would answer nonsense without an error"
)


def _alibi_classes() -> tuple[Any, Any, Any, Any]:
    from rlhfkit_adapters.baichuan_alibi import CLASSES

    return CLASSES


# The head of Baichuan 2 is scaled, that of Baichuan 1 is not. The vocabulary tells them apart: 64,000 and 125,696
# pieces, whatever was added. The classes have the names of either in both.
_ROWS_BETWEEN = 100_000
_HIDDEN_13B = 5120


def normalises_head(rows: int) -> bool:
    """Whether a model of so many rows scales those of its head."""
    return rows > _ROWS_BETWEEN


def _layout(config: Mapping[str, Any], rows: int) -> LegacyLayout:
    layout = BAICHUAN2 if normalises_head(rows) else BAICHUAN1
    # The 7B code has a table of rotary positions to fill; the 13B configuration knows no such number.
    if "max_position_embeddings" not in config or config.get("hidden_size") == _HIDDEN_13B:
        return replace(
            layout,
            name=layout.name.replace("7B", "13B"),
            refused=_ALIBI,
            classes=_alibi_classes,
            lora_targets=("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
        )
    return layout


def _template(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str:
    return "baichuan" if vocabulary.get("<reserved_102>") == 195 else "baichuan2"


FAMILY = Family(
    name="baichuan",
    title="Baichuan 1 and 2",
    model_types=("baichuan",),
    compatible_model_types=("llama",),
    requires_conversion=("baichuan",),
    legacy_layout=_layout,
    template="baichuan2",
    template_for=_template,
    pad_candidates=("<unk>",),
    stop_candidates=("</s>",),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    starters=(("baichuan-inc/Baichuan2-7B-Chat", 7.51),),
    notes=(
        "roles: pieces 195 and 196 (<reserved_106>, <reserved_107>; in Baichuan 1 <reserved_102>, <reserved_103>)",
        "pad: <unk>; the last answer ends with </s>",
        "Baichuan 1 takes no system text",
        "7B: converted to LLaMA's class; the head of Baichuan 2 is stored with rows of length one",
        "13B: keeps its own layout; positions (ALiBi) are computed by a class of rlhfkit's",
    ),
)
