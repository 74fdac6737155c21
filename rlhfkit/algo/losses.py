"""Losses per element; the caller sums them and divides by the count of the global batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def ranking_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, center_coef: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Pairwise ranking loss -log sigmoid(r_chosen - r_rejected - margin), in float32.

    Ouyang et al. 2022, equation 1; the margin after Touvron et al. 2023, equation 2; the centring term
    ``center_coef * (r_chosen + r_rejected)^2`` after Eisenstein et al. 2023. With label smoothing e it is
    (1 - e) times the loss of the pair as it is plus e times that of the pair turned round (Wang et al. 2024,
    arXiv:2401.06080).

    Args:
        chosen, rejected, margin: [P] scores and margins of P pairs.

    Returns:
        [P] losses.
    """
    chosen, rejected = chosen.float(), rejected.float()
    ahead = chosen - rejected - margin
    loss = -F.logsigmoid(ahead)
    if label_smoothing:
        loss = loss + label_smoothing * ahead  # -log sigmoid(-x) = x - log sigmoid(x)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square()
    return loss


class PolicyLoss(NamedTuple):
    loss: Tensor  # per token
    ratio: Tensor  # new over old probability, detached
    clipped: Tensor  # whether the clipped branch was taken


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> PolicyLoss:
    """Clipped surrogate (Schulman et al. 2017, equation 7), negated. Any one shape."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return PolicyLoss(torch.maximum(plain, clipped), ratio.detach(), (clipped > plain).detach())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Half the squared error; with ``cliprange`` > 0 the worse of it and its clipped form (Huang et al. 2024, 4.3)."""
    plain = (values - returns).square()
    if cliprange <= 0:
        return 0.5 * plain
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum(plain, (near - returns).square())
