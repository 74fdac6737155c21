"""Episodes of PPO: sampled, scored and looked at by the policy and its reference before any update.

Shapes: E episodes, T tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhfkit.data.batch import TokenBatch, collate, split_by_tokens, token_row
from rlhfkit.data.tokenize import PromptRow
from rlhfkit.models.load import TextSide
from rlhfkit.models.reward_sources import WeightedReward
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.wrappers import PolicyModel, PolicyOutput, reference_weights

Floats = NDArray[np.float32]


@dataclass
class Episode:
    """One sampled answer and all that is known about it. ``index`` is its place in the global rollout."""

    index: int
    prompt: PromptRow
    response: list[int]  # ids, the stop token included
    ended: bool
    text: str
    score: float = 0.0
    components: dict[str, float] = field(default_factory=dict)
    logprobs: Floats = field(default_factory=lambda: np.zeros(0, np.float32))  # [len(response)], as those below
    ref_logprobs: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    values: Floats = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def length(self) -> int:
        return len(self.prompt.prompt) + len(self.response)


@dataclass(frozen=True, slots=True)
class Rollout:
    """All episodes of a rollout as padded tensors, the same on every process."""

    episodes: list[Episode]
    mask: Tensor  # [E, T] bool
    logprobs: Tensor  # [E, T] of the policy that sampled
    ref_logprobs: Tensor  # [E, T]
    values: Tensor  # [E, T], zeros without a value function
    scores: Tensor  # [E]
    ended: Tensor  # [E] bool


def sample_episodes(
    model: Any,
    prompts: Sequence[tuple[int, PromptRow]],
    text: TextSide,
    settings: SamplingSettings,
    *,
    seed: tuple[int, ...],
    batch_size: int,
    autocast: torch.dtype | None,
) -> list[Episode]:
    """Answers to (episode index, prompt) pairs; an episode's randomness depends on ``seed`` and its index alone.

    Prompts of like length are sampled together, so that little left padding is computed.
    """
    episodes: list[Episode] = []
    ordered = sorted(prompts, key=lambda item: -len(item[1].prompt))
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        answers = sample_answers(
            model,
            [row.prompt.tolist() for _, row in part],
            settings,
            seeds=[(*seed, index) for index, _ in part],
            pad_id=text.tokens.pad_id,
            autocast=autocast,
        )
        for (index, row), answer in zip(part, answers, strict=True):
            words = text.tokenizer.decode(answer.ids, skip_special_tokens=True)
            episodes.append(Episode(index, row, answer.ids, answer.ended, words))
    return sorted(episodes, key=lambda e: e.index)


def score_episodes(episodes: Sequence[Episode], reward: WeightedReward) -> None:
    """Fill in ``score`` and ``components``."""
    if not episodes:
        return
    totals, components = reward.score([e.prompt.record for e in episodes], [e.text for e in episodes])
    for i, episode in enumerate(episodes):
        episode.score = totals[i]
        episode.components = {name: scores[i] for name, scores in components.items()}


def collate_episodes(episodes: Sequence[Episode], pad_id: int, device: torch.device) -> TokenBatch:
    """Prompts with their answers as right-padded rows; the positions are those that choose answer tokens."""
    rows = [
        token_row([*e.prompt.prompt.tolist(), *e.response], [False] * len(e.prompt.prompt) + [True] * len(e.response))
        for e in episodes
    ]
    return collate(rows, pad_id).to(device)


def by_tokens(episodes: Sequence[Episode], micro_batch_tokens: int) -> list[list[Episode]]:
    """Episodes in micro-batches."""
    return [[episodes[i] for i in g] for g in split_by_tokens([e.length for e in episodes], micro_batch_tokens)]


@torch.no_grad()
def look_back(
    episodes: Sequence[Episode],
    policy: Any,
    reference: PolicyModel | None,
    settings: SamplingSettings,
    *,
    pad_id: int,
    device: torch.device,
    micro_batch_tokens: int,
    autocast: torch.dtype | None,
) -> None:
    """Fill in log-probabilities under policy and reference, and values.

    Args:
        episodes: sampled ones.
        policy: the prepared `PolicyModel`.
        reference: a frozen model of its own, or None where it is the policy without its adapter.
    """
    inner: PolicyModel = getattr(policy, "module", policy)
    for group in by_tokens(episodes, micro_batch_tokens):
        batch = collate_episodes(group, pad_id, device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            seen: PolicyOutput = inner(batch, settings.temperature, settings.vocabulary)
            if reference is not None:
                ref = reference(batch, settings.temperature, settings.vocabulary).logprobs
            else:
                with reference_weights(inner.model):
                    ref = inner(batch, settings.temperature, settings.vocabulary).logprobs
        lengths = [len(e.response) for e in group]
        for episode, new, old in zip(group, seen.logprobs.split(lengths), ref.split(lengths), strict=True):
            episode.logprobs, episode.ref_logprobs = new.float().cpu().numpy(), old.float().cpu().numpy()
        if seen.values.numel():
            for episode, values in zip(group, seen.values.split(lengths), strict=True):
                episode.values = values.float().cpu().numpy()


def stack(episodes: list[Episode], device: torch.device) -> Rollout:
    """Episodes as padded tensors."""
    longest = max(len(e.response) for e in episodes)

    def padded(name: str) -> Tensor:
        out = np.zeros((len(episodes), longest), np.float32)
        for i, e in enumerate(episodes):
            values = getattr(e, name)
            out[i, : len(values)] = values
        return torch.from_numpy(out).to(device)

    lengths = torch.tensor([len(e.response) for e in episodes], device=device)
    return Rollout(
        episodes=episodes,
        mask=torch.arange(longest, device=device)[None] < lengths[:, None],
        logprobs=padded("logprobs"),
        ref_logprobs=padded("ref_logprobs"),
        values=padded("values"),
        scores=torch.tensor([e.score for e in episodes], dtype=torch.float32, device=device),
        ended=torch.tensor([e.ended for e in episodes], device=device),
    )
