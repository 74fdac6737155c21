"""Baichuan 13B and Baichuan2 13B as classes of our own, under the names that their files have.

Positions come from ALiBi (Press et al. 2022): the score of query i for key j in head h gets slope_h * (j - i), and no
class of transformers has that beside RMSNorm and SwiGLU. Tensor names, config keys and class names are those of the
original code, so a checkpoint is read as it is, and what is saved is one that the original code reads too.

Shapes: B rows, T tokens, H heads, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rlhfkit_adapters.baichuan import normalises_head
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, pad
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

EXTRA = 8  # dimensions that carry positions; a multiple of 8 keeps fast kernels


class BaichuanConfig(PreTrainedConfig):
    """Keys of the original's config.json. It has no ``max_position_embeddings``: by that the 7B models are known."""

    model_type = "baichuan"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 125696,
        hidden_size: int = 5120,
        intermediate_size: int = 13696,
        num_hidden_layers: int = 40,
        num_attention_heads: int = 40,
        hidden_act: str = "silu",
        model_max_length: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        **further: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.model_max_length = model_max_length
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **further,
        )


# -- positions ---------------------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> list[float]:
    """A geometric series for a power of two; otherwise the next lower one's, then every second of the doubled one's."""
    power = 2 ** int(math.log2(heads))
    found = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return found + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def alibi_parts(positions: Tensor, heads: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What queries and keys get appended, so that their product, times ``scaling``, grows by slope_h * (j - i).

    So every attention kernel computes ALiBi without a mask of [H, T, T]. Numbers are split into parts that 16 bits hold
    exactly: a position in multiples of 256 and the rest, a slope in two. The part of the query, equal for all of its
    keys, matters to no softmax; it keeps the scores near it small.

    Args:
        positions: [B, T].
        heads: H.
        scaling: of the scores.
        dtype: of queries and keys.

    Returns:
        [B, H, T, EXTRA] and [B, 1, T, EXTRA].
    """
    slope = torch.tensor(alibi_slopes(heads), device=positions.device, dtype=torch.float32) / scaling
    high, place = slope.to(dtype), positions[:, None].float()  # [H], [B, 1, T]
    low = (slope - high.float()).to(dtype)
    far = -slope[:, None] * place
    here = far.to(dtype)
    rest = (far - here.float()).to(dtype)
    high, low = (part[None, :, None].expand_as(here) for part in (high, low))
    nothing = torch.zeros_like(here)
    query = torch.stack([high, high, low, low, here, rest, nothing, nothing], dim=-1)
    below = place % 256
    above, below = (place - below).to(dtype), below.to(dtype)
    one = torch.ones_like(above)
    key = torch.stack([above, below, above, below, one, one, one, one], dim=-1)
    return query, key


# -- layers ------------------------------------------------------------------------------------------------------------


class BaichuanAttention(nn.Module):
    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.num_key_value_groups, self.is_causal = 1, True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        alibi: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        **further: Any,
    ) -> Tensor:
        shape = hidden_states.shape[:-1]
        heads = self.W_pack(hidden_states).view(*shape, 3, self.num_heads, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(dim=-3))
        places = [part.to(query.dtype).expand(*query.shape[:-1], -1) for part in alibi]
        query, key = (torch.cat(pair, dim=-1) for pair in zip((query, key), places, strict=True))
        value = pad(value, (0, EXTRA))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **further
        )
        out: Tensor = self.o_proj(mixed[..., : self.head_dim].reshape(*shape, -1))
        return out


class BaichuanMLP(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class BaichuanLayer(GradientCheckpointingLayer):
    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **further: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask, **further)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NormHead(nn.Linear):
    """Baichuan 2 scales each row of its head to length one whenever it is used."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states, normalize(self.weight))


# -- models ------------------------------------------------------------------------------------------------------------


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BaichuanLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([BaichuanLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **further: Any,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        heads = self.config.num_attention_heads
        alibi = alibi_parts(position_ids, heads, (self.config.hidden_size // heads) ** -0.5, dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask, alibi=alibi, past_key_values=past_key_values, **further)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        head = NormHead if normalises_head(config.vocab_size) else nn.Linear
        self.lm_head: nn.Module = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new: nn.Module) -> None:
        """A head that was resized comes as a plain one."""
        if isinstance(self.lm_head, NormHead) and type(new) is nn.Linear:
            plain, new = new, NormHead(new.in_features, new.out_features, bias=False, device="meta")
            new.weight = plain.weight
        self.lm_head = new

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **further: Any,
    ) -> CausalLMOutputWithPast:
        found = self.model(input_ids, attention_mask, **further)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)


class BaichuanForSequenceClassification(GenericForSequenceClassification, BaichuanPreTrainedModel):
    """The same trunk under a scalar head; the original code has none."""


CLASSES = (BaichuanConfig, BaichuanModel, BaichuanForCausalLM, BaichuanForSequenceClassification)
