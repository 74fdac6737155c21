"""Pairs of answers through a reward model: their batches, scores and losses, and what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlhfkit.algo.calibration import evaluation_report
from rlhfkit.algo.losses import ranking_loss
from rlhfkit.config.stages import RmConfig
from rlhfkit.data.batch import share
from rlhfkit.data.packing import Packed, Tree, group_by_tokens
from rlhfkit.data.tokenize import PairRow
from rlhfkit.models.scoring import POOLING, collate_conversations
from rlhfkit.runtime.run import Run
from rlhfkit.stages.reward_report import write_evaluation

STATISTICS_ROWS = 512  # training pairs that give mean and std of the score when no held-out pairs are given


class PairBatch(NamedTuple):
    """Answers of several prompts, and which of them are compared."""

    tokens: Packed  # each prompt once, however many answers it has
    last: Tensor  # [A] where each answer ends
    chosen: Tensor  # [P] number of the better answer of each pair
    rejected: Tensor  # [P]
    margin: Tensor  # [P]
    weight: Tensor  # [P] 1 / pairs of its prompt


Scored = list[tuple[PairBatch, Tensor]]  # micro-batches and the scores [A] of their answers


class PairSums(NamedTuple):
    """Sums over prompts, to be divided by their number."""

    accuracy: Tensor
    margin: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor


def pair_batches(rows: Sequence[PairRow], run: Run) -> list[PairBatch]:
    """This process's part of some rows, in micro-batches."""
    mine = share(rows, run.rank, run.world)
    trees = [Tree(row.prompt, row.answers) for row in mine]
    groups = group_by_tokens([(len(t), t.rows, t.longest) for t in trees], run.micro_batch_tokens)
    return [collate_pairs([mine[i] for i in group], run.device) for group in groups]


def collate_pairs(rows: Sequence[PairRow], device: torch.device) -> PairBatch:
    """All answers of some prompts as one batch, and all pairs of answers to one prompt."""
    chosen: list[int] = []
    rejected: list[int] = []
    margin: list[float] = []
    weight: list[float] = []
    first = 0
    for row in rows:
        pairs = list(combinations(range(first, first + len(row.answers)), 2))  # best first: i is better than j > i
        first += len(row.answers)
        chosen += [i for i, _ in pairs]
        rejected += [j for _, j in pairs]
        margin += [row.margin] * len(pairs)
        weight += [1.0 / len(pairs)] * len(pairs)
    batch = collate_conversations([Tree(row.prompt, row.answers) for row in rows], device)
    return PairBatch(
        *batch,
        chosen=torch.tensor(chosen, device=device),
        rejected=torch.tensor(rejected, device=device),
        margin=torch.tensor(margin, device=device),
        weight=torch.tensor(weight, device=device),
    )


@torch.no_grad()
def score_pairs(module: Any, passes: Sequence[tuple[PairBatch, float]]) -> Scored:
    """Scores of this process's part of some rows.

    Args:
        module: a `RewardModel`, prepared or not.
        passes: micro-batches with weight 1, and 0 where they are passed over for nothing.
    """
    module.eval()
    scored = [(micro, module(micro.tokens, micro.last), weight) for micro, weight in passes]
    module.train()
    return [(micro, scores) for micro, scores, weight in scored if weight]


def pair_sums(scores: Tensor, batch: PairBatch) -> PairSums:
    """What a batch adds to the metrics; ``scores`` [A]."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    parts = ((chosen > rejected).float(), chosen - rejected, chosen, rejected)
    return PairSums(*((part * batch.weight).sum() for part in parts))


def held_out_metrics(scored: Scored, count: int, config: RmConfig, run: Run) -> dict[str, float]:
    """Loss, accuracy, margin and scores of held-out rows, each row weighing the same.

    Args:
        scored: by `score_pairs`.
        count: rows over all processes.
        config: how the loss is made.
        run: adds up over processes.
    """
    losses = [(pair_losses(scores, micro, config) * micro.weight).sum() for micro, scores in scored]
    sums = [pair_sums(scores, micro) for micro, scores in scored]
    means = pair_means([sum(losses), *map(sum, zip(*sums, strict=True))] if sums else [0.0] * 5, count, run)
    return {"eval_loss": means[0], **{f"eval_{n}": v for n, v in zip(PairSums._fields, means[1:], strict=True)}}


def score_record(scored: Scored, config: RmConfig, run: Run, *, held_out: bool) -> dict[str, Any]:
    """What a reward model's record says: how scores are made, their mean and spread. Writes evaluation.json if the
    scores are of held-out rows.
    """
    answers = gather_object([score for _, scores in scored for score in scores.tolist()])
    pairs = gather_object([pair for micro, scores in scored for pair in _pairs(scores, micro)])
    if held_out:
        chosen, rejected, weights = map(list, zip(*pairs, strict=True))
        write_evaluation(run, evaluation_report(chosen, rejected, weights))
    return {
        "pooling": POOLING,
        "max_length": config.data.max_length,
        "precision": run.precision,
        "quantize": config.model.quantize,
        "score_mean": float(np.mean(answers)),
        "score_std": float(np.std(answers)),
    }


def pair_losses(scores: Tensor, batch: PairBatch, config: RmConfig, label_smoothing: float = 0.0) -> Tensor:
    """The ranking loss [P] of each pair; ``scores`` [A]."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    return ranking_loss(chosen, rejected, batch.margin, config.rm.center_coef, label_smoothing)


def pair_means(sums: Sequence[Any], count: int, run: Run) -> list[float]:
    """Sums over this process's prompts as means over the ``count`` prompts of all processes."""
    return [value / count for value in run.sum_over_processes([float(s) for s in sums])]


def _pairs(scores: Tensor, batch: PairBatch) -> list[tuple[float, float, float]]:
    """Of each pair the scores of the better and the worse answer, and what it weighs."""
    sides = (scores[batch.chosen], scores[batch.rejected], batch.weight)
    return list(zip(*(side.tolist() for side in sides), strict=True))
