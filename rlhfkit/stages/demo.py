"""The three stages on a bundled model and data, offline, on a CPU, in minutes.

It runs the same code as everyone's commands, from the recipes beside the data (``rlhfkit/assets/demo/*.yaml``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig, SftConfig
from rlhfkit.errors import ConfigError
from rlhfkit.runtime.records import json_lines
from rlhfkit.runtime.screen import quiet_libraries
from rlhfkit.stages import ppo, report, reward, sft
from rlhfkit.words import tr
from rlhfkit.words.lines import shown

ANSWERS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class DemoResult:
    """First and last evaluation of each stage, on rows that no stage trained on."""

    sft: tuple[dict[str, Any], dict[str, Any]]
    rm: tuple[dict[str, Any], dict[str, Any]]
    ppo: tuple[dict[str, Any], dict[str, Any]]
    seconds: float

    @property
    def reward_gain(self) -> float:
        """Rise of the mean reward in standard deviations of the SFT model's reward."""
        before, after = self.ppo
        return float((after["eval_reward_mean"] - before["eval_reward_mean"]) / before["eval_reward_std"])


def run(out: Path, *, seed: int = 0, resume: bool = False) -> DemoResult:
    """SFT, reward model, PPO into ``out``; then a table of before and after.

    Args:
        out: where the three run folders go.
        seed: same seed, same numbers.
        resume: go on with a demo that was stopped.

    Raises:
        ConfigError: ``out`` holds a demo already.
    """
    if out.exists() and any(out.iterdir()) and not resume:
        raise ConfigError(f"{out} is not empty", hint="go on with it: --resume; or start another: --out OTHER_FOLDER")
    quiet_libraries()
    console = Console()
    started = time.perf_counter()
    with ExitStack() as stack:
        assets = stack.enter_context(as_file(files("rlhfkit.assets") / "demo"))

        def flags(stage: str, model: Path, train: str, held_out: str) -> dict[str, Any]:
            return {
                "model.path": str(model),
                "data.train": [str(assets / train)],
                "data.eval": [str(assets / held_out)],
                "run.out": str(out / stage),
                "run.seed": seed,
                "run.resume": resume,
            }

        console.rule(tr("1 of 3: supervised fine-tuning"))
        tuned = sft.run(
            load_config(
                SftConfig,
                recipe=str(assets / "sft.yaml"),
                flags=flags("sft", assets / "model", "sft.jsonl", "sft_heldout.jsonl"),
            )
        )
        console.rule(tr("2 of 3: reward model"))
        judge = reward.run(
            load_config(
                RmConfig,
                recipe=str(assets / "rm.yaml"),
                flags=flags("rm", tuned.final, "pairs.jsonl", "pairs_heldout.jsonl"),
            )
        )
        console.rule(tr("3 of 3: PPO"))
        policy = ppo.run(
            load_config(
                PpoConfig,
                recipe=str(assets / "ppo.yaml"),
                flags={
                    **flags("ppo", tuned.final, "prompts.jsonl", "prompts_heldout.jsonl"),
                    "ppo.reward": [str(judge.final)],
                },
            )
        )
    result = DemoResult(
        sft=_first_and_last(tuned.out),
        rm=_first_and_last(judge.out),
        ppo=_first_and_last(policy.out),
        seconds=time.perf_counter() - started,
    )
    console.rule(tr("before and after, on held-out rows"))
    console.print(_figures(result))
    console.print(_answers(policy.out))
    (page,) = report.run([tuned.out, judge.out, policy.out], out=out / "report.html", form="html")
    console.print(
        shown(
            f"{result.seconds / 60:.1f} minutes. Run folders: {out}/sft, {out}/rm, {out}/ppo "
            "(metrics.jsonl, samples.jsonl, tensorboard/, final/).\n"
            f"Curves and more answers:  {page}\n"
            f"Talk to the result:  rlhfkit generate --model {policy.final}"
        )
    )
    return result


def _first_and_last(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = [json.loads(line) for line in json_lines(out / "metrics.jsonl")]
    evaluations = [row for row in rows if any(key.startswith("eval_") for key in row)]
    return evaluations[0], evaluations[-1]


def _figures(result: DemoResult) -> Table:
    table = Table()
    table.add_column(tr("stage"))
    table.add_column(tr("figure"))
    table.add_column(tr("before"), justify="right")
    table.add_column(tr("after"), justify="right")

    def row(stage: str, figure: str, pair: tuple[Mapping[str, Any], Mapping[str, Any]], key: str, form: str) -> None:
        table.add_row(tr(stage), tr(figure), format(pair[0][key], form), format(pair[1][key], form))

    row("SFT", "loss (nats per token)", result.sft, "eval_loss", ".3f")
    row("reward model", "pairs ranked rightly", result.rm, "eval_accuracy", ".1%")
    row("PPO", "mean reward", result.ppo, "eval_reward_mean", ".3f")
    row("PPO", "spread of the reward (std)", result.ppo, "eval_reward_std", ".3f")
    row("PPO", "KL to the SFT model (nats per answer)", result.ppo, "eval_kl", ".2f")
    row("PPO", "answers that end by themselves", result.ppo, "eval_eos_rate", ".1%")
    table.add_section()
    table.add_row("PPO", tr("rise of the reward in its std"), "", f"{result.reward_gain:+.2f}")
    return table


def _answers(out: Path) -> Table:
    rows = [json.loads(line) for line in json_lines(out / "samples.jsonl")]
    steps = sorted({row["step"] for row in rows})
    first = [row for row in rows if row["step"] == steps[0]]
    last = [row for row in rows if row["step"] == steps[-1]]
    table = Table(show_lines=True)
    table.add_column(tr("prompt"), ratio=2)
    table.add_column(tr("SFT model"), ratio=3)
    table.add_column(tr("reward"), justify="right")
    table.add_column(tr("after PPO"), ratio=3)
    table.add_column(tr("reward"), justify="right")
    for before, after in list(zip(first, last, strict=True))[:ANSWERS_SHOWN]:
        table.add_row(
            before["prompt"], before["answer"], f"{before['reward']:.2f}", after["answer"], f"{after['reward']:.2f}"
        )
    return table
