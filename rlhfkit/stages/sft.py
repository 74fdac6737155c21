"""Supervised fine-tuning: cross-entropy over what the assistant says, turn ends included.

The loss of a step is the sum over the supervised tokens of its global batch divided by their number, so neither
micro-batches nor processes change it (transformers#34191 tells what happens otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhfkit.config.stages import SftConfig
from rlhfkit.data.batch import BatchOrder, TokenBatch, TokenRow, collate, micro_batches, share
from rlhfkit.errors import NonFiniteError
from rlhfkit.models.save import save_model
from rlhfkit.models.wrappers import LanguageModel
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import StageResult
from rlhfkit.runtime.start import finished_result, start_run
from rlhfkit.stages.common import (
    SourceRows,
    first_prompts,
    fit_length,
    load_for_training,
    open_text_side,
    read_rows,
    write_answers,
)
from rlhfkit.stages.finite import not_finite
from rlhfkit.words import mark

SHOWN = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second")


def run(config: SftConfig) -> StageResult:
    """Train; see the module's first lines. ``final/`` holds the model or its adapter."""
    if config.engine == "trl":
        from rlhfkit.stages import trl_stages

        return trl_stages.run(config)
    config = fit_length(config)
    if (done := finished_result(config)) is not None:
        return done
    run = start_run(config)

    # 1. Rows to token ids with a mask over the assistant's words.
    source, text = open_text_side(config)
    rows, digest, faults = read_rows(config, config.data.train, text, run.screen, "training")
    held_out, _, more = read_rows(config, config.data.eval, text, run.screen, "held out")
    asked = first_prompts(config, config.data.eval)
    run.note_data(digest, faults + more)

    # 2. Model, optimiser, order of the data.
    loaded = load_for_training(config, run, source, text, "causal")
    order = BatchOrder(len(rows), config.optim.batch_size, config.run.seed)
    total = order.total_steps(config.optim.epochs, config.optim.max_steps)
    model = LanguageModel(
        loaded.model, label_smoothing=config.sft.label_smoothing, neftune_alpha=config.sft.neftune_alpha
    )
    update = Optimisation(run.accelerator, model, config.optim, total)
    run.begin(update.load_state_dict)

    def passes_over(batch: Sequence[TokenRow]) -> list[TokenBatch]:
        mine = share(batch, run.rank, run.world)
        return [collate(rows).to(run.device) for rows in micro_batches(mine, run.micro_batch_tokens)]

    def fault_in(
        what: str, step: int, origin: SourceRows, indices: Sequence[int], batch: Sequence[TokenRow]
    ) -> NonFiniteError:
        def logprobs(at: int) -> Tensor:
            found: Tensor = update.module(collate([batch[at]]).to(run.device)).logprobs
            return found

        return not_finite(what, step, origin, indices, logprobs, run, update)

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        if not held_out:
            return {}
        update.module.eval()
        spare = collate(held_out[:1]).to(run.device)
        passes = update.lockstep(passes_over(held_out), spare)
        loss = sum(weight * float(-update.module(micro).logprobs.sum()) for micro, weight in passes)
        (loss,) = run.sum_over_processes([loss])
        if not math.isfinite(loss):
            every = range(len(held_out))
            raise fault_in(mark("the loss of held-out rows"), run.step, held_out, every, held_out)
        write_answers(run, loaded.model, text, asked, config.data.max_length)
        update.module.train()
        return {"eval_loss": loss / sum(row.targets for row in held_out)}

    run.evaluate_first(evaluate, total, shown=SHOWN)

    # 3. The loop.
    update.module.train()
    with run.steps("sft", total) as steps:
        for step in steps:
            # Seeds of the noise, if there is any: of the row's place in this step.
            indices = order.batch(step)
            batch = [replace(rows[i], noise=(config.run.seed, step, at)) for at, i in enumerate(indices)]
            targets = sum(row.targets for row in batch)  # of the whole batch, on every process
            lr = update.lr

            def loss_of(micro: TokenBatch, n: int = targets) -> Tensor:
                return -update.module(micro).logprobs.sum() / n

            spare = collate(batch[:1]).to(run.device)
            result = update.step(passes_over(batch), loss_of, spare)
            if result.fault:
                raise fault_in(result.fault, step, rows, indices, batch)
            metrics = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, "tokens": targets}
            run.finish_step(step, total, metrics, shown=SHOWN, state=update.state_dict, evaluate=evaluate)

    # 4. The result.
    return run.finish(lambda folder: save_model(folder, run.accelerator, update.module, loaded, "sft", {}))
