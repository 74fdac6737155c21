"""Modules whose forward gives what a loss needs. They are what Accelerate wraps, so every pass that trains goes
through ``forward``; the model inside saves and loads as transformers and peft know it.

Shapes: N tokens of a micro-batch, M of them with a target, A conversations, H hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhfkit.algo.logprobs import TokenStats, above_mean, token_logprobs
from rlhfkit.data.batch import TokenBatch
from rlhfkit.data.packing import Packed
from rlhfkit.models.adapters import REFERENCE, VALUE, active_adapter
from rlhfkit.models.attention import takes_packed
from rlhfkit.models.heads import reward_head
from rlhfkit.models.parts import backbone, base_model, disable_dropout


def hidden_states(model: Any, tokens: Packed, embedded: Tensor | None = None) -> Tensor:
    """Last hidden states [N, H] of a line of tokens, no head computed."""
    inner = base_model(model)
    return trunk_states(backbone(model), tokens, packed=takes_packed(inner), embedded=embedded)


def trunk_states(trunk: Any, tokens: Packed, *, packed: bool, embedded: Tensor | None = None) -> Tensor:
    """The same of a stack of layers. One that does not take lines gets rows padded on the right.

    Args:
        trunk: maps ids or embeddings to hidden states.
        tokens: the line.
        packed: whether the trunk takes lines.
        embedded: [N, H] what enters the layers instead of the tokens' embeddings.
    """
    layout = tokens.layout
    name, line = ("input_ids", tokens.input_ids) if embedded is None else ("inputs_embeds", embedded)
    if packed:
        return trunk(
            **{name: line[None]},
            position_ids=tokens.position_ids[None],
            # Four dimensions are taken as they are: no mask is made of them, and packed attention reads none.
            attention_mask=torch.empty(1, 1, 1, 1, device=tokens.input_ids.device),
            use_cache=False,
            layout=layout,
        ).last_hidden_state[0]
    cells = torch.arange(layout.rows.shape[1], device=layout.rows.device)
    mask = (cells[None] < layout.lengths[:, None]).long()
    padded = trunk(**{name: line[layout.rows]}, attention_mask=mask, use_cache=False).last_hidden_state
    return padded.flatten(0, 1).index_select(0, layout.cells)


def noisy_embeddings(model: Any, batch: TokenBatch, alpha: float) -> Tensor:
    """Embeddings [N, H] with NEFTune's noise (Jain et al. 2023): uniform, alpha / sqrt(L H) at most, L being the length
    of a token's own row.

    The noise of a row depends on its seeds alone: neither on what it is packed with nor on the process.
    """
    embedded: Tensor = base_model(model).get_input_embeddings()(batch.tokens.input_ids)
    layout, parts = batch.tokens.layout, []
    for length, seeds in zip(layout.lengths.tolist(), batch.noise, strict=True):
        generator = torch.Generator(embedded.device)
        generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))
        most = alpha / (length * embedded.shape[1]) ** 0.5
        shape = (length, embedded.shape[1])
        parts.append(torch.empty(shape, device=embedded.device).uniform_(-most, most, generator=generator))
    return embedded + torch.cat(parts).to(embedded.dtype)


class LanguageModel(nn.Module):
    """Log-probabilities of a batch's targets.

    Args:
        model: causal language model, transformers or peft.
        label_smoothing: e: while training, (1 - e) log p + e (mean log p of the vocabulary) instead.
        neftune_alpha: noise on the embeddings while training.
    """

    def __init__(self, model: Any, *, label_smoothing: float = 0.0, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha

    def forward(self, batch: TokenBatch) -> TokenStats:
        noisy = self.training and self.neftune_alpha > 0
        embedded = noisy_embeddings(self.model, batch, self.neftune_alpha) if noisy else None
        chosen = hidden_states(self.model, batch.tokens, embedded).index_select(0, batch.positions)
        head = base_model(self.model).get_output_embeddings()
        stats = token_logprobs(head, chosen, batch.targets, with_entropy=False, equal_weights=True)
        if self.training and self.label_smoothing:
            smoothed = stats.logprobs - self.label_smoothing * above_mean(head, chosen, batch.targets)
            stats = stats._replace(logprobs=smoothed)
        return stats


class RewardModel(nn.Module):
    """One score per conversation, read at its last token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Packed, last: Tensor) -> Tensor:
        """Scores [A] in float32 of the conversations whose last tokens stand at ``last`` [A] in the line."""
        return _scores(hidden_states(self.model, tokens).index_select(0, last), reward_head(self.model))


class AdapterRewardModel(nn.Module):
    """The same on a base that belongs to a policy: a frozen adapter there and a head of its own.

    Args:
        model: the policy, a peft model.
        adapter: name of the reward model's adapter in it.
        head: scalar head.
    """

    def __init__(self, model: Any, adapter: str, head: nn.Linear) -> None:
        super().__init__()
        self.adapter = adapter
        self.head = head
        self._policy = [model]  # in a list: its weights are not this module's to move, count or save

    def forward(self, tokens: Packed, last: Tensor) -> Tensor:
        """Scores [A] in float32; see `RewardModel.forward`."""
        with active_adapter(self._policy[0], self.adapter):
            hidden = hidden_states(self._policy[0], tokens)
        return _scores(hidden.index_select(0, last), self.head)


def _scores(hidden: Tensor, head: nn.Module) -> Tensor:
    """One number [N] for each state [N, H]. In float32, whatever autocast says: these are numbers, not tokens."""
    with torch.autocast(hidden.device.type, enabled=False):
        # Except under FSDP's mixed precision, which hands out 16-bit copies of all weights.
        scores: Tensor = head(hidden.to(next(head.parameters()).dtype)).float()
        return torch.squeeze_copy(scores, -1)  # FSDP wants no views of what a module returns


class PolicyOutput(NamedTuple):
    """Per response token, in the order of the batch's positions. ``values`` is empty without a value head."""

    logprobs: Tensor  # [M]
    entropy: Tensor  # [M]
    values: Tensor  # [M] or [0]


class PolicyModel(nn.Module):
    """A policy and, for GAE, its value function: a head on the policy's trunk or on a trunk of its own.

    Dropout is turned off for good: PPO compares probabilities, and noise in them is noise in the ratio.

    Args:
        model: causal language model, transformers or peft.
        value: None (no value function), ``shared`` (the policy's trunk), ``adapter`` (the adapter of that name on the
            policy's base), or a backbone module of its own.
        entropy_gradient: whether the entropy is part of the loss.
    """

    def __init__(self, model: Any, value: str | nn.Module | None, *, entropy_gradient: bool = False) -> None:
        super().__init__()
        self.model = model
        self.entropy_gradient = entropy_gradient
        self.value_trunk = value if isinstance(value, nn.Module) else None
        self.value_adapter = value == "adapter"
        self.value_head: nn.Linear | None = None
        if value is not None:
            # Starts at zero: the first advantages are those of the rewards alone, and no trunk is disturbed.
            self.value_head = nn.Linear(base_model(model).config.hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        disable_dropout(self)

    def forward(
        self,
        batch: TokenBatch,
        temperature: float = 1.0,
        vocabulary: int | None = None,
        *,
        with_entropy: bool = True,
        with_values: bool = True,
    ) -> PolicyOutput:
        """What is left out is zeros (entropies) or empty (values), and costs nothing."""
        chosen = hidden_states(self.model, batch.tokens).index_select(0, batch.positions)
        head = base_model(self.model).get_output_embeddings()
        stats = token_logprobs(
            head,
            chosen,
            batch.targets,
            temperature=temperature,
            vocabulary=vocabulary,
            with_entropy=with_entropy,
            entropy_gradient=self.entropy_gradient,
        )
        values = self._values(batch, chosen) if with_values else chosen.new_zeros(0)
        return PolicyOutput(stats.logprobs, stats.entropy, values)

    def _values(self, batch: TokenBatch, chosen: Tensor) -> Tensor:
        if self.value_head is None:
            return chosen.new_zeros(0)
        if self.value_adapter:
            with active_adapter(self.model, VALUE):
                chosen = hidden_states(self.model, batch.tokens).index_select(0, batch.positions)
        elif self.value_trunk is not None:
            states = trunk_states(self.value_trunk, batch.tokens, packed=takes_packed(self.value_trunk))
            chosen = states.index_select(0, batch.positions)
        return _scores(chosen, self.value_head)


def reference_weights(model: Any) -> AbstractContextManager[None]:
    """Inside, a peft model computes as the reference policy: its frozen ``reference`` adapter, or the bare base."""
    return active_adapter(model, REFERENCE if REFERENCE in model.peft_config else None)
