"""From scores to rewards per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * KL at every token, plus the score at the answer's last token (Ziegler et al. 2019, equation 2).

    Args:
        scores: [B] one score per answer.
        kl: [B, T] KL estimate per token.
        mask: [B, T] true at the answer's tokens; an answer without tokens gets no reward.

    Returns:
        [B, T] rewards, 0 outside the mask.
    """
    rewards = -kl_coef * kl * mask
    lengths = mask.sum(dim=1)
    rows = lengths.nonzero().squeeze(1)
    rewards[rows, lengths[rows] - 1] += scores[rows].to(rewards.dtype)
    return rewards


def apply_missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores with ``penalty`` taken off where an answer was cut before its end-of-turn token. Both [B]."""
    return torch.where(ended, scores, scores - penalty)


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979, parallel update). Plain floats: easy to store."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def update(self, scores: Tensor) -> None:
        n = float(scores.numel())
        if n == 0:
            return
        mean = float(scores.double().mean())
        squares = float((scores.double() - mean).square().sum())
        total = self.count + n
        delta = mean - self.mean
        self.mean += delta * n / total
        self.squares += squares + delta * delta * self.count * n / total
        self.count = total

    @property
    def std(self) -> float:
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0
