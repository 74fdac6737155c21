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
from numpy.typing import NDArray
from torch import Tensor

from rlhfkit.algo.losses import ranking_loss
from rlhfkit.config.stages import RmConfig
from rlhfkit.data.batch import BatchOrder, share, split_by_tokens
from rlhfkit.data.records import PreferenceRecord
from rlhfkit.data.tokenize import PairRow, tokenize_pairs
from rlhfkit.models.load import TextSide
from rlhfkit.models.save import save_model
from rlhfkit.models.scoring import pad_rows
from rlhfkit.models.wrappers import RewardModel
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import Run, StageResult, finished_result, start_run
from rlhfkit.stages.common import load_for_training, open_text_side, read_records, say_report

SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "lr", "tokens_per_second")
STATISTICS_ROWS = 512  # training pairs that give mean and std of the score when no held-out pairs are given


class PairBatch(NamedTuple):
    """Answers of several prompts, and which of them are compared."""

    input_ids: Tensor  # [A, T] one row per answer
    attention_mask: Tensor  # [A, T]
    chosen: Tensor  # [P] row of the better answer of each pair
    rejected: Tensor  # [P]
    margin: Tensor  # [P]
    weight: Tensor  # [P] 1 / pairs of its prompt


class PairSums(NamedTuple):
    """Sums over prompts, to be divided by their number."""

    accuracy: Tensor
    margin: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor


def run(config: RmConfig) -> StageResult:
    """Train; see the module's first lines. ``final/`` holds backbone and head, and how scores were made."""
    if (done := finished_result(config)) is not None:
        return done
    run = start_run(config)

    # 1. Pairs to token ids.
    source, text = open_text_side(config)
    rows = _read(config, config.data.train, text, run, "training")
    held_out = _read(config, config.data.eval, text, run, "held out")
    run.note_data(
        row.prompt.tobytes() + b"".join(a.tobytes() for a in row.answers) + str(row.margin).encode() for row in rows
    )

    # 2. Model with its head, optimiser, order of the data.
    loaded = load_for_training(config, run, source, text, "reward")
    order = BatchOrder(len(rows), config.optim.batch_size, config.run.seed)
    total = order.total_steps(config.optim.epochs, config.optim.max_steps)
    update = Optimisation(run.accelerator, RewardModel(loaded.model), config.optim, total)
    run.begin(update.load_state_dict)

    def micro_batches(batch: Sequence[PairRow]) -> list[PairBatch]:
        mine = share(batch, run.rank, run.world)
        sizes = [len(row.answers) * (len(row.prompt) + max(map(len, row.answers))) for row in mine]
        groups = split_by_tokens(sizes, config.optim.micro_batch_tokens)
        return [collate_pairs([mine[i] for i in group], text.tokens.pad_id, run.device) for group in groups]

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        if not held_out:
            return {}
        update.module.eval()
        loss = torch.zeros((), device=run.device)
        sums = []
        spare = collate_pairs(held_out[:1], text.tokens.pad_id, run.device)
        for micro, weight in update.lockstep(micro_batches(held_out), spare):
            scores = update.module(micro.input_ids, micro.attention_mask)
            if weight:
                loss += (_losses(scores, micro, config) * micro.weight).sum()
                sums.append(pair_sums(scores, micro))
        update.module.train()
        means = _means([loss, *map(sum, zip(*sums, strict=True))] if sums else [0.0] * 5, len(held_out), run)
        return {"eval_loss": means[0], **{f"eval_{n}": v for n, v in zip(PairSums._fields, means[1:], strict=True)}}

    if run.step == 0 and held_out:
        before = evaluate()
        run.record({"event": "start", "step": 0, **before})
        run.screen.line(f"before training: eval_accuracy {before['eval_accuracy']:.3f}")

    # 3. The loop.
    update.module.train()
    with run.steps("rm", total) as steps:
        for step in steps:
            batch = [rows[i] for i in order.batch(step)]
            sums: list[PairSums] = []

            def loss_of(micro: PairBatch, n: int = len(batch), sums: list[PairSums] = sums) -> Tensor:
                scores = update.module(micro.input_ids, micro.attention_mask)
                sums.append(pair_sums(scores.detach(), micro))
                return (_losses(scores, micro, config) * micro.weight).sum() / n

            mine = micro_batches(batch)
            lr = update.lr
            result = update.step(mine, loss_of, spare=collate_pairs(batch[:1], text.tokens.pad_id, run.device))
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

    # 4. Mean and spread of the scores belong to the model: whoever uses it needs them.
    measured = held_out or rows[:STATISTICS_ROWS]
    spare = collate_pairs(measured[:1], text.tokens.pad_id, run.device)
    mean, std = _score_statistics(update.module, update.lockstep(micro_batches(measured), spare), run)
    record = {
        "pooling": "last_token",
        "max_length": config.data.max_length,
        "score_mean": mean,
        "score_std": std,
    }
    return run.finish(lambda folder: save_model(folder, run.accelerator, update.module, loaded, "rm", record))


def collate_pairs(rows: Sequence[PairRow], pad_id: int, device: torch.device) -> PairBatch:
    """All answers of some prompts as one batch, and all pairs of answers to one prompt."""
    sequences: list[NDArray[np.int32]] = []
    chosen: list[int] = []
    rejected: list[int] = []
    margin: list[float] = []
    weight: list[float] = []
    for row in rows:
        first = len(sequences)
        sequences += [np.concatenate([row.prompt, answer]) for answer in row.answers]
        pairs = list(combinations(range(first, first + len(row.answers)), 2))  # best first: i is better than j > i
        chosen += [i for i, _ in pairs]
        rejected += [j for _, j in pairs]
        margin += [row.margin] * len(pairs)
        weight += [1.0 / len(pairs)] * len(pairs)
    batch = pad_rows(sequences, pad_id, device)
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


def _losses(scores: Tensor, batch: PairBatch, config: RmConfig) -> Tensor:
    return ranking_loss(scores[batch.chosen], scores[batch.rejected], batch.margin, config.rm.center_coef)


def _means(sums: Sequence[Any], count: int, run: Run) -> list[float]:
    return [value / count for value in run.sum_over_processes([float(s) for s in sums])]


@torch.no_grad()
def _score_statistics(module: Any, passes: Sequence[tuple[PairBatch, float]], run: Run) -> tuple[float, float]:
    module.eval()
    made = [(module(micro.input_ids, micro.attention_mask).double(), weight) for micro, weight in passes]
    scores = [s for s, weight in made if weight]
    flat = torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float64)
    count, total, squares = run.sum_over_processes([len(flat), float(flat.sum()), float(flat.square().sum())])
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0) ** 0.5


def _read(config: RmConfig, specs: list[str], text: TextSide, run: Run, what: str) -> list[PairRow]:
    if not specs:
        return []
    records: list[PreferenceRecord] = read_records(config, specs, run.screen, mixed=what == "training")
    with run.screen.counting(f"tokenising {what} pairs", len(records)) as tick:
        rows, report = tokenize_pairs(records, text.encoder, config.data.max_length, tick)
    say_report(run.screen, what, report)
    return rows
