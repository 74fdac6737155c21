"""PPO against TRL 1.12, the last version that has it: episodes per second, peak memory, reward and KL.

python benchmarks/ppo.py --model M --data alpaca_en.jsonl --pairs pairs.jsonl --rival-python rival/bin/python
python benchmarks/ppo.py --rollouts --model M --data alpaca_en.jsonl

Every contestant gets the same prompts, reward weights and hyper-parameters, and makes the same number of optimiser
steps. ``--rollouts`` compares decoding alone with transformers' ``generate``.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import (
    ALLOCATOR,
    Job,
    Result,
    draw,
    machine,
    options,
    read_jsonl,
    refuse_if_absent,
    report,
    run_measured,
    step_clock,
    steps_of_run,
    write_jsonl,
)

TRL = "1.12.0"
LORA_RANK = 16
PPO = {
    "ppo_epochs": 4, "kl_coef": 0.05, "cliprange": 0.2, "value_cliprange": 0.2, "value_coef": 0.1, "gamma": 1.0,
    "lam": 0.95, "temperature": 1.0,
}  # fmt: skip
# TRL's batch is --batch-size, in micro-batches of four. The checkpointed ones are as its documentation has people write
# them: gradient checkpointing is its default, saves memory and costs time.
RIVALS: dict[str, dict[str, Any]] = {
    "trl-fp32-checkpointed": {"bf16": False, "gradient_checkpointing": True},
    "trl-fp32": {"bf16": False, "gradient_checkpointing": False},
    "trl-bf16": {"bf16": True, "gradient_checkpointing": False},
    "trl-lora-fp32-checkpointed": {"bf16": False, "gradient_checkpointing": True, "lora": True},
    "trl-lora-fp32": {"bf16": False, "gradient_checkpointing": False, "lora": True},
    "trl-lora-bf16": {"bf16": True, "gradient_checkpointing": False, "lora": True},
}
OURS = {
    "rlhfkit-fp32": ["--precision", "fp32"],
    "rlhfkit-bf16": ["--precision", "bf16"],
    "rlhfkit-fp32-separate-value": ["--precision", "fp32", "--value-model", "separate"],
    "rlhfkit-lora-fp32": ["--precision", "fp32", "--lora-rank", str(LORA_RANK)],
    "rlhfkit-lora-bf16": ["--precision", "bf16", "--lora-rank", str(LORA_RANK)],
}
BENCH: Any = SimpleNamespace(rivals=RIVALS, ours=OURS, unit="episodes", figure="reward")
SAMPLES = 4  # of each prompt in the second half of --rollouts


def main() -> None:
    parser = ppo_options(__doc__, prompt_tokens=64, answer_tokens=48, out="runs/bench-ppo", rows=64, lr=1e-6)
    parser.add_argument("--lora-lr", type=float, default=1e-5, help="learning rate of the LoRA form")
    parser.add_argument("--rollouts", action="store_true", help="compare decoding alone")
    args = parser.parse_args()
    if args.contestant:
        job: Job = json.loads(args.job.read_text())
        found = decode(args.contestant, job) if job.get("rollouts") else train_rival(args.contestant, job)
        Path(job["result"]).write_text(json.dumps(found))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args)
    if args.rollouts:
        compare_rollouts(args)
        return
    unknown = set(args.only) - {*RIVALS, *OURS}
    if unknown:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: there are {', '.join([*OURS, *RIVALS])}")
    names = args.only or [*RIVALS, *OURS]
    if set(names) & set(RIVALS):
        refuse_if_absent(args.rival_python, "trl", TRL)
    adapter, merged = reward_model(args)
    results, reached = [], {}
    for name in names:
        result, kl = train_ours(args, name, adapter, merged) if name in OURS else rival(args, name, merged)
        results.append(result)
        reached[name] = {"reward_first": result.before, "reward_last": result.after, "kl_last": kl}
        rate = result.rate(args.warm_up)
        print(f"{name}: {rate:.3f} episodes/s, {result.peak_memory_gib:.2f} GiB, KL {kl:.3f}", flush=True)
    report(results, args, BENCH, {"machine": machine(), "reached": reached})


def ppo_options(description: str | None, *, prompt_tokens: int, answer_tokens: int, **defaults: Any) -> ArgumentParser:
    """What every benchmark of PPO takes."""
    parser = options(description, eval_rows=0, batch_size=16, **defaults)
    parser.add_argument("--pairs", action="append", default=[], help="preference rows for the reward model; repeatable")
    parser.add_argument("--reward-model", type=Path, help="LoRA reward model made by rlhfkit rm, instead of --pairs")
    parser.add_argument("--prompt-tokens", type=int, default=prompt_tokens, help="longest prompt")
    parser.add_argument("--answer-tokens", type=int, default=answer_tokens, help="longest answer")
    return parser


def prepare(args: Any) -> None:
    """Write the prompts as our command reads them and, as token ids, as the rival gets them."""
    from rlhfkit.data.sources import load_records
    from rlhfkit.models.folder import open_model
    from rlhfkit.models.text_side import load_text_side

    encoder = load_text_side(open_model(args.model)).encoder
    groups, _ = load_records(args.data, "sft", on_bad_row="skip")
    fitting = []
    for group in groups:
        prompts = [record.messages[0].content for record in group if record.messages[0].role == "user"]
        encoded = [(text, encode(encoder, text)) for text in prompts]
        fitting.append([(text, ids) for text, ids in encoded if len(ids) <= args.prompt_tokens])
    drawn = draw(fitting, args.rows, args.seed)
    write_jsonl(args.out / "prompts.jsonl", ({"prompt": text} for text, _ in drawn))
    write_jsonl(args.out / "prompt_ids.jsonl", ({"input_ids": ids} for _, ids in drawn))


def encode(encoder: Any, text: str) -> list[int]:
    from rlhfkit.chat.messages import Message

    return [int(i) for i in encoder.encode_prompt([Message("user", text)])]


def reward_model(args: Any) -> tuple[Path, Path]:
    """The reward model as an adapter, and the same weights merged into a model that transformers loads."""
    adapter, merged = args.reward_model, args.out / "reward-merged"
    if adapter is None:
        if not args.pairs:
            raise SystemExit("give --pairs for a reward model to be trained, or --reward-model")
        run = args.out / "reward"
        adapter = run / "final"
        if not adapter.is_dir():
            command = [
                sys.executable, "-m", "rlhfkit", "rm", "--model", args.model, "--out", str(run), "--lora-rank",
                str(LORA_RANK), "--lr", "5e-4", "--max-length", "256", "--trackers", "none", "--on-bad-row", "skip",
            ]  # fmt: skip
            run_measured([*command, *(word for pair in args.pairs for word in ("--data", pair))], args.out / "rm.log")
    if not merged.is_dir():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        model.save_pretrained(merged)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(merged)
    return adapter, merged


# -- contestants -------------------------------------------------------------------------------------------------------


def train_ours(args: Any, name: str, adapter: Path, merged: Path) -> tuple[Result, float]:
    lora = "--lora-rank" in OURS[name]
    command = [
        sys.executable, "-m", "rlhfkit", "ppo", "--model", args.model, "--data", str(args.out / "prompts.jsonl"),
        "--reward", str(adapter if lora else merged), "--out", str(args.out / name), "--batch-size",
        str(args.batch_size), "--rollout-size", str(args.batch_size), "--episodes", str(args.rows),
        "--max-prompt-length", str(args.prompt_tokens), "--max-new-tokens", str(args.answer_tokens),
        "--lr", str(args.lora_lr if lora else args.lr), "--max-grad-norm", "0", "--seed", str(args.seed),
        "--save-every", "0", "--trackers", "none", *OURS[name],
    ]  # fmt: skip
    for key, value in PPO.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    wall, peak = run_measured(command, args.out / f"{name}.log")
    seconds = steps_of_run(args.out / name)
    rewards, kl = metric(args.out / name, "reward_mean"), metric(args.out / name, "kl")
    work = [args.batch_size] * len(seconds)
    return Result(name, " ".join(OURS[name]), seconds, work, peak, wall, rewards[0], rewards[-1]), kl[-1]


def metric(run: Path, name: str) -> list[float]:
    """A figure of each step of one of our runs."""
    return [line[name] for line in read_jsonl(run / "metrics.jsonl") if "event" not in line]


def rival(args: Any, name: str, merged: Path) -> tuple[Result, float]:
    job = {
        "model": args.model, "reward": str(merged), "prompts": str(args.out / "prompt_ids.jsonl"),
        "out": str(args.out / name), "batch_size": args.batch_size, "answer_tokens": args.answer_tokens,
        "episodes": args.rows,
        "lr": args.lora_lr if RIVALS[name].get("lora") else args.lr, "seed": args.seed,
    }  # fmt: skip
    found, wall, peak = own_process(args, args.rival_python, name, job)
    settings = ", ".join(f"{k}={v}" for k, v in RIVALS[name].items())
    rewards, kl = found["rewards"], found["kl"]
    work = [args.batch_size] * len(found["seconds"])
    return Result(name, settings, found["seconds"], work, peak, wall, rewards[0], rewards[-1]), kl[-1]


def own_process(
    args: Any, python: str, name: str, job: Job, script: str = __file__
) -> tuple[dict[str, Any], float, float]:
    """Run a script's ``main`` in a process of its own; returns what it found, seconds and peak memory."""
    job["result"] = str(args.out / f"{name}.json")
    path = args.out / f"{name}.job.json"
    path.write_text(json.dumps(job))
    given = ["--model", str(args.model), "--data", "-", "--contestant", name, "--job", str(path)]
    wall, peak = run_measured([python, script, *given], args.out / f"{name}.log", ALLOCATOR)
    return json.loads(Path(job["result"]).read_text()), wall, peak


def train_rival(name: str, job: Job, reward_of: Any = None) -> dict[str, Any]:
    """TRL, in its own process. ``reward_of`` makes a reward model from its tokenizer, in place of the job's."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings = dict(RIVALS[name])
    lora = None
    if settings.pop("lora", False):
        from peft import LoraConfig

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
        )
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    if tokenizer.pad_token == tokenizer.eos_token:
        # It takes every pad for padding, the ends of turns in the prompts too.
        tokenizer.pad_token = tokenizer.unk_token

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32)

    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    reference = None if lora else AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = Dataset.from_list(read_jsonl(job["prompts"]))
    micro_batch = job.get("micro_batch", 4)
    config = PPOConfig(
        output_dir=job["out"], per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job["batch_size"] // micro_batch,
        num_mini_batches=1, num_ppo_epochs=PPO["ppo_epochs"], total_episodes=job["episodes"],
        response_length=job["answer_tokens"], temperature=PPO["temperature"], stop_token="eos", kl_coef=PPO["kl_coef"],
        cliprange=PPO["cliprange"], cliprange_value=PPO["value_cliprange"], vf_coef=PPO["value_coef"],
        gamma=PPO["gamma"], lam=PPO["lam"], learning_rate=job["lr"], lr_scheduler_type="constant", seed=job["seed"],
        local_rollout_forward_batch_size=job["batch_size"], num_sample_generations=0, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    logged: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "objective/scores" in logs:
                logged.append(dict(logs))

    clock = step_clock()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=reward_of(tokenizer) if reward_of else classifier(), value_model=classifier(),
        train_dataset=rows, eval_dataset=rows.select(range(4)), callbacks=[clock, Log()], peft_config=lora,
    )  # fmt: skip
    trainer.train()
    return {
        "seconds": clock.seconds,
        "rewards": [float(line["objective/scores"]) for line in logged],
        "kl": [float(line["objective/kl"]) for line in logged],
    }


# -- decoding alone ----------------------------------------------------------------------------------------------------


def compare_rollouts(args: Any) -> None:
    lines = ["| answers per prompt | weights | transformers.generate, tokens / s | rlhfkit, tokens / s | ratio |"]
    lines += ["|---|---|---|---|---|"]
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        for samples in (1, SAMPLES):
            rates = {}
            for who in ("generate", "rlhfkit"):
                name = f"{who}-{dtype}-{samples}"
                job = {
                    "rollouts": True, "model": args.model, "prompts": str(args.out / "prompt_ids.jsonl"),
                    "dtype": dtype, "samples": samples, "batch_size": args.batch_size,
                    "answer_tokens": args.answer_tokens,
                }  # fmt: skip
                done, _, peak = own_process(args, sys.executable, name, job)
                rates[who] = done["tokens"] / done["seconds"]
                found[name] = {**done, "peak_memory_gib": peak}
                print(f"{name}: {rates[who]:.1f} tokens/s, {peak:.2f} GiB", flush=True)
            ratio = rates["rlhfkit"] / rates["generate"]
            lines.append(f"| {samples} | {dtype} | {rates['generate']:.1f} | {rates['rlhfkit']:.1f} | {ratio:.2f} |")
    table = "\n".join(lines)
    print(table)
    (args.out / "rollouts.md").write_text(table + "\n", encoding="utf-8")
    (args.out / "rollouts.json").write_text(json.dumps({"machine": machine(), "results": found}, indent=2) + "\n")


def decode(name: str, job: Job) -> dict[str, Any]:
    """Sample answers; the first batch is not timed. Counted are tokens up to the end of each answer."""
    rows = [row["input_ids"] for row in read_jsonl(job["prompts"])]
    samples = job["samples"]
    per_batch = job["batch_size"] // samples
    batches = [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)][: 1 + len(rows) // job["batch_size"]]
    sample = decode_ours(job) if name.startswith("rlhfkit") else decode_generate(job)
    tokens, seconds = 0, 0.0
    for i, batch in enumerate(batches):
        started = time.perf_counter()
        count = sample(batch, i)
        if i:
            seconds += time.perf_counter() - started
            tokens += count
    return {"tokens": tokens, "seconds": seconds}


def decode_generate(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")

    def sample(batch: list[list[int]], seed: int) -> int:
        torch.manual_seed(seed)
        padded = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **padded, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=job["answer_tokens"],
                num_return_sequences=job["samples"], eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        answers = out[:, padded["input_ids"].shape[1] :].tolist()
        ends = [a.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in a else len(a) for a in answers]
        return sum(ends)

    return sample


def decode_ours(job: Job) -> Any:
    import torch

    from rlhfkit.models.folder import open_model
    from rlhfkit.models.load import load_model
    from rlhfkit.models.sampling import SamplingSettings, sample_answers
    from rlhfkit.models.text_side import load_text_side
    from rlhfkit.runtime.allocator import keep_freed_memory

    keep_freed_memory()  # as every run does
    source = open_model(job["model"])
    text = load_text_side(source)
    dtype = getattr(torch, job["dtype"])
    model = load_model(source, text, "causal", lora=None, dtype=dtype).model.eval()
    settings = SamplingSettings(job["answer_tokens"], 1.0, text.tokens.stop_ids, vocabulary=len(text.tokenizer))

    def sample(batch: list[list[int]], seed: int) -> int:
        prompts = [prompt for prompt in batch for _ in range(job["samples"])]
        seeds = [(seed, i) for i in range(len(prompts))]
        answers = sample_answers(model, prompts, settings, seeds=seeds, pad_id=text.tokens.pad_id)
        return sum(len(answer.ids) for answer in answers)

    return sample


if __name__ == "__main__":
    main()
