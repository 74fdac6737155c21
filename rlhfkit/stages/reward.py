"""Reward model: a scalar head on the last token, trained so that better answers score higher.

Loss -log sigmoid(r_chosen - r_rejected - margin); K ranked answers give all their pairs from one forward pass, each
prompt weighing the same (Ouyang et al. 2022, section 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhfkit.config.stages import RmConfig
from rlhfkit.data.batch import BatchOrder
from rlhfkit.errors import NonFiniteError
from rlhfkit.models.save import save_model
from rlhfkit.models.wrappers import RewardModel
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import StageResult
from rlhfkit.runtime.start import finished_result, start_run
from rlhfkit.stages.common import SourceRows, fit_length, load_for_training, open_text_side, read_rows
from rlhfkit.stages.finite import not_finite
from rlhfkit.stages.pairs import (
    STATISTICS_ROWS,
    PairBatch,
    PairSums,
    Scored,
    collate_pairs,
    held_out_metrics,
    pair_batches,
    pair_losses,
    pair_means,
    pair_sums,
    score_pairs,
    score_record,
)
from rlhfkit.words import mark

SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "lr", "tokens_per_second")


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
                losses = pair_losses(scores, micro, config, config.rm.label_smoothing)
                loss = (losses * micro.weight).sum() / n
                # An infinite score may have a loss of 0.
                return torch.where(scores.isfinite().all(), loss, torch.nan)

            mine = pair_batches(batch, run)
            lr = update.lr
            result = update.step(mine, loss_of, spare=collate_pairs(batch[:1], run.device))
            if result.fault:
                raise fault_in(result.fault, step, rows, indices)
            means = pair_means(
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
