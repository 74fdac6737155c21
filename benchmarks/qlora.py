"""All weights, LoRA and QLoRA beside each other: the same rows, steps and learned tokens, for sft and rm.

    python benchmarks/qlora.py --model MODEL --stage sft --data alpaca.json.gz
    python benchmarks/qlora.py --model MODEL --stage rm --data pairs.jsonl.gz

Each form is a process of its own, started through the command line. Printed are its peak memory (of the GPU, or of the
process on a CPU), its speed, and the held-out loss before and after.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

LORA = ("--lora-rank", "16", "--lr", "2e-4")
FORMS: dict[str, tuple[str, ...]] = {
    "all weights": ("--lr", "2e-5"),
    "all weights, adamw8bit": ("--lr", "2e-5", "--optimizer", "adamw8bit"),
    "LoRA 16": LORA,
    "QLoRA 16, 8bit": (*LORA, "--quantize", "8bit"),
    "QLoRA 16, 4bit": (*LORA, "--quantize", "4bit"),
    "QLoRA 16, 4bit, adamw8bit": (*LORA, "--quantize", "4bit", "--optimizer", "adamw8bit"),
}
WARM_UP = 2  # steps that are left out of the speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSON lines, gzipped or not")
    parser.add_argument("--stage", choices=("sft", "rm"), required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=48, help="rows")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS))
    args = parser.parse_args()
    rows = read(args.data)
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        files = {"held": rows[: args.held_out], "train": rows[args.held_out :][: args.steps * args.batch_size]}
        for name, part in files.items():
            (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        found = {form: train(args, Path(folder), form, number) for number, form in enumerate(args.forms)}
    print_table(args, found)


def read(path: str) -> list[dict[str, Any]]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train(args: argparse.Namespace, folder: Path, form: str, number: int) -> list[dict[str, Any]]:
    """The metrics of a run."""
    out = folder / str(number)
    words = [
        *(args.stage, "--model", args.model, "--out", str(out), "--trackers", "none", "--save-every", "0"),
        *("--data", str(folder / "train.jsonl"), "--eval-data", str(folder / "held.jsonl"), "--on-bad-row", "skip"),
        *("--batch-size", str(args.batch_size), "--max-steps", str(args.steps), "--max-length", str(args.max_length)),
        *("--precision", args.precision, *FORMS[form]),
    ]
    print(f"{form}: rlhfkit {' '.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "rlhfkit", *words], check=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def print_table(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {packages}")
    print(f"{args.stage}, {Path(args.model).name}, {args.steps} steps of {args.batch_size}\n")
    rm = args.stage == "rm"
    print("| | peak memory, GiB | tokens per second | held-out loss before | after |" + (" accuracy |" if rm else ""))
    print("|---|---|---|---|---|" + ("---|" if rm else ""))
    for form, rows in found.items():
        steps = [row for row in rows if "event" not in row]
        speed = statistics.median(row["tokens_per_second"] for row in steps[WARM_UP:])
        cells = [
            form,
            f"{rows[-1]['peak_memory_gib']:.2f}",
            f"{speed:.0f}",
            f"{rows[0]['eval_loss']:.4f}",
            f"{rows[-1]['eval_loss']:.4f}",
            *([f"{rows[-1]['eval_accuracy']:.1%}"] if rm else []),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
