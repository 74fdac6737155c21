"""Episodes of PPO: sampled, scored and looked at by the policy and its reference before any update.

Shapes: E episodes, T tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhfkit.data.batch import TokenBatch
from rlhfkit.data.packing import Tree, group_by_tokens, pack, part_ends, shared_beginning
from rlhfkit.data.tokenize import PromptRow
from rlhfkit.models.reward_sources import WeightedReward
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.text_side import TextSide
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
    cut: bool | None = None  # whether a reward model saw a part of the conversation alone; None without reward models
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

    Prompts of like length are sampled together, so that attention has little padding to look at.
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
    """Fill in ``score``, ``components`` and ``cut``."""
    if not episodes:
        return
    totals, components = reward.score([e.prompt.record for e in episodes], [e.text for e in episodes])
    for i, episode in enumerate(episodes):
        episode.score = totals[i]
        episode.components = {name: scores[i] for name, scores in components.items()}
    for episode, cut in zip(episodes, reward.cut, strict=False):
        episode.cut = cut


def collate_episodes(episodes: Sequence[Episode], device: torch.device) -> TokenBatch:
    """Answers with their prompts, which neighbours share; the positions are those that choose answer tokens."""
    trees = _trees(episodes)
    packed = pack(trees)
    places: list[NDArray[np.int64]] = []
    ends = [(trunk_end, end) for trunk_end, branches in part_ends(trees) for end in branches]
    branches = [branch for tree in trees for branch in tree.branches]
    for e, branch, (trunk_end, end) in zip(episodes, branches, ends, strict=True):
        # The prompt's last token chooses the answer's first, each other one the next.
        choosing = np.arange(end - len(e.response) - 1, end - 1)
        if len(branch) == len(e.response):
            choosing[:1] = trunk_end - 1
        places.append(choosing)
    answers = np.concatenate([np.asarray(e.response, np.int64) for e in episodes])
    return TokenBatch(packed, torch.from_numpy(np.concatenate(places)), torch.from_numpy(answers)).to(device)


def _trees(episodes: Sequence[Episode]) -> list[Tree]:
    """Episodes as trees, in their order: either a prompt is the trunk of its answers, or what all prompts begin with
    is the trunk of them all. One level alone is built; the one that computes fewer tokens is taken.
    """
    answers = [np.asarray(e.response, np.int32) for e in episodes]
    apart, start = [], 0
    for prompt, count in _by_prompt(episodes):
        apart.append(Tree(prompt, tuple(answers[start : start + count])))
        start += count
    size = shared_beginning([e.prompt.prompt for e in episodes])
    rests = (np.concatenate([e.prompt.prompt[size:], a]) for e, a in zip(episodes, answers, strict=True))
    together = Tree(episodes[0].prompt.prompt[:size], tuple(rests))
    return [together] if len(together) < sum(map(len, apart)) else apart


def by_tokens(episodes: Sequence[Episode], micro_batch_tokens: int) -> list[list[Episode]]:
    """Episodes in micro-batches, those of one prompt together as far as they fit."""
    bundles: list[list[Episode]] = []
    for e in sorted(episodes, key=lambda e: (e.prompt.prompt.tobytes(), e.index)):
        with_it = bundles and same_prompt(bundles[-1][0], e)
        if with_it and _tokens(bundles[-1]) + len(e.response) <= micro_batch_tokens:
            bundles[-1].append(e)
        else:
            bundles.append([e])
    # What all prompts begin with is computed once in a micro-batch, if no prompt is; see `_trees`.
    shared = shared_beginning([e.prompt.prompt for e in episodes]) if 0 < len(bundles) == len(episodes) else 0
    sizes = [(_tokens(bundle) - shared, len(bundle), max(e.length for e in bundle)) for bundle in bundles]
    groups = group_by_tokens(sizes, max(1, micro_batch_tokens - shared))
    return [[e for i in group for e in bundles[i]] for group in groups]


def same_prompt(one: Episode, other: Episode) -> bool:
    return np.array_equal(one.prompt.prompt, other.prompt.prompt)


def _tokens(bundle: Sequence[Episode]) -> int:
    return len(bundle[0].prompt.prompt) + sum(len(e.response) for e in bundle)


def _by_prompt(episodes: Sequence[Episode]) -> list[tuple[NDArray[np.int32], int]]:
    """Each prompt, and how many neighbours have it."""
    groups: list[tuple[Episode, int]] = []
    for e in episodes:
        if groups and same_prompt(groups[-1][0], e):
            groups[-1] = (e, groups[-1][1] + 1)
        else:
            groups.append((e, 1))
    return [(e.prompt.prompt, count) for e, count in groups]


@torch.no_grad()
def look_back(
    episodes: Sequence[Episode],
    policy: Any,
    reference: PolicyModel | None,
    settings: SamplingSettings,
    *,
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
    how = (settings.temperature, settings.vocabulary)
    for group in by_tokens(episodes, micro_batch_tokens):
        batch = collate_episodes(group, device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            seen: PolicyOutput = inner(batch, *how, with_entropy=False)
            with reference_weights(inner.model) if reference is None else nullcontext():
                ref = (reference or inner)(batch, *how, with_entropy=False, with_values=False).logprobs
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
