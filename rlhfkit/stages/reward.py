"""Reward model: a scalar head on the last token, trained so that better answers score higher.

Loss -log sigmoid(r_chosen - r_rejected - margin); K ranked answers give all their pairs from one forward pass, each
prompt weighing the same (Ouyang et al. 2022, section 3.5).
"""

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
from rlhfkit.data.batch import BatchOrder, share
from rlhfkit.data.packing import Packed, Tree, group_by_tokens
from rlhfkit.data.tokenize import PairRow
from rlhfkit.errors import NonFiniteError
from rlhfkit.models.save import save_model
from rlhfkit.models.scoring import POOLING, collate_conversations
from rlhfkit.models.wrappers import RewardModel
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import Run, StageResult, finished_result, start_run
from rlhfkit.stages.common import SourceRows, fit_length, load_for_training, open_text_side, read_rows
from rlhfkit.stages.finite import not_finite
from rlhfkit.stages.reward_report import write_evaluation
from rlhfkit.words import mark

SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "lr", "tokens_per_second")
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


def run(config: RmConfig) -> StageResult:
    """Train; see the module's first lines. ``final/`` holds backbone and head, and how scores were made."""
    if config.engine == "trl":
        from rlhfkit.stages import trl_stages

        return trl_stages.run(config)
    config = fit_length(config)
    if (done := finished_result(config)) is not None:
        return done
    run = start_run(config)

    # 1. Pairs to token ids.
    source, text = open_text_side(config)
    rows, digest, faults = read_rows(config, config.data.train, text, run.screen, "training")
    held_out, _, more = read_rows(config, config.data.eval, text, run.screen, "held out")
    run.note_data(digest, faults + more)

    # 2. Model with its head, optimiser, order of the data.
    loaded = load_for_training(config, run, source, text, "reward")
    order = BatchOrder(len(rows), config.optim.batch_size, config.run.seed)
    total = order.total_steps(config.optim.epochs, config.optim.max_steps)
    update = Optimisation(run.accelerator, RewardModel(loaded.model), config.optim, total)
    run.begin(update.load_state_dict)

    latest: list[Scored] = []  # of the held-out pairs

    def fault_in(what: str, step: int, rows: SourceRows, indices: Sequence[int]) -> NonFiniteError:
        def scores(at: int) -> Tensor:
            one = collate_pairs([rows[indices[at]]], run.device)
            found: Tensor = update.module(one.tokens, one.last)
            return found

        return not_finite(what, step, rows, indices, scores, run, update)

    def scores_of(pairs: SourceRows, count: int) -> Scored:
        """Of the first pairs."""
        spare = collate_pairs(pairs[:1], run.device)
        scored = score_pairs(update.module, update.lockstep(pair_batches(pairs[:count], run), spare=spare))
        if any(run.sum_over_processes([sum(float((~scores.isfinite()).sum()) for _, scores in scored)])):
            raise fault_in(mark("the score"), run.step, pairs, range(count))
        return scored

    def evaluate() -> dict[str, Any]:
        if not held_out:
            return {}
        latest[:] = [scores_of(held_out, len(held_out))]
        return held_out_metrics(latest[0], len(held_out), config, run)

    run.evaluate_first(evaluate, total, shown=SHOWN)

    # 3. The loop.
    update.module.train()
    with run.steps("rm", total) as steps:
        for step in steps:
            indices = order.batch(step)
            batch = [rows[i] for i in indices]
            sums: list[PairSums] = []

            def loss_of(micro: PairBatch, n: int = len(batch), sums: list[PairSums] = sums) -> Tensor:
                scores = update.module(micro.tokens, micro.last)
                sums.append(pair_sums(scores.detach(), micro))
                losses = _losses(scores, micro, config, config.rm.label_smoothing)
                loss = (losses * micro.weight).sum() / n
                # An infinite score may have a loss of 0.
                return torch.where(scores.isfinite().all(), loss, torch.nan)

            mine = pair_batches(batch, run)
            lr = update.lr
            result = update.step(mine, loss_of, spare=collate_pairs(batch[:1], run.device))
            if result.fault:
                raise fault_in(result.fault, step, rows, indices)
            means = _means(
                [sum(values) for values in zip(*sums[: len(mine)], strict=True)] or [0.0] * 4, len(batch), run
            )
            tokens = sum(len(row.prompt) * len(row.answers) + sum(map(len, row.answers)) for row in batch)
            metrics = {
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "tokens": tokens,
                **dict(zip(PairSums._fields, means, strict=True)),
            }
            run.finish_step(step, total, metrics, shown=SHOWN, state=update.state_dict, evaluate=evaluate)

    # 4. Mean and spread of the scores belong to the model: whoever uses it needs them. The last step was evaluated,
    # unless a run is resumed that had only this left to do.
    some = (held_out, len(held_out)) if held_out else (rows, min(STATISTICS_ROWS, len(rows)))
    scored = latest[0] if latest else scores_of(*some)
    record = score_record(scored, config, run, held_out=bool(held_out))
    return run.finish(lambda folder: save_model(folder, run.accelerator, update.module, loaded, "rm", record))


def pair_batches(rows: Sequence[PairRow], run: Run) -> list[PairBatch]:
    """This process's part of some rows, in micro-batches."""
    mine = share(rows, run.rank, run.world)
    trees = [Tree(row.prompt, row.answers) for row in mine]
    groups = group_by_tokens([(len(t), t.rows, t.longest) for t in trees], run.micro_batch_tokens)
    return [collate_pairs([mine[i] for i in group], run.device) for group in groups]


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


def held_out_metrics(scored: Scored, count: int, config: RmConfig, run: Run) -> dict[str, float]:
    """Loss, accuracy, margin and scores of held-out rows, each row weighing the same.

    Args:
        scored: by `score_pairs`.
        count: rows over all processes.
        config: how the loss is made.
        run: adds up over processes.
    """
    losses = [(_losses(scores, micro, config) * micro.weight).sum() for micro, scores in scored]
    sums = [pair_sums(scores, micro) for micro, scores in scored]
    means = _means([sum(losses), *map(sum, zip(*sums, strict=True))] if sums else [0.0] * 5, count, run)
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


def pair_sums(scores: Tensor, batch: PairBatch) -> PairSums:
    """What a batch adds to the metrics; ``scores`` [A]."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    parts = ((chosen > rejected).float(), chosen - rejected, chosen, rejected)
    return PairSums(*((part * batch.weight).sum() for part in parts))


def _losses(scores: Tensor, batch: PairBatch, config: RmConfig, label_smoothing: float = 0.0) -> Tensor:
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    return ranking_loss(chosen, rejected, batch.margin, config.rm.center_coef, label_smoothing)


def _means(sums: Sequence[Any], count: int, run: Run) -> list[float]:
    return [value / count for value in run.sum_over_processes([float(s) for s in sums])]


def _pairs(scores: Tensor, batch: PairBatch) -> list[tuple[float, float, float]]:
    """Of each pair the scores of the better and the worse answer, and what it weighs."""
    sides = (scores[batch.chosen], scores[batch.rejected], batch.weight)
    return list(zip(*(side.tolist() for side in sides), strict=True))
