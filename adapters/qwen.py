"""Qwen 1.5, 2, 2.5 and 3; Qwen 1 as well, which is converted to Qwen 2's class.

The base models declare eos `<|endoftext|>` while the ChatML template ends turns with `<|im_end|>`
(QwenLM/Qwen3#927, open-r1#604): chat training sets the tokenizer's, config's and generation's eos to the turn end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfkit.families.base import Family
from rlhfkit.families.legacy import (
    Condition,
    ConfigRule,
    LegacyLayout,
    Shape,
    TensorRule,
    Tiktoken,
    attention,
    rms_norm,
)


def _layer(w: Mapping[str, Any], hidden: Any, shape: Shape) -> Any:
    """One layer of Qwen 1 up to its seq_length; beyond it, queries are scaled and the rotary base is stretched."""
    from torch.nn.functional import linear, silu

    width = hidden.shape[-1]
    normed = rms_norm(hidden, w["ln_1.weight"], shape.eps)
    query, key, value = linear(normed, w["attn.c_attn.weight"], w["attn.c_attn.bias"]).split(width, dim=-1)
    hidden = hidden + linear(attention(query, key, value, shape.heads, shape.theta), w["attn.c_proj.weight"])
    normed = rms_norm(hidden, w["ln_2.weight"], shape.eps)
    # The gate is w2, the other way round than its name suggests.
    gated = linear(normed, w["mlp.w1.weight"]) * silu(linear(normed, w["mlp.w2.weight"]))
    return hidden + linear(gated, w["mlp.c_proj.weight"])


def _logits(hidden: Any, head: Any) -> Any:
    return hidden @ head.T


_L, _N = "transformer.h.{i}.", "model.layers.{i}."
QWEN1 = LegacyLayout(
    name="Qwen 1",
    native_type="qwen2",
    native_class="Qwen2ForCausalLM",
    tensors=(
        TensorRule(original="transformer.wte.weight", native=("model.embed_tokens.weight",)),
        TensorRule(original=_L + "ln_1.weight", native=(_N + "input_layernorm.weight",)),
        TensorRule(
            original=_L + "attn.c_attn.weight", native=tuple(f"{_N}self_attn.{x}_proj.weight" for x in ("q", "k", "v"))
        ),
        TensorRule(
            original=_L + "attn.c_attn.bias", native=tuple(f"{_N}self_attn.{x}_proj.bias" for x in ("q", "k", "v"))
        ),
        TensorRule(original=_L + "attn.c_proj.weight", native=(_N + "self_attn.o_proj.weight",)),
        TensorRule(original=_L + "ln_2.weight", native=(_N + "post_attention_layernorm.weight",)),
        TensorRule(original=_L + "mlp.w1.weight", native=(_N + "mlp.up_proj.weight",)),
        TensorRule(original=_L + "mlp.w2.weight", native=(_N + "mlp.gate_proj.weight",)),
        TensorRule(original=_L + "mlp.c_proj.weight", native=(_N + "mlp.down_proj.weight",)),
        TensorRule(original="transformer.ln_f.weight", native=("model.norm.weight",)),
        TensorRule(original="lm_head.weight", native=("lm_head.weight",)),
    ),
    dropped=(".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attn.logn_tensor"),
    config=(
        ConfigRule(native="hidden_size", original=("hidden_size", "n_embd")),
        ConfigRule(native="intermediate_size", original=("intermediate_size", "ffn_hidden_size"), divide=2),
        ConfigRule(native="num_hidden_layers", original=("num_hidden_layers", "n_layer")),
        ConfigRule(native="num_attention_heads", original=("num_attention_heads", "n_head")),
        ConfigRule(native="num_key_value_heads", original=("num_attention_heads", "n_head")),
        # What it was trained on. Its own max_position_embeddings needs tricks that no native class has.
        ConfigRule(native="max_position_embeddings", original=("seq_length",)),
        ConfigRule(native="rms_norm_eps", original=("layer_norm_epsilon",), default=1e-6),
        ConfigRule(native="rope_theta", original=("rotary_emb_base",), default=10000.0),
        ConfigRule(native="initializer_range", original=("initializer_range",), default=0.02),
    ),
    constants={
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
    },
    conditions=(
        Condition(keys=("rotary_pct",), value=1.0, why="a part of each head has no rotary positions"),
        Condition(keys=("no_bias",), value=True, why="the projections have biases that Qwen 2's lack"),
        Condition(keys=("tie_word_embeddings",), value=False, why="its files hold no head"),
        Condition(keys=("use_cache_quantization",), value=False, why="keys and values are quantised"),
        Condition(keys=("scale_attn_weights",), value=True, why="scores are not divided by the root of the width"),
        Condition(keys=("quantization_config",), value=None, why="the weights are quantised"),
    ),
    head_width=("kv_channels",),
    tokenizer=Tiktoken(
        file="qwen.tiktoken",
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    ),
    template="qwen",
    not_generation=("chat_format", "stop_words_ids", "max_window_size", "max_context_size"),
    layer=_layer,
    logits=_logits,
)

FAMILY = Family(
    name="qwen",
    title="Qwen 1, 1.5, 2, 2.5 and 3",
    model_types=("qwen2", "qwen3", "qwen"),
    requires_conversion=("qwen",),
    legacy_layout=lambda config, rows: QWEN1,
    template="qwen",
    pad_candidates=("<|endoftext|>",),
    stop_candidates=("<|im_end|>", "<|endoftext|>"),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    starters=(
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.49),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54),
        ("Qwen/Qwen2.5-3B-Instruct", 3.09),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("Qwen/Qwen2.5-14B-Instruct", 14.8),
        ("Qwen/Qwen2.5-32B-Instruct", 32.8),
    ),
    notes=(
        "eos: <|im_end|> for chat, with <|endoftext|> kept in the stop list; pad: <|endoftext|>",
        "the embedding has more rows than the tokenizer has tokens: never shrunk",
        "Qwen 1 is converted to Qwen 2's class, up to the length it was trained on",
    ),
)
