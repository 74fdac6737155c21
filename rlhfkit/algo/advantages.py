"""Advantages: how much better an action was than expected.

Shapes: B answers, T tokens of the longest one. Masks are true at an answer's tokens; everything outside is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T], what the value function should have said


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), each answer an episode of its own.

    Args:
        rewards: [B, T] reward after token t.
        values: [B, T] value of the state in which token t was chosen.
        mask: [B, T].
        gamma: discount per token.
        lam: 0 trusts the value function one step ahead, 1 only the rewards.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    running = rewards.new_zeros(len(rewards))  # not of a column: where all answers are empty there is none
    following = torch.zeros_like(running)  # value of the next state; 0 after the last token
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        following = values[:, t]
    return Advantages(advantages, (advantages + values) * mask)


def rloo(scores: Tensor, group_size: int) -> Tensor:
    """Score minus the mean score of the prompt's other samples (Ahmadian et al. 2024, equation 6).

    Args:
        scores: [B], the samples of a prompt next to each other.
        group_size: samples per prompt, at least 2.
    """
    groups = scores.view(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


def grpo(scores: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """Score standardised within the samples of its prompt (Shao et al. 2024, section 4.1.2)."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + eps)).view(-1)


class Moments(NamedTuple):
    """Count, sum and sum of squares: what processes add up to whiten over the global batch."""

    entries: Tensor
    total: Tensor
    squares: Tensor


def moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments of the masked entries, in float64: the variance is a difference of large numbers."""
    kept = x[mask].double()
    return Moments(mask.sum().double(), kept.sum(), kept.square().sum())


def whiten(x: Tensor, mask: Tensor, m: Moments, eps: float = 1e-8) -> Tensor:
    """(x - mean) / std at the masked entries, 0 elsewhere; ``m`` are the moments of the whole batch."""
    mean = m.total / m.entries
    variance = (m.squares / m.entries - mean.square()).clamp(min=0.0)
    return ((x - mean) * (variance + eps).rsqrt()).to(x.dtype) * mask
