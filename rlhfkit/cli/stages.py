"""The commands of the stages: an option for every field that has a flag, and the stage's ``run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from rlhfkit.cli.application import register, use_endpoint
from rlhfkit.cli.options import CONFIG_OPTION, option_of, refused_option_of
from rlhfkit.config.load import iterate_fields, load_config
from rlhfkit.config.stages import STAGES, AnyConfig, StageConfig
from rlhfkit.errors import ConfigError, Interrupted
from rlhfkit.runtime.settings import stopped_between_checkpoints

INTERRUPTED = {"generate": "no further answer is written", "score": "no score is written"}


def _stage_command(stage: str, summary: str, examples: list[str], execute: Callable[[AnyConfig], None]) -> None:
    """Register the command of a stage, with an option for every field that has a flag."""
    cls = STAGES[stage]
    fields = {f.path.replace(".", "__"): f for f in iterate_fields(cls) if f.flag}
    # Flags that people know from elsewhere: named, so that they get the reason and not "no such option".
    refused = {path.replace(".", "__"): path for path in cls.refused}

    def command(**given: Any) -> None:
        recipe, config_file = given.pop("recipe"), given.pop("config_file")
        sets = given.pop("sets") or []
        if recipe and config_file:
            raise ConfigError(f"two recipes are given: {recipe} and --config {config_file}", hint="give one of them")
        paths = {**refused, **{name: field.path for name, field in fields.items()}}
        flags = {paths[name]: value for name, value in given.items() if value not in (None, [])}
        config: AnyConfig = load_config(cls, recipe=recipe or config_file, flags=flags, sets=sets)  # type: ignore[type-var]
        use_endpoint(config.endpoint)
        try:
            if isinstance(config, StageConfig) and config.run.plan:
                from rlhfkit.stages import plan

                plan.run(config)
            else:
                execute(config)
        except KeyboardInterrupt:
            # Before the first step, or pressed twice. Typer would end the process without a word.
            if isinstance(config, StageConfig):
                raise stopped_between_checkpoints(config) from None
            raise Interrupted(INTERRUPTED[stage]) from None

    recipe_argument = typer.Argument(
        help="Recipe: a YAML file, or its bare name in configs/ or examples/.", show_default=False
    )
    set_option = typer.Option(
        "--set",
        metavar="A.B=C",
        help="Set any key of the configuration; wins over flags. Repeatable.",
        rich_help_panel="Configuration",
    )
    annotations = {
        "recipe": Annotated[Optional[str], recipe_argument],  # noqa: UP045
        **{name: option_of(field) for name, field in fields.items()},
        **{name: refused_option_of(path) for name, path in refused.items()},
        "config_file": Annotated[Optional[str], CONFIG_OPTION],  # noqa: UP045
        "sets": Annotated[Optional[list[str]], set_option],  # noqa: UP045
    }
    register(stage, command, annotations, summary, examples)


def _run_sft(config: Any) -> None:
    from rlhfkit.stages import sft

    sft.run(config)


def _run_rm(config: Any) -> None:
    from rlhfkit.stages import reward

    reward.run(config)


def _run_ppo(config: Any) -> None:
    from rlhfkit.stages import ppo

    ppo.run(config)


def _run_trl(config: Any) -> None:
    from rlhfkit.stages import trl_stages

    trl_stages.run(config)


def _run_generate(config: Any) -> None:
    from rlhfkit.stages import generate

    generate.run(config)


def _run_score(config: Any) -> None:
    from rlhfkit.stages import score

    score.run(config)


_stage_command(
    "sft",
    "Supervised fine-tuning: learn what the assistant says.",
    [
        "rlhfkit sft --model Qwen/Qwen2.5-0.5B --data alpaca.json --out runs/sft",
        "rlhfkit sft --model ./llama --data a.jsonl=2 --data b.csv --lora-rank 16 --quantize 4bit",
        "rlhfkit sft --config runs/sft/config.resolved.yaml --resume",
    ],
    _run_sft,
)
_stage_command(
    "rm",
    "Reward model: a scalar head that scores better answers higher.",
    [
        "rlhfkit rm --model runs/sft/final --data pairs.jsonl --eval-data heldout.jsonl --out runs/rm",
    ],
    _run_rm,
)
_stage_command(
    "ppo",
    "Proximal policy optimisation against one or several rewards.",
    [
        "rlhfkit ppo --model runs/sft/final --reward runs/rm/final --data prompts.jsonl --out runs/ppo",
        "rlhfkit ppo --model runs/sft/final --reward rewards.py:length --data prompts.jsonl --lora-rank 16",
    ],
    _run_ppo,
)
_stage_command(
    "dpo",
    "Direct preference optimisation, by TRL: learn from pairs without a reward model.",
    [
        "rlhfkit dpo --model runs/sft/final --data pairs.jsonl --eval-data heldout.jsonl --out runs/dpo",
        "rlhfkit dpo --model runs/sft/final --data pairs.jsonl --lora-rank 16 --lr 2e-5 --beta 0.05",
    ],
    _run_trl,
)
_stage_command(
    "kto",
    "Kahneman-Tversky optimisation, by TRL: learn from answers that are desirable or not.",
    [
        "rlhfkit kto --model runs/sft/final --data labelled.jsonl --out runs/kto",
        "rlhfkit kto --model runs/sft/final --data pairs.jsonl --batch-size 32 --lora-rank 16",
    ],
    _run_trl,
)
_stage_command(
    "grpo",
    "Group relative policy optimisation, by TRL, against one or several rewards.",
    [
        "rlhfkit grpo --model runs/sft/final --reward runs/rm/final --data prompts.jsonl --out runs/grpo",
        "rlhfkit grpo --model runs/sft/final --reward rewards.py:length --data prompts.jsonl --lora-rank 16",
    ],
    _run_trl,
)
_stage_command(
    "rloo",
    "REINFORCE leave-one-out, by TRL, against one or several rewards.",
    [
        "rlhfkit rloo --model runs/sft/final --reward runs/rm/final --data prompts.jsonl --out runs/rloo",
    ],
    _run_trl,
)
_stage_command(
    "generate",
    "Answer one prompt, a file of prompts, or chat.",
    [
        "rlhfkit generate --model runs/ppo/final",
        'rlhfkit generate --model runs/ppo/final --prompt "What is a film?"',
        "rlhfkit generate --model runs/ppo/final --input prompts.jsonl --output answers.jsonl",
    ],
    _run_generate,
)
_stage_command(
    "score",
    "Score answers with a reward model; of ranked answers also accuracy, calibration and histograms.",
    [
        "rlhfkit score --model runs/rm/final --data heldout.jsonl",
        "rlhfkit score --model runs/rm/final --data answers.jsonl --output scores.jsonl",
    ],
    _run_score,
)
