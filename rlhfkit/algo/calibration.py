"""What a reward model's scores of ranked pairs are worth: accuracy, margin, calibration, distribution.

Under the Bradley-Terry model that the ranking loss fits, the answer of a pair that scores higher is the better one with
probability sigmoid(|r_chosen - r_rejected|). Calibration is whether that comes true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HISTOGRAM_BINS = 16  # at most


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs whose predicted probability lies in [low, high); the last bin holds 1 as well.

    Args:
        low, high: bounds of the predicted probability that the higher score is the better answer.
        pairs: how many lie there.
        share: their part of all weight.
        predicted: mean predicted probability, None in an empty bin.
        observed: how often the higher score was the better answer; a tie is right by half. None in an empty bin.
    """

    low: float
    high: float
    pairs: int
    share: float
    predicted: float | None
    observed: float | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Weights in bins of one width: ``counts[name][i]`` lies in [edges[i], edges[i + 1]), the last bin closed."""

    edges: list[float]
    counts: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Figures over pairs, each weighted; with weights of 1 / pairs of the prompt they are averages over prompts.

    Args:
        pairs: pairs compared.
        prompts: sum of their weights.
        accuracy: share of pairs in which the better answer scores higher; a tie is wrong, as in training.
        ties: pairs with two equal scores.
        margin: mean of r_chosen - r_rejected; ``margin_std`` its spread.
        log_loss: mean of -log sigmoid(r_chosen - r_rejected); ln 2 is what equal scores give.
        confidence: mean predicted probability that the higher score is the better answer.
        calibration_error: expected calibration error (Naeini et al. 2015), the mean distance of predicted and observed
            probability over the bins, weighted by their share.
        reward_chosen, reward_rejected: mean scores; ``..._std`` their spreads.
        reliability: bins of [0.5, 1].
        histogram: scores of the better (``chosen``) and the worse (``rejected``) answers.
    """

    pairs: int
    prompts: float
    accuracy: float
    ties: int
    margin: float
    margin_std: float
    log_loss: float
    confidence: float
    calibration_error: float
    reward_chosen: float
    reward_chosen_std: float
    reward_rejected: float
    reward_rejected_std: float
    reliability: list[ReliabilityBin]
    histogram: Histogram

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluation_report(
    chosen: Sequence[float] | Tensor,
    rejected: Sequence[float] | Tensor,
    weights: Sequence[float] | Tensor,
    bins: int = 10,
) -> EvaluationReport:
    """The report on P pairs.

    Args:
        chosen, rejected: [P] scores of the better and the worse answers.
        weights: [P] how much each pair counts; positive.
        bins: rows of the reliability table.

    Raises:
        ValueError: no pair, or a score that is not finite.
    """
    chosen, rejected, weights = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (chosen, rejected, weights))
    if not len(chosen):
        raise ValueError("there is no pair to report on")
    margin = chosen - rejected
    if not bool(margin.isfinite().all()):
        raise ValueError("a score is not finite")
    share = weights / weights.sum()

    def mean(values: Tensor) -> float:
        return float((values * share).sum())

    def std(values: Tensor) -> float:
        return mean((values - mean(values)).square()) ** 0.5

    # Which of two answers stands first says nothing, so each pair is turned to where the prediction is at least 1/2.
    predicted = margin.abs().sigmoid()
    right = (margin.sign() + 1) / 2
    reliability = _reliability(predicted, right, share, bins)
    return EvaluationReport(
        pairs=len(chosen),
        prompts=float(weights.sum()),
        accuracy=mean((margin > 0).double()),
        ties=int((margin == 0).sum()),
        margin=mean(margin),
        margin_std=std(margin),
        log_loss=mean(-F.logsigmoid(margin)),
        confidence=mean(predicted),
        calibration_error=sum(
            b.share * abs(b.predicted - b.observed)
            for b in reliability
            if b.predicted is not None and b.observed is not None
        ),
        reward_chosen=mean(chosen),
        reward_chosen_std=std(chosen),
        reward_rejected=mean(rejected),
        reward_rejected_std=std(rejected),
        reliability=reliability,
        histogram=histogram({"chosen": chosen, "rejected": rejected}, {"chosen": weights, "rejected": weights}),
    )


def _reliability(predicted: Tensor, right: Tensor, share: Tensor, bins: int) -> list[ReliabilityBin]:
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=torch.float64)
    index = (torch.bucketize(predicted, edges, right=True) - 1).clamp(0, bins - 1)
    table = []
    for i in range(bins):
        inside = index == i
        weight = float(share[inside].sum())
        table.append(
            ReliabilityBin(
                low=float(edges[i]),
                high=float(edges[i + 1]),
                pairs=int(inside.sum()),
                share=weight,
                predicted=float((predicted * share)[inside].sum()) / weight if weight else None,
                observed=float((right * share)[inside].sum()) / weight if weight else None,
            )
        )
    return table


def histogram(
    scores: dict[str, Tensor], weights: dict[str, Tensor] | None = None, most: int = HISTOGRAM_BINS
) -> Histogram:
    """Several sets of scores over the same bins, whose bounds are round numbers.

    Args:
        scores: name -> [N] finite scores, not all empty.
        weights: name -> [N]; 1 each if not given.
        most: bins at most.
    """
    together = torch.cat([values.double() for values in scores.values()])
    edges = _round_edges(float(together.min()), float(together.max()), most)
    bounds = torch.tensor(edges, dtype=torch.float64)
    counts = {}
    for name, values in scores.items():
        index = (torch.bucketize(values.double(), bounds, right=True) - 1).clamp(0, len(edges) - 2)
        weight = torch.ones(len(values)) if weights is None else weights[name]
        counts[name] = torch.zeros(len(edges) - 1, dtype=torch.float64).index_add(0, index, weight.double()).tolist()
    return Histogram(edges, counts)


def _round_edges(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` bins of a width of 1, 2 or 5 times a power of ten, from below ``low`` to above ``high``."""
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):  # one value: any width will do
        low, high = low - 0.5, high + 0.5
    power = 10.0 ** (math.floor(math.log10((high - low) / most)) - 1)
    for factor in (5, 10, 20, 50, 100, 200):
        width = factor * power
        first, last = math.floor(low / width), math.floor(high / width) + 1
        if last - first <= most:
            break
    return [round(i * width, 12) for i in range(first, last + 1)]
