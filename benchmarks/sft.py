"""SFT against TRL 1.16: supervised tokens per second, peak memory and held-out loss.

python benchmarks/sft.py --model M --data alpaca_en.jsonl --data alpaca_zh.jsonl --rival-python rival/bin/python

Every contestant gets the same token ids with the same loss mask, in the same order and batches, with the same learning
rate, schedule, clipping and number of optimiser steps. The held-out loss is computed by plain transformers, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import ALLOCATOR, Benchmark, Job, compete, draw, options, read_jsonl, step_clock, write_jsonl

RIVALS: dict[str, dict[str, Any]] = {
    "trl-default": {"rows": 8},  # with gradient checkpointing and bf16
    "trl-fp32": {"rows": 4, "bf16": False, "gradient_checkpointing": False, "env": ALLOCATOR},
    "trl-bf16": {"rows": 4, "gradient_checkpointing": False, "env": ALLOCATOR},
    "trl-bf16-padding-free": {
        "rows": 4, "gradient_checkpointing": False, "padding_free": True, "max_length": None, "env": ALLOCATOR,
    },
}  # fmt: skip
OURS = {"rlhfkit-fp32": ["--precision", "fp32"], "rlhfkit-bf16": ["--precision", "bf16"]}


def prepare(args: Any) -> dict[str, Any]:
    """Write the rows as our command reads them and, as ids in the order of our batches, as the rival gets them."""
    from rlhfkit.data.batch import BatchOrder
    from rlhfkit.data.sources import load_records
    from rlhfkit.models.folder import open_model
    from rlhfkit.models.text_side import load_text_side

    encoder = load_text_side(open_model(args.model)).encoder
    groups, _ = load_records(args.data, "sft", on_bad_row="skip")
    ids = []
    records = draw(groups, args.rows + args.eval_rows, args.seed)
    for record in records:
        encoded = encoder.encode(record.messages)
        labels = [i if learned else -100 for i, learned in zip(encoded.ids, encoded.supervised, strict=True)]
        ids.append({"input_ids": encoded.ids[: args.max_length], "labels": labels[: args.max_length]})
    train = ({"messages": [m.as_dict() for m in record.messages]} for record in records[: args.rows])
    write_jsonl(args.out / "train.jsonl", train)
    order = BatchOrder(args.rows, args.batch_size, args.seed)
    batches = [[ids[i] for i in order.batch(step + 1)] for step in range(order.steps_per_epoch)]
    write_jsonl(args.out / "train_ids.jsonl", (row for batch in batches for row in batch))
    write_jsonl(args.out / "held_out_ids.jsonl", ids[args.rows :])
    return {
        "tokens": sum(len(row["input_ids"]) for row in ids[: args.rows]),
        "work": [sum(map(learned_tokens, batch)) for batch in batches],
    }


def learned_tokens(row: dict[str, Any]) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def held_out_loss(job: Job) -> float:
    """Mean loss per supervised token, one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in read_jsonl(Path(job["rows"]) / "held_out_ids.jsonl"):
        if learned := learned_tokens(row):
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * learned
            count += learned
    return total / count


def train_rival(name: str, job: Job) -> dict[str, Any]:
    """TRL, in its own process."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = {key: value for key, value in RIVALS[name].items() if key not in ("rows", "env")}
    batch = job["batch_size"]
    rows = min(RIVALS[name]["rows"], batch)
    config = SFTConfig(
        output_dir=job["out"], per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows,
        num_train_epochs=1, learning_rate=job["lr"], lr_scheduler_type="linear", warmup_steps=0, seed=job["seed"],
        train_sampling_strategy="sequential", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_length": job["max_length"], **settings},
    )  # fmt: skip
    data = read_jsonl(Path(job["rows"]) / "train_ids.jsonl")
    clock = step_clock()
    trainer = SFTTrainer(
        job["model"], args=config, train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(job["out"])
    work = [sum(map(learned_tokens, data[i : i + batch])) for i in range(0, len(data), batch)]
    return {"seconds": clock.seconds, "work": work}


BENCHMARK = Benchmark(
    script=__file__,
    stage="sft",
    package=("trl", "1.16.0"),
    rivals=RIVALS,
    ours=OURS,
    unit="supervised tokens",
    figure="held-out loss",
    prepare=prepare,
    train_rival=train_rival,
    held_out=held_out_loss,
)

if __name__ == "__main__":
    compete(BENCHMARK, options(__doc__, out="runs/bench-sft", rows=96, eval_rows=64, batch_size=16, lr=2e-5))
