"""Supervised fine-tuning: cross-entropy over what the assistant says, turn ends included.

The loss of a step is the sum over the supervised tokens of its global batch divided by their number, so neither
micro-batches nor processes change it (transformers#34191 tells what happens otherwise).
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rlhfkit.chat.messages import last_user_text
from rlhfkit.config.stages import SftConfig
from rlhfkit.data.batch import BatchOrder, TokenBatch, TokenRow, collate, share, split_by_tokens
from rlhfkit.data.records import SftRecord
from rlhfkit.data.tokenize import tokenize_sft
from rlhfkit.models.load import TextSide
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.save import save_model
from rlhfkit.models.wrappers import LanguageModel
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import Run, StageResult, finished_result, start_run
from rlhfkit.stages.common import load_for_training, open_text_side, read_records, say_report

SHOWN = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second")
SAMPLES = 4  # answers shown at each evaluation
SAMPLE_TOKENS = 64


def run(config: SftConfig) -> StageResult:
    """Train; see the module's first lines. ``final/`` holds the model or its adapter."""
    if (done := finished_result(config)) is not None:
        return done
    run = start_run(config)

    # 1. Rows to token ids with a mask over the assistant's words.
    source, text = open_text_side(config)
    rows, _ = _read(config, config.data.train, text, run, "training")
    held_out, held_out_records = _read(config, config.data.eval, text, run, "held out")
    run.note_data(row.ids.tobytes() + row.supervised.tobytes() for row in rows)

    # 2. Model, optimiser, order of the data.
    loaded = load_for_training(config, run, source, text, "causal")
    order = BatchOrder(len(rows), config.optim.batch_size, config.run.seed)
    total = order.total_steps(config.optim.epochs, config.optim.max_steps)
    update = Optimisation(run.accelerator, LanguageModel(loaded.model), config.optim, total)
    run.begin(update.load_state_dict)

    def micro_batches(batch: list[TokenRow]) -> list[TokenBatch]:
        mine = share(batch, run.rank, run.world)
        groups = split_by_tokens([len(row) for row in mine], config.optim.micro_batch_tokens)
        return [collate([mine[i] for i in group], text.tokens.pad_id).to(run.device) for group in groups]

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        if not held_out:
            return {}
        update.module.eval()
        spare = collate(held_out[:1], text.tokens.pad_id).to(run.device)
        passes = update.lockstep(micro_batches(held_out), spare)
        loss = sum(weight * float(-update.module(micro).logprobs.sum()) for micro, weight in passes)
        (loss,) = run.sum_over_processes([loss])
        _sample(run, loaded.model, text, held_out_records, config.data.max_length)
        update.module.train()
        return {"eval_loss": loss / sum(row.targets for row in held_out)}

    if run.step == 0 and held_out:
        before = evaluate()
        run.record({"event": "start", "step": 0, **before})
        run.screen.line(f"before training: eval_loss {before['eval_loss']:.4f}")

    # 3. The loop.
    update.module.train()
    with run.steps("sft", total) as steps:
        for step in steps:
            batch = [rows[i] for i in order.batch(step)]
            targets = sum(row.targets for row in batch)  # of the whole batch, on every process
            lr = update.lr

            def loss_of(micro: TokenBatch, n: int = targets) -> Tensor:
                return -update.module(micro).logprobs.sum() / n

            spare = collate(batch[:1], text.tokens.pad_id).to(run.device)
            result = update.step(micro_batches(batch), loss_of, spare)
            metrics = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, "tokens": targets}
            run.finish_step(step, total, metrics, shown=SHOWN, state=update.state_dict, evaluate=evaluate)

    # 4. The result.
    return run.finish(lambda folder: save_model(folder, run.accelerator, update.module, loaded, "sft", {}))


def _read(
    config: SftConfig, specs: list[str], text: TextSide, run: Run, what: str
) -> tuple[list[TokenRow], list[SftRecord]]:
    if not specs:
        return [], []
    records: list[SftRecord] = read_records(config, specs, run.screen, mixed=what == "training")
    with run.screen.counting(f"tokenising {what} rows", len(records)) as tick:
        rows, report = tokenize_sft(records, text.encoder, config.data.max_length, tick)
    say_report(run.screen, what, report)
    return rows, records


def _sample(run: Run, model: Any, text: TextSide, records: list[SftRecord], max_length: int) -> None:
    """Write a few greedy answers to held-out prompts into samples.jsonl; the main process alone, so not if sharded."""
    if run.sharded or not run.is_main:
        return
    candidates = ((r.messages[:-1], text.encoder.encode_prompt(r.messages[:-1])) for r in records if r.messages)
    fitting = list(islice((c for c in candidates if len(c[1]) + SAMPLE_TOKENS <= max_length), SAMPLES))
    if not fitting:
        return
    prompts = [messages for messages, _ in fitting]
    settings = SamplingSettings(
        max_new_tokens=SAMPLE_TOKENS, temperature=0.0, stop_ids=text.tokens.stop_ids, vocabulary=len(text.tokenizer)
    )
    answers = sample_answers(
        model,
        [ids for _, ids in fitting],
        settings,
        seeds=[(0,)] * len(prompts),
        pad_id=text.tokens.pad_id,
        autocast=run.autocast,
    )
    run.samples(
        [
            {
                "prompt": last_user_text(p),
                "answer": text.tokenizer.decode(a.ids, skip_special_tokens=True),
                "ended": a.ended,
            }
            for p, a in zip(prompts, answers, strict=True)
        ]
    )
