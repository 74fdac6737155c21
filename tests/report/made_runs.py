"""Run folders with plausible contents, made without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from conftest import write_jsonl

from rlhfkit.config.stages import STAGES

ANSWERS = ("The film is a in the most of the way.", "A good film.", "<b>The best</b> film & story.", "The best film.")


def make_run(folder: Path, stage: str, *, steps: int = 40, finished: bool = True, **changes: Any) -> Path:
    """A run of ``stage``; ``changes`` replace metrics, as values or as functions of the step."""
    config = STAGES[stage]().model_dump(mode="json")
    config["model"]["path"], config["data"]["train"] = "models/tiny", ["rows.jsonl"]
    config["run"]["out"] = str(folder)
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump({"stage": stage, **config}), encoding="utf-8")
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0, **_evaluation(stage, 0, steps)}]
    for step in range(1, steps + 1):
        row = {"step": step, **_metrics(stage, step, steps)}
        row |= {key: value(step) if callable(value) else value for key, value in changes.items()}
        if step % (steps // 4) == 0:
            row |= _evaluation(stage, step, steps)
        rows.append(row)
    if finished:
        rows.append({**rows[-1], "event": "end", "resumed_from": None})
    write_jsonl(folder / "metrics.jsonl", rows)
    if stage != "rm":
        write_jsonl(folder / "samples.jsonl", [
            {"step": step, "prompt": f"What about film {k}?", "answer": ANSWERS[min(i, 2 + k)], "ended": i > 0,
             **({"reward": i - 0.5} if stage == "ppo" else {})}
            for i, step in enumerate([0, *range(steps // 4, steps + 1, steps // 4)]) for k in range(2)
        ])  # fmt: skip
    elif finished:
        (folder / "evaluation.json").write_text(json.dumps(EVALUATION), encoding="utf-8")
    return folder


def _metrics(stage: str, step: int, steps: int) -> dict[str, Any]:
    part = step / steps
    row: dict[str, Any] = {
        "loss": 2 - part + 0.1 * math.sin(step * 7), "lr": 1e-5 * (1 - part), "grad_norm": 1.5 + math.sin(step),
        "tokens": 100, "tokens_total": 100 * step, "seconds": 0.5, "tokens_per_second": 200.0, "peak_memory_gib": 1.2,
    }  # fmt: skip
    if stage == "rm":
        row |= {"accuracy": 0.5 + 0.4 * part, "margin": part, "reward_chosen": part / 2, "reward_rejected": -part / 2}
    if stage == "ppo":
        row |= {
            "episodes": 64 * step, "reward_mean": 2 * part - 1, "reward_std": 1.0, "kl": 8 * part, "kl_coef": 0.05,
            "entropy": 3 - part, "policy_loss": -0.02, "value_loss": 0.3, "clip_fraction": 0.1,
            "eos_rate": 0.5 + part / 2,
            "value_explained_variance": None if step == 1 else 0.4, "response_tokens": 20.0, "ratio_mean": 1.0,
            "seconds_rollout": 0.3, "seconds_score": 0.05, "seconds_update": 0.15,
        }  # fmt: skip
    return row


def _evaluation(stage: str, step: int, steps: int) -> dict[str, float]:
    part = step / steps
    if stage == "sft":
        return {"eval_loss": 2.1 - part}
    if stage == "rm":
        return {"eval_loss": 0.7 - part / 3, "eval_accuracy": 0.5 + 0.35 * part, "eval_margin": part}
    return {"eval_reward_mean": 2 * part - 1, "eval_reward_std": 1.0, "eval_kl": 8 * part,
            "eval_response_tokens": 20.0, "eval_eos_rate": 0.8}  # fmt: skip


EVALUATION = {
    "reliability": [
        {"low": 0.5, "high": 0.75, "pairs": 9, "predicted": 0.6, "observed": 0.55},
        {"low": 0.75, "high": 0.9, "pairs": 0, "predicted": None, "observed": None},
        {"low": 0.9, "high": 1.0, "pairs": 30, "predicted": 0.95, "observed": 0.97},
    ],
    "histogram": {"edges": [-2.0, 0.0, 2.0], "counts": {"chosen": [3, 36], "rejected": [30, 9]}},
}
