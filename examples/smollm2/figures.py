"""Print the figures of docs/results.md from the run folders of this example.

python examples/smollm2/figures.py runs/smollm2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhfkit.runtime.run import json_lines


def main(root: Path) -> None:
    print("| stage | figure, on held-out rows | before | after |\n|---|---|---|---|")
    row("SFT", "loss (nats per token)", root / "sft", "eval_loss", ".3f")
    row("reward model", "pairs ranked rightly", root / "rm", "eval_accuracy", ".1%")
    row("reward model", "loss", root / "rm", "eval_loss", ".3f")
    row("reward model", "margin", root / "rm", "eval_margin", ".2f")
    row("PPO", "mean reward", root / "ppo", "eval_reward_mean", ".2f")
    row("PPO", "spread of the reward (std)", root / "ppo", "eval_reward_std", ".2f")
    row("PPO", "KL to the SFT model (nats per answer)", root / "ppo", "eval_kl", ".2f")
    row("PPO", "answer length (tokens)", root / "ppo", "eval_response_tokens", ".1f")
    row("PPO", "answers that end by themselves", root / "ppo", "eval_eos_rate", ".0%")
    print("\n| stage | steps | minutes in steps | peak memory (GiB) |\n|---|---|---|---|")
    for stage in ("sft", "rm", "ppo"):
        end = events(root / stage)["end"]
        print(f"| {stage} | {end['step']} | {end['seconds_total'] / 60:.1f} | {end['peak_memory_gib']:.1f} |")
    print()
    samples = [json.loads(line) for line in json_lines(root / "ppo" / "samples.jsonl")]
    last = max(sample["step"] for sample in samples)
    pairs = zip((s for s in samples if s["step"] == 0), (s for s in samples if s["step"] == last), strict=True)
    for before, after in pairs:
        print(f"- **{before['prompt']}**")
        print(f"  - SFT ({before['reward']:.2f}): {before['answer']}")
        print(f"  - PPO ({after['reward']:.2f}): {after['answer']}")


def events(run: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in json_lines(run / "metrics.jsonl")]
    return {row["event"]: row for row in rows if "event" in row}


def row(stage: str, figure: str, run: Path, key: str, form: str) -> None:
    found = events(run)
    print(f"| {stage} | {figure} | {format(found['start'][key], form)} | {format(found['end'][key], form)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
