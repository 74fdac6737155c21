"""Reward model against TRL 1.16: pairs per second, peak memory and held-out accuracy.

python benchmarks/rm.py --model M --data pairs_en.jsonl --data pairs_zh.jsonl --rival-python rival/bin/python

Every contestant gets the same token ids, in the same order and batches, and starts from the same head. Pairs longer
than --max-length are left out here, since TRL would drop them and the rows would differ. --long-prompts keeps the pairs
whose prompt has at least 256 tokens and twice as many as both answers together. The held-out accuracy is computed by
plain transformers, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import ALLOCATOR, Benchmark, Job, compete, draw, options, read_jsonl, step_clock, write_jsonl

LONG_PROMPT, TIMES_ANSWERS = 256, 2
RIVALS: dict[str, dict[str, Any]] = {
    "trl-default": {"rows": 8},  # with gradient checkpointing and bf16
    "trl-fp32": {"rows": 4, "bf16": False, "gradient_checkpointing": False, "env": ALLOCATOR},
    "trl-bf16": {"rows": 4, "gradient_checkpointing": False, "env": ALLOCATOR},
}
OURS = {"rlhfkit-fp32": ["--precision", "fp32"], "rlhfkit-bf16": ["--precision", "bf16"]}


def prepare(args: Any) -> dict[str, Any]:
    """Write the pairs as our command reads them and, as ids in the order of our batches, as the rival gets them; and
    the model that all start from.
    """
    from rlhfkit.data.batch import BatchOrder
    from rlhfkit.data.sources import load_records
    from rlhfkit.models.folder import open_model
    from rlhfkit.models.text_side import load_text_side

    text = load_text_side(open_model(args.model))
    encoder = text.encoder
    groups, _ = load_records(args.data, "rm", on_bad_row="skip")
    fitting, left_out = [], 0
    for group in groups:
        kept = []
        for record in group:
            (prompt, chosen), (_, rejected) = (encoder.encode_pair(record.prompt, a) for a in record.answers[:2])
            if len(prompt) + max(len(chosen), len(rejected)) > args.max_length:
                left_out += 1
            elif not args.long_prompts or is_long(len(prompt), len(chosen) + len(rejected)):
                kept.append((record, {"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected]}))
        fitting.append(kept)
    drawn = draw(fitting, args.rows + args.eval_rows, args.seed)
    train = (
        {"prompt": [m.as_dict() for m in r.prompt], "chosen": r.answers[0], "rejected": r.answers[1]}
        for r, _ in drawn[: args.rows]
    )
    write_jsonl(args.out / "train.jsonl", train)
    order = BatchOrder(args.rows, args.batch_size, args.seed)
    batches = [order.batch(step + 1) for step in range(order.steps_per_epoch)]
    write_jsonl(args.out / "train_ids.jsonl", (drawn[i][1] for batch in batches for i in batch))
    write_jsonl(args.out / "held_out_ids.jsonl", (ids for _, ids in drawn[args.rows :]))
    return {
        "pairs_too_long": left_out,
        "tokens_of_all_rows": sum(len(ids) for _, pair in drawn[: args.rows] for ids in pair.values()),
        "work": [len(batch) for batch in batches],
        "start": start_model(args, text.tokenizer),
    }


def is_long(prompt: int, answers: int) -> bool:
    return prompt >= LONG_PROMPT and prompt >= TIMES_ANSWERS * answers


def start_model(args: Any, tokenizer: Any) -> Path:
    """The model with a small new head.

    The tokenizer's pad is not its end of turn: where it is, transformers takes the end of an answer for padding and
    reads the score one token early, and the rival would be trained on another number than is compared here.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = Path(args.out) / "start"
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=1 / (model.config.hidden_size + 1))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def held_out_accuracy(job: Job) -> float:
    """Share of pairs whose better answer scores higher, one row at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32).eval()

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            return float(model.score(hidden))

    pairs = read_jsonl(Path(job["rows"]) / "held_out_ids.jsonl")
    return sum(score(pair["chosen_ids"]) > score(pair["rejected_ids"]) for pair in pairs) / len(pairs)


def train_rival(name: str, job: Job) -> dict[str, Any]:
    """TRL, in its own process."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    settings = {key: value for key, value in RIVALS[name].items() if key not in ("rows", "env")}
    batch = job["batch_size"]
    rows = min(RIVALS[name]["rows"], batch)
    config = RewardConfig(
        output_dir=job["out"], per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows,
        num_train_epochs=1, learning_rate=job["lr"], lr_scheduler_type="linear", warmup_steps=0, seed=job["seed"],
        train_sampling_strategy="sequential", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        max_length=job["max_length"], **settings,
    )  # fmt: skip
    data = read_jsonl(Path(job["rows"]) / "train_ids.jsonl")
    clock = step_clock()
    trainer = RewardTrainer(
        job["model"], args=config, train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[clock],
    )  # fmt: skip
    if len(trainer.train_dataset) != len(data):
        raise SystemExit(f"TRL kept {len(trainer.train_dataset)} of {len(data)} pairs")
    trainer.train()
    trainer.save_model(job["out"])
    return {"seconds": clock.seconds, "work": [len(data[i : i + batch]) for i in range(0, len(data), batch)]}


BENCHMARK = Benchmark(
    script=__file__,
    stage="rm",
    package=("trl", "1.16.0"),
    rivals=RIVALS,
    ours=OURS,
    unit="pairs",
    figure="held-out accuracy",
    prepare=prepare,
    train_rival=train_rival,
    held_out=held_out_accuracy,
)

if __name__ == "__main__":
    PARSER = options(__doc__, out="runs/bench-rm", rows=64, eval_rows=64, batch_size=16, lr=2e-5)
    PARSER.add_argument("--long-prompts", action="store_true", help="only pairs whose prompt is long")
    compete(BENCHMARK, PARSER)
