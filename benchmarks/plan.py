"""How near `--plan` comes: its estimate beside the measured peak of the same run, for several settings.

    python benchmarks/plan.py --model models/smollm2-135m-instruct

Each setting runs for a few steps in a process of its own, whose peak is what the system counted (ru_maxrss) on a CPU,
and the allocator's on a GPU. Rows are made up here, long enough to fill the micro-batches. Run it again after a change
to kernels, the sampler or the optimiser; the constants that may need another value stand in rlhfkit/stages/memory.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = "the a river light stone walks under many cold green over slow small house of and then it was"
SMALL = ("--micro-batch-tokens", "512", "--batch-size", "4")
COMMON = ("--max-length", "512", *SMALL, "--max-steps", "2", "--trackers", "none")
LARGE = ("--micro-batch-tokens", "2048", "--batch-size", "8")
ROLLOUTS = ("--max-new-tokens", "48", "--max-prompt-length", "128", "--rollout-size", "16", "--ppo-epochs", "1")
LORA = ("--lora-rank", "16")
FULL = ("--batch-size", "16")  # micro-batches of as many tokens as they may have
# Name: stage, flags. {rm} and {rm_lora} are the results of the settings of that name, {rule} is a function.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rm, LoRA, bf16": ("rm", ("--precision", "bf16", *LORA)),
    "ppo, LoRA on one backbone, bf16": ("ppo", ("--precision", "bf16", *LORA, "--reward", "{rm_lora}")),
    "sft, all weights, bf16": ("sft", ("--precision", "bf16")),
    "sft, LoRA, 4bit": ("sft", ("--precision", "bf16", *LORA, "--quantize", "4bit")),
    "rm, all weights, bf16": ("rm", ("--precision", "bf16")),
    "ppo, all weights, fp32": ("ppo", ("--precision", "fp32", "--reward", "{rm}")),
    "sft, LoRA, bf16": ("sft", ("--precision", "bf16", *LORA)),
    "ppo, LoRA, value adapter, bf16": (
        "ppo", ("--precision", "bf16", *LORA, "--reward", "{rm_lora}", "--value-model", "adapter"),
    ),
    "ppo, LoRA, 4bit": ("ppo", ("--precision", "bf16", *LORA, *FULL, "--reward", "{rule}", "--quantize", "4bit")),
    "sft, all weights, fp32": ("sft", ("--precision", "fp32")),
    "sft, all weights, bf16, 2,048 tokens": ("sft", ("--precision", "bf16", *LARGE)),
    "sft, all weights, bf16, 2,048 tokens, checkpointing": (
        "sft", ("--precision", "bf16", *LARGE, "--gradient-checkpointing"),
    ),
}  # fmt: skip
REWARD_RUNS = {"{rm}": "rm, all weights, bf16", "{rm_lora}": "rm, LoRA, bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--only", default="", help="settings whose name contains this (and the reward runs they need)")
    parser.add_argument("--work", type=Path, help="folder for data and runs, kept, whose peaks are not measured again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write_data(work)
        wanted = [name for name in SETTINGS if given.only in name]
        needed = {run for name in wanted for key, run in REWARD_RUNS.items() if key in SETTINGS[name][1]}
        rows = [measure(name, given.model, work) for name in SETTINGS if name in wanted or name in needed]
    print("| setting | `--plan` says, GiB | measured, GiB | error |\n|---|---:|---:|---:|")
    for name, planned, measured in rows:
        print(f"| {name} | {planned:.2f} | {measured:.2f} | {100 * (planned / measured - 1):+.0f} % |")


def write_data(work: Path) -> None:
    """Rows of made-up sentences, 30 to 400 words long."""
    draw = random.Random(0)

    def sentence(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS.split()) for _ in range(draw.randint(least, most)))

    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": sentence(10, 100), "response": sentence(20, 300)} for _ in range(64)],
        "rm": [
            {"prompt": sentence(10, 100), "chosen": sentence(20, 300), "rejected": sentence(20, 300)} for _ in range(12)
        ],
        "ppo": [{"prompt": sentence(20, 80)} for _ in range(256)],
    }
    (work / "rule.py").write_text("def length(prompts, responses):\n    return [len(r) / 100 for r in responses]\n")
    for stage, made in rows.items():
        (work / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def run_folder(work: Path, name: str) -> Path:
    return work / name.replace(", ", "-").replace(" ", "_")


def measure(name: str, model: str, work: Path) -> tuple[str, float, float]:
    """Estimate and measured peak of a setting, in GiB."""
    stage, flags = SETTINGS[name]
    out = run_folder(work, name)
    places = {key: str(run_folder(work, run) / "final") for key, run in REWARD_RUNS.items()}
    places["{rule}"] = f"{work / 'rule.py'}:length"
    filled = [places.get(flag, flag) for flag in flags]
    command = [sys.executable, "-m", "rlhfkit", stage, "--model", model, "--data", str(work / f"{stage}.jsonl")]
    command += [*COMMON, *(ROLLOUTS if stage == "ppo" else ()), *filled]
    print(name, file=sys.stderr, flush=True)
    said, _ = run([*command, "--plan", "--out", str(out) + "-plan"])
    total = next(line for line in said.splitlines() if "the most at one time, about" in line)
    planned = float(total.strip(" │").split()[-1])
    measured = out / "peak"  # so that constants can be fitted without running everything again
    if not measured.is_file():
        _, peak = run([*command, "--out", str(out)])
        measured.write_text(f"{peak}\n")
    peak = float(measured.read_text())
    print(f"  planned {planned:.2f}, measured {peak:.2f}", file=sys.stderr, flush=True)
    return name, planned, peak


def run(command: list[str]) -> tuple[str, float]:
    """What a command printed, and its peak in GiB. On a GPU its allocator's, from the run's own records."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=printed, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)  # not Popen.wait, which keeps the usage to itself
        said.seek(0)
        heard = said.read()
        if status:
            sys.exit(f"{' '.join(command)}\n{heard}")
        printed.seek(0)
        words = printed.read()
    if ": cuda," in heard:
        records = Path(command[command.index("--out") + 1]) / "metrics.jsonl"
        return words, json.loads(records.read_text(encoding="utf-8").splitlines()[-1])["peak_memory_gib"]
    unit = 1 if sys.platform == "darwin" else 1024
    return words, usage.ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
