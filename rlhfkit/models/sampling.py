"""Sampling answers: one loop for rollouts, batch generation and chat.

The random numbers of an answer depend on its own seed alone, not on its neighbours in the batch: the same prompt gets
the same answer on one process and on two, at any batch size, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhfkit.models.load import base_model


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How tokens are drawn.

    Args:
        max_new_tokens: longest answer.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keeps the smallest set of tokens with this probability (Holtzman et al. 2020). PPO uses 1: the scored
            distribution must be the sampled one.
        stop_ids: an answer ends with the first of these.
        vocabulary: ids from here on are padding rows of the head and never drawn.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    vocabulary: int
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Sampled ids, the stop token included; ``ended`` is false for an answer that was cut off."""

    ids: list[int]
    ended: bool


@torch.no_grad()
def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[tuple[int, ...]],
    pad_id: int,
    autocast: torch.dtype | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answers to a batch of prompts.

    Args:
        model: causal language model; put in eval mode by the caller if it has dropout.
        prompts: token ids, any lengths.
        settings: how tokens are drawn.
        seeds: one tuple of integers for each prompt.
        pad_id: fills shorter prompts on the left, masked.
        autocast: number format to compute in, None for the weights' own.
        on_token: called with (prompt index, token id) as tokens come.
    """
    from transformers import DynamicCache

    inner = base_model(model)
    device = next(inner.parameters()).device
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.as_tensor(np.asarray(prompt), dtype=torch.long)
        mask[i, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    uniforms = np.stack([np.random.default_rng(seed).random(settings.max_new_tokens) for seed in seeds])
    stops = torch.tensor(settings.stop_ids, device=device)
    cache = DynamicCache(config=inner.config)
    rows = list(range(len(prompts)))  # which prompt each row of the running batch answers
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    context = torch.autocast(device.type, autocast) if autocast is not None else nullcontext()
    with context:
        for step in range(settings.max_new_tokens):
            logits = inner(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1, : settings.vocabulary]
            tokens = draw(logits.float(), torch.as_tensor(uniforms[rows, step], device=device), settings)
            stopped = torch.isin(tokens, stops).tolist()
            for row, token, stop in zip(rows, tokens.tolist(), stopped, strict=True):
                answers[row].append(token)
                ended[row] = stop
                if on_token is not None:
                    on_token(row, token)
            alive = [i for i, stop in enumerate(stopped) if not stop]
            if not alive or step + 1 == settings.max_new_tokens:
                break
            position = position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            ids = tokens[:, None]
            if len(alive) < len(rows):
                # A finished answer leaves the batch at once: nothing is computed for it any more.
                keep = torch.tensor(alive, device=device)
                cache.batch_select_indices(keep)
                ids, mask, position = ids[keep], mask[keep], position[keep]
                rows = [rows[i] for i in alive]
    return [Answer(a, e) for a, e in zip(answers, ended, strict=True)]


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One token per row by inverting the cumulative distribution at a given uniform number.

    Args:
        logits: [B, V] float32.
        uniforms: [B] in [0, 1).
        settings: temperature and top_p.

    Returns:
        [B] token ids.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / settings.temperature, dim=-1)
    if settings.top_p < 1:
        probabilities = _nucleus(probabilities, settings.top_p)
    # In float64: a float32 sum over 150,000 entries is off by more than the rarest tokens' probability.
    cumulative = probabilities.double().cumsum(dim=-1)
    threshold = uniforms.double() * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered * (before < top_p)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)
