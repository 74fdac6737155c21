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
from torch.nn.functional import pad

from rlhfkit.data.packing import join, pack
from rlhfkit.models.attention import takes_packed
from rlhfkit.models.decoding import weights_laid_out
from rlhfkit.models.parts import base_model

BLOCK = 512  # tokens of the vocabulary summed together when one is drawn


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
        pad_id: fills shorter prompts on the left, masked, where a model does not take lines.
        autocast: number format to compute in, None for the weights' own.
        on_token: called with (prompt index, token id) as tokens come.
    """
    inner = base_model(model)
    device = next(inner.parameters()).device
    reader = _AnswersOfLine if _takes_lines(inner) else _PaddedAnswers
    uniforms = np.stack([np.random.default_rng(seed).random(settings.max_new_tokens) for seed in seeds])
    stops = torch.tensor(settings.stop_ids, device=device)
    rows = list(range(len(prompts)))  # which prompt each row of the running batch answers
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    # One context around all passes: inside it autocast casts each weight once, not once for each token.
    casts = torch.autocast(device.type, autocast) if autocast is not None else nullcontext()
    with casts, weights_laid_out(inner, len(prompts)):
        running = reader(inner, prompts, settings.max_new_tokens, pad_id)
        logits = running.read()
        for step in range(settings.max_new_tokens):
            drawn = draw(
                logits[:, : settings.vocabulary].float(),
                torch.from_numpy(uniforms[rows, step]),
                settings,
            )
            stopped = torch.isin(drawn, stops).tolist()
            tokens = drawn.tolist()
            for row, token, stop in zip(rows, tokens, stopped, strict=True):
                answers[row].append(token)
                ended[row] = stop
                if on_token is not None:
                    on_token(row, token)
            alive = [i for i, stop in enumerate(stopped) if not stop]
            if not alive or step + 1 == settings.max_new_tokens:
                break
            if len(alive) < len(rows):
                # A finished answer leaves the batch at once: nothing is computed for it any more.
                alive = running.keep(alive)
                rows = [rows[i] for i in alive]
            logits = running.write(torch.tensor([[tokens[i]] for i in alive], device=device))
    return [Answer(a, e) for a, e in zip(answers, ended, strict=True)]


def _takes_lines(inner: Any) -> bool:
    from rlhfkit.models.cache import every_layer_sees_everything

    return takes_packed(inner) and every_layer_sees_everything(inner.config)


class _AnswersOfLine:
    """Answers of a model that takes packed lines: no padding is computed, what prompts begin with alike is read once.

    Args:
        inner: transformers model.
        prompts: of each answer, in the order of the batch's rows.
        room: most tokens of an answer.
    """

    def __init__(self, inner: Any, prompts: Sequence[Sequence[int]], room: int, pad_id: int) -> None:
        from rlhfkit.models.cache import AnswerCache

        unique, copies = _distinct(prompts)
        tree = join([np.asarray(prompt, np.int32) for prompt in unique])
        self.inner = inner
        self.line = pack([tree]).to(next(inner.parameters()).device)
        layout = self.line.layout
        width = layout.rows.shape[1]
        # Rows stand at the right end, so that the next token of every answer has the same place.
        behind = torch.arange(width, device=layout.rows.device) - (width - layout.lengths[:, None])
        spread = torch.tensor(copies, device=layout.rows.device)
        self.places = layout.rows.gather(1, behind.clamp(min=0))[spread]
        self.position = layout.lengths[spread, None]
        answering = behind.new_ones(len(unique), room).bool()
        self.mask = torch.cat([behind >= 0, answering], dim=1)[spread, None, None]
        self.cache = AnswerCache(inner.config.get_text_config(decoder=True).num_hidden_layers, self.places, room)
        self.width = width

    def read(self) -> Tensor:
        """Logits [B, V] of each answer's first token."""
        last, which = self.places[:, -1].unique(return_inverse=True)
        logits = self.inner(
            input_ids=self.line.input_ids[None],
            position_ids=self.line.position_ids[None],
            attention_mask=torch.empty(1, 1, 1, 1, device=last.device),  # taken as it is, and read by nobody
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
            layout=self.line.layout,
        ).logits[0]
        return logits[which]

    def keep(self, rows: list[int]) -> list[int]:
        """Let the other rows go; returns the order of those that are left."""
        gaps = sorted(set(range(len(rows))) - set(rows))
        moves = list(zip([row for row in rows if row >= len(rows)], gaps, strict=True))
        order = list(range(len(rows)))
        for row, gap in moves:
            order[gap] = row
        self.cache.move(moves, len(rows))
        chosen = torch.tensor(order, device=self.mask.device)
        self.mask, self.position = self.mask[chosen], self.position[chosen]
        return order

    def write(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of the token after these [B, 1]."""
        self.width += 1
        logits = self.inner(
            input_ids=tokens,
            position_ids=self.position,
            attention_mask=self.mask[..., : self.width],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.position = self.position + 1
        return logits


class _PaddedAnswers:
    """The same of any other model, with transformers' own cache: prompts are padded on the left."""

    def __init__(self, inner: Any, prompts: Sequence[Sequence[int]], room: int, pad_id: int) -> None:
        from transformers import DynamicCache

        unique, copies = _distinct(prompts)
        longest = max(map(len, unique))
        ids = torch.full((len(unique), longest), pad_id, dtype=torch.long)
        mask = torch.zeros((len(unique), longest), dtype=torch.long)
        for i, prompt in enumerate(unique):
            ids[i, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        device = next(inner.parameters()).device
        self.inner = inner
        self.ids, self.mask, self.spread = ids.to(device), mask.to(device), torch.tensor(copies, device=device)
        self.position = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=inner.config)

    def read(self) -> Tensor:
        logits = self._pass(self.ids)
        if len(self.ids) < len(self.spread):
            self.cache.batch_select_indices(self.spread)
        self.mask, self.position = self.mask[self.spread], self.position[self.spread]
        return logits[self.spread]

    def keep(self, rows: list[int]) -> list[int]:
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        self.mask, self.position = self.mask[chosen], self.position[chosen]
        return rows

    def write(self, tokens: Tensor) -> Tensor:
        self.position = self.position[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._pass(tokens)

    def _pass(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Each prompt once, and of every answer which of them it follows."""
    places: dict[tuple[int, ...], int] = {}
    copies = [places.setdefault(tuple(int(i) for i in prompt), len(places)) for prompt in prompts]
    return list(places), copies


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One token per row by inverting the cumulative distribution at a given uniform number.

    Args:
        logits: [B, V] float32.
        uniforms: [B] in [0, 1); on any device.
        settings: temperature and top_p.

    Returns:
        [B] token ids.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    uniforms = uniforms.to(logits.device, torch.float64)
    if settings.top_p < 1:
        weights = _nucleus(torch.softmax(logits / settings.temperature, dim=-1), settings.top_p)
    else:
        weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(settings.temperature).exp_()
    # In float64: a float32 sum over 150,000 entries is off by more than the rarest tokens' probability. First the block
    # is found in which the number falls, then the token in it: one sum over everything, not a running one.
    blocks = pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    block, rest = _invert(blocks.sum(dim=-1, dtype=torch.float64), uniforms, scaled=True)
    inside = blocks[torch.arange(len(blocks), device=block.device), block].double()
    tokens = block * BLOCK + _invert(inside, rest, scaled=False)[0]
    # Of logits that are no numbers some token comes out: who looks at the answer's probabilities says what is wrong.
    return tokens.clamp(max=logits.shape[1] - 1)


def _invert(weights: Tensor, threshold: Tensor, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """Where the running sum first exceeds the threshold (``scaled``: its share of the sum), and by what it may do so.

    Args:
        weights: [B, n] float64.
        threshold: [B].

    Returns:
        [B] places, never one of weight 0, and what of the threshold is left for the place.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    # Rounding must not carry the threshold to the very end, behind which nothing is.
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(threshold * total if scaled else threshold, below).clamp(min=0)
    place = torch.searchsorted(cumulative, threshold[:, None], right=True).clamp(max=weights.shape[1] - 1)
    before = cumulative.gather(1, place) - weights.gather(1, place)
    return place.squeeze(1), threshold - before.squeeze(1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered * (before < top_p)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)
