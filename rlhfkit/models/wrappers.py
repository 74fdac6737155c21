"""Modules whose forward gives what a loss needs. They are what Accelerate wraps, so every pass that trains goes
through ``forward``; the model inside saves and loads as transformers and peft know it.

Shapes: B rows, T tokens, N positions with a target, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhfkit.algo.logprobs import TokenStats, token_logprobs
from rlhfkit.data.batch import TokenBatch
from rlhfkit.models.load import backbone, base_model, disable_dropout, reward_head


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states [B, T, H] of right-padded rows, no head computed."""
    return backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


class LanguageModel(nn.Module):
    """Log-probabilities of a batch's targets."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, temperature: float = 1.0, vocabulary: int | None = None) -> TokenStats:
        hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask)
        chosen = hidden.flatten(0, 1).index_select(0, batch.positions)
        head = base_model(self.model).get_output_embeddings()
        return token_logprobs(
            head, chosen, batch.targets, temperature=temperature, vocabulary=vocabulary, with_entropy=False
        )


class RewardModel(nn.Module):
    """One score per row, read at its last real token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B] in float32 of right-padded rows. The mask alone says where a row ends; pad may equal eos."""
        hidden = hidden_states(self.model, input_ids, attention_mask)
        last = attention_mask.sum(dim=1) - 1
        pooled = hidden[torch.arange(len(last), device=last.device), last]
        head = reward_head(self.model)
        with torch.autocast(pooled.device.type, enabled=False):
            # float32, except under FSDP's mixed precision, which hands out 16-bit copies of all weights.
            return head(pooled.to(next(head.parameters()).dtype)).squeeze(-1).float()


class PolicyOutput(NamedTuple):
    """Per response token, in the order of the batch's positions. ``values`` is empty without a value head."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    values: Tensor  # [N] or [0]


class PolicyModel(nn.Module):
    """A policy and, for GAE, its value function: a head on the policy's trunk or on a trunk of its own.

    Dropout is turned off for good: PPO compares probabilities, and noise in them is noise in the ratio.

    Args:
        model: causal language model, transformers or peft.
        value: None (no value function), ``shared``, or a backbone module of its own.
        entropy_gradient: whether the entropy is part of the loss.
    """

    def __init__(self, model: Any, value: str | nn.Module | None, *, entropy_gradient: bool = False) -> None:
        super().__init__()
        self.model = model
        self.entropy_gradient = entropy_gradient
        self.value_trunk = value if isinstance(value, nn.Module) else None
        self.value_head: nn.Linear | None = None
        if value is not None:
            # Starts at zero: the first advantages are those of the rewards alone, and no trunk is disturbed.
            self.value_head = nn.Linear(base_model(model).config.hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        disable_dropout(self)

    def forward(self, batch: TokenBatch, temperature: float = 1.0, vocabulary: int | None = None) -> PolicyOutput:
        hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask).flatten(0, 1)
        chosen = hidden.index_select(0, batch.positions)
        head = base_model(self.model).get_output_embeddings()
        stats = token_logprobs(
            head,
            chosen,
            batch.targets,
            temperature=temperature,
            vocabulary=vocabulary,
            entropy_gradient=self.entropy_gradient,
        )
        return PolicyOutput(stats.logprobs, stats.entropy, self._values(batch, chosen))

    def _values(self, batch: TokenBatch, chosen: Tensor) -> Tensor:
        if self.value_head is None:
            return chosen.new_zeros(0)
        if self.value_trunk is not None:
            trunk = self.value_trunk(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            chosen = trunk.flatten(0, 1).index_select(0, batch.positions)
        # The head computes in float32 whatever autocast says: it regresses numbers, not tokens.
        with torch.autocast(chosen.device.type, enabled=False):
            return self.value_head(chosen.float()).squeeze(-1)


@contextmanager
def reference_weights(model: Any) -> Iterator[None]:
    """Inside, a peft model computes as the reference policy: its frozen ``reference`` adapter, or the bare base."""
    if "reference" in model.peft_config:
        active = model.active_adapter
        model.base_model.set_adapter("reference", inference_mode=True)
        try:
            yield
        finally:
            model.base_model.set_adapter(active)
    else:
        with model.disable_adapter():
            yield
