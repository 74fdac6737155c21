"""Tables of a report: figures before and after, and answers side by side as they changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhfkit.report.runs import Row, RunRecord
from rlhfkit.words import mark

COLUMNS = 4  # evaluations shown side by side

# Metric of an evaluation, its name, its format.
FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "sft": (("eval_loss", "held-out loss (nats per token)", ".3f"),),
    "rm": (
        ("eval_accuracy", "held-out pairs ranked rightly", ".1%"),
        ("eval_loss", "held-out loss (nats per pair)", ".3f"),
        ("eval_margin", "margin, chosen − rejected", ".3f"),
    ),
    "ppo": (
        ("eval_reward_mean", "mean reward", ".3f"),
        ("eval_reward_std", "spread of the reward (std)", ".3f"),
        ("eval_kl", "KL to the reference (nats per answer)", ".2f"),
        ("eval_response_tokens", "answer length (tokens)", ".1f"),
        ("eval_eos_rate", "answers that end by themselves", ".1%"),
    ),
    "dpo": (
        ("eval_accuracy", "held-out pairs in which the policy moved towards the better answer", ".1%"),
        ("eval_loss", "held-out loss (nats per pair)", ".3f"),
        ("eval_margin", "margin of the implicit rewards", ".3f"),
    ),
    "kto": (
        ("eval_margin", "margin of the implicit rewards, desirable − undesirable", ".3f"),
        ("eval_loss", "held-out loss", ".3f"),
    ),
}
ONLINE = ("eval_reward_mean", "eval_reward_std", "eval_response_tokens", "eval_eos_rate")
FIGURES["grpo"] = FIGURES["rloo"] = (
    *(figure for figure in FIGURES["ppo"] if figure[0] in ONLINE),
    ("eval_kl_per_token", "KL to the reference (nats per token)", ".4f"),
)
# The same of rollouts, for a run without held-out data.
ROLLOUTS = tuple((key.removeprefix("eval_"), name, form) for key, name, form in FIGURES["ppo"])
TRAINING = {"sft": (("loss", "training loss (nats per token)", ".3f"),),
            "rm": (("loss", "training loss (nats per pair)", ".3f"), ("accuracy", "training accuracy", ".1%")),
            "ppo": ROLLOUTS,
            **{stage: tuple((key.removeprefix("eval_"), name.removeprefix("held-out "), form)
                            for key, name, form in FIGURES[stage]) for stage in ("dpo", "kto", "grpo", "rloo")}
            }  # fmt: skip


class Figure(NamedTuple):
    name: str
    before: str
    after: str


def headline(run: RunRecord) -> list[Figure]:
    """What came of a run: held-out figures before and after, or, without them, those of first and last step."""
    pair, wanted = run.evaluations(), FIGURES.get(run.stage, ())
    if pair is None and run.steps:
        pair, wanted = (run.steps[0], run.steps[-1]), TRAINING.get(run.stage, (("loss", mark("loss"), ".3f"),))
    if pair is None:
        return []
    return [
        Figure(name, format(pair[0][key], form), format(pair[1][key], form))
        for key, name, form in wanted
        if isinstance(pair[0].get(key), (int, float)) and isinstance(pair[1].get(key), (int, float))
    ]


def titles(run: RunRecord) -> tuple[str, str]:
    """Over what stands in a headline's two columns."""
    pair = run.evaluations()
    if pair is None:
        return ("first step", "last step")
    names = [mark("before") if row["step"] == 0 else f"step {row['step']}" for row in pair]
    return (names[0], names[1])


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What a run was."""
    lora = run.setting("lora.rank")
    quantize = run.setting("model.quantize")
    weights = f"LoRA of rank {lora}" if lora else "all weights"
    base = f" on a {quantize} base" if quantize not in (None, "none") else ""
    found = [
        (mark("stage"), run.stage),
        (mark("model"), str(run.setting("model.path"))),
        (mark("trains"), weights + base),
        (mark("data"), ", ".join(run.setting("data.train") or [])),
    ]
    if rewards := run.setting("ppo.reward"):
        found.append((mark("reward"), ", ".join(rewards)))
    if run.steps:
        last = run.steps[-1]
        seconds = sum(row.get("seconds", 0.0) for row in run.steps)
        found += [
            (mark("steps"), f"{last['step']:,}"),
            (mark("tokens"), f"{last.get('tokens_total', 0):,}"),
            ("time in steps", duration(seconds)),
            ("peak memory", f"{max(row.get('peak_memory_gib', 0.0) for row in run.steps):.1f} GiB"),
        ]
    found.append((mark("finished"), mark("yes") if run.end else mark("no")))
    return found


def duration(seconds: float) -> str:
    """1.5 h, 12.3 min or 4.0 s."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


class Answer(NamedTuple):
    text: str
    note: str  # reward, and whether it was cut off
    changed: bool  # from the answer to its left


class SampleTable(NamedTuple):
    headings: list[str]
    rows: list[tuple[str, list[Answer | None]]]  # prompt, one answer per heading
    left_out: int  # evaluations that are not shown


def sample_table(runs: Sequence[RunRecord]) -> SampleTable | None:
    """Answers to the same prompts, evaluation by evaluation: of one run at up to four steps, of several first and last.

    None where no run kept samples.
    """
    columns: list[tuple[str, dict[str, Row]]] = []
    left_out = 0
    for run in runs:
        steps = sorted({row["step"] for row in run.samples})
        chosen = _spread(steps, COLUMNS if len(runs) == 1 else 2)
        left_out += len(steps) - len(chosen)
        for step in chosen:
            name = "before training" if step == 0 else f"step {step}"
            heading = name if len(runs) == 1 else f"{run.name}, {name}"
            columns.append((heading, {row["prompt"]: row for row in run.samples if row["step"] == step}))
    prompts = list(dict.fromkeys(prompt for _, rows in columns for prompt in rows))
    if not prompts:
        return None
    table = []
    for prompt in prompts:
        answers: list[Answer | None] = []
        for _, rows in columns:
            row = rows.get(prompt)
            before = answers[-1] if answers else None
            answers.append(None if row is None else Answer(str(row["answer"]), _note(row),
                                                           before is None or before.text != row["answer"]))  # fmt: skip
        table.append((prompt, answers))
    return SampleTable([heading for heading, _ in columns], table, left_out)


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """The first, the last, and between them as many as fit."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _note(row: dict[str, Any]) -> str:
    parts = [f"reward {row['reward']:.2f}"] if isinstance(row.get("reward"), (int, float)) else []
    if row.get("ended") is False:
        parts.append("cut off")
    return ", ".join(parts)
