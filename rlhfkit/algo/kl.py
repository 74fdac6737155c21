"""KL between policy and reference from samples, and the controller of its weight.

Estimators after Schulman, "Approximating KL Divergence" (2020): with r = p_ref(x) / p(x) and x drawn from p,
k1 = -log r is unbiased, k2 = (log r)^2 / 2 has little variance but is biased, k3 = (r - 1) - log r is unbiased and
never negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """KL(policy || reference) per token in nats, from the sampled tokens' log-probabilities (any one shape)."""
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(log_ratio) - log_ratio


@dataclass
class KlController:
    """Weight of the KL penalty; adaptive where ``target`` is set (Ziegler et al. 2019, section 2.2).

    Args:
        coef: current weight.
        target: KL per answer to steer towards (nats); 0 keeps ``coef``.
        horizon: episodes over which a lasting deviation of 20 % changes the weight by about 20 %.
    """

    coef: float
    target: float = 0.0
    horizon: float = 10000.0

    def update(self, kl: float, episodes: int) -> None:
        """Move the weight after ``episodes`` answers whose mean KL was ``kl``."""
        if self.target > 0:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self.horizon
