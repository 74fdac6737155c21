"""The command line. Commands are thin: they make a configuration and hand it to a stage's ``run``.

Options are made from the configuration classes, so that a flag, its recipe key and its help cannot disagree. Nothing
here imports torch before a stage runs: ``rlhfkit --help`` answers at once.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import typer

from rlhfkit import __version__
from rlhfkit.config.load import FieldPath, iterate_fields, load_config
from rlhfkit.config.stages import STAGES, AnyConfig, StageConfig
from rlhfkit.errors import CheckpointError, ConfigError, Interrupted, RewardError, RlhfkitError
from rlhfkit.runtime.launch import start_cpu_processes

app = typer.Typer(
    name="rlhfkit",
    help="SFT, reward model and PPO for people with one GPU.\n\nStart with: rlhfkit demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

PANELS = {
    "model": "Model",
    "lora": "LoRA",
    "data": "Data",
    "optim": "Optimisation",
    "run": "Run",
    "rm": "Reward model",
    "ppo": "PPO",
    "": "Generation",
}


def main() -> None:
    """Entry point: commands, and errors turned into exit text."""
    try:
        start_cpu_processes()
        app()
    except RlhfkitError as error:
        rank = os.environ.get("RANK", "0")
        # Most errors meet all processes, and one says so; these may have happened to another one alone.
        if rank == "0" or isinstance(error, (RewardError, CheckpointError)):
            label = "stopped" if error.exit_code == 130 else "error"
            print(f"{label}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        # A file or folder of the user's that cannot be made, read or written: theirs to mend, no fault of the code.
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


# -- stages: options from the configuration classes -------------------------------------------------------------------


def _annotation(field: FieldPath) -> Any:
    """The type Typer parses: the field's own, or None where the flag is not given."""
    declared = field.info.annotation
    inner = declared
    if isinstance(declared, types.UnionType) or typing.get_origin(declared) is Union:
        inner = next(a for a in typing.get_args(declared) if a is not type(None))
    flag = str(field.flag)
    names = [f"{flag}/--no-{flag.removeprefix('--')}"] if inner is bool else [flag]
    option = typer.Option(
        *names,
        help=f"{field.info.description}{_bounds(field)}",
        show_default=_shown_default(field),
        rich_help_panel=PANELS[field.block],
    )
    if typing.get_origin(inner) is list:
        return Annotated[Optional[list[str]], option]  # noqa: UP045 -- typer reads it at run time
    if typing.get_origin(inner) is Literal:
        # Bounds and choices are checked with everything else in load_config: all faults in one message.
        return Annotated[Optional[str], option]  # noqa: UP045
    return Annotated[Optional[inner], option]  # noqa: UP045


def _bounds(field: FieldPath) -> str:
    if typing.get_origin(field.info.annotation) is Literal:
        return f" \\[{'|'.join(typing.get_args(field.info.annotation))}]"  # escaped: rich reads brackets as markup
    return ""


def _shown_default(field: FieldPath) -> str | bool:
    default = field.info.get_default(call_default_factory=True)
    if isinstance(default, list):
        return ", ".join(default) if default else False
    if default in ("", None):
        return False
    return str(default).lower() if isinstance(default, bool) else str(default)


def _stage_command(stage: str, summary: str, examples: list[str], execute: Callable[[AnyConfig], None]) -> None:
    """Register the command of a stage, with an option for every field that has a flag."""
    cls = STAGES[stage]
    fields = {f.path.replace(".", "__"): f for f in iterate_fields(cls) if f.flag}

    def command(**given: Any) -> None:
        recipe, config_file = given.pop("recipe"), given.pop("config_file")
        sets = given.pop("sets") or []
        if recipe and config_file:
            raise ConfigError(f"two recipes are given: {recipe} and --config {config_file}", hint="give one of them")
        flags = {fields[name].path: value for name, value in given.items() if value not in (None, [])}
        config: AnyConfig = load_config(cls, recipe=recipe or config_file, flags=flags, sets=sets)  # type: ignore[type-var]
        # Before anything of the hub is imported: its endpoint is read once, at import.
        if config.endpoint:
            os.environ["HF_ENDPOINT"] = config.endpoint
        try:
            if isinstance(config, StageConfig) and config.run.plan:
                from rlhfkit.stages import plan

                plan.run(config)
            else:
                execute(config)
        except KeyboardInterrupt:
            # Before the first step, or pressed twice. Typer would end the process without a word.
            trains = isinstance(config, StageConfig)
            words = "nothing after the last checkpoint is saved" if trains else "no further answer is written"
            raise Interrupted(words) from None

    keyword = inspect.Parameter.KEYWORD_ONLY
    recipe_argument = typer.Argument(
        help="Recipe: a YAML file, or its bare name in configs/ or examples/.", show_default=False
    )
    parameters = [
        inspect.Parameter("recipe", keyword, default=None, annotation=Annotated[Optional[str], recipe_argument]),  # noqa: UP045
        *(inspect.Parameter(n, keyword, default=None, annotation=_annotation(f)) for n, f in fields.items()),
        inspect.Parameter(
            "config_file",
            keyword,
            default=None,
            annotation=Annotated[
                Optional[str],  # noqa: UP045
                typer.Option("--config", help="Recipe in YAML; flags win over it.", rich_help_panel="Configuration"),
            ],
        ),
        inspect.Parameter(
            "sets",
            keyword,
            default=None,
            annotation=Annotated[
                Optional[list[str]],  # noqa: UP045
                typer.Option(
                    "--set",
                    metavar="A.B=C",
                    help="Set any key of the configuration; wins over flags. Repeatable.",
                    rich_help_panel="Configuration",
                ),
            ],
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = summary + "\n\n[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {e}" for e in examples)
    app.command(stage)(command)


def _run_sft(config: Any) -> None:
    from rlhfkit.stages import sft

    sft.run(config)


def _run_rm(config: Any) -> None:
    from rlhfkit.stages import reward

    reward.run(config)


def _run_ppo(config: Any) -> None:
    from rlhfkit.stages import ppo

    ppo.run(config)


def _run_generate(config: Any) -> None:
    from rlhfkit.stages import generate

    generate.run(config)


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
    "generate",
    "Answer one prompt, a file of prompts, or chat.",
    [
        "rlhfkit generate --model runs/ppo/final",
        'rlhfkit generate --model runs/ppo/final --prompt "What is a film?"',
        "rlhfkit generate --model runs/ppo/final --input prompts.jsonl --output answers.jsonl",
    ],
    _run_generate,
)


# -- commands with options of their own -------------------------------------------------------------------------------


@app.command("fix-checkpoint")
def fix_checkpoint(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The original model folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder a training run saved; it is mended in place.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Carry the plan out without asking.")] = False,
) -> None:
    """Repair DST (what a training run saved) from SRC (the original model folder).

    Weights are never touched. The plan is shown first; what is replaced is kept in a backup folder.

    [bold]Examples[/bold]

      rlhfkit fix-checkpoint ./Qwen-7B ./my-finetune --dry-run

      rlhfkit fix-checkpoint ./Qwen-7B ./my-finetune --yes
    """
    from rlhfkit.stages import fix_checkpoint as stage

    stage.run(src, dst, dry_run=dry_run, yes=yes, confirm=typer.confirm)


@app.command("families")
def families() -> None:
    """List the installed model families and the package each comes from."""
    from rlhfkit.stages import families as stage

    stage.run()


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the three run folders go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same numbers.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a demo that was stopped.")] = False,
) -> None:
    """Run SFT, reward model and PPO on a bundled model and data: offline, on a CPU, in minutes.

    [bold]Example[/bold]

      rlhfkit demo
    """
    from rlhfkit.stages import demo as stage

    stage.run(out, seed=seed, resume=resume)


def _version(value: bool) -> None:
    if value:
        print(f"rlhfkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
