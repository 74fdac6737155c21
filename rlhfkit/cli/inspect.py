"""``rlhfkit inspect``: options of the stages, and its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rlhfkit.cli.application import register, use_endpoint
from rlhfkit.cli.options import CONFIG_OPTION, PANELS, one_of, option_of
from rlhfkit.config.load import iterate_fields, load_config, read_recipe
from rlhfkit.config.stages import STAGES, StageConfig
from rlhfkit.errors import ConfigError

INSPECTED = (
    "model.path",
    "model.family",
    "model.template",
    "model.trust_remote_code",
    "model.hf_endpoint",
    "data.max_length",
    "ppo.max_prompt_length",
    "ppo.max_new_tokens",
)
NOT_INSPECTED = ("data.train", "model.quantize", "lora", "optim", "run", "stage")
TRAINED = {name: cls for name, cls in STAGES.items() if issubclass(cls, StageConfig)}


def _inspect_command() -> None:
    by_path = {f.path: f for f in iterate_fields(STAGES["ppo"])}  # it has every field that the others have
    fields = {path.replace(".", "__"): by_path[path] for path in INSPECTED}

    def command(**given: Any) -> None:
        flags = {fields[name].path: given[name] for name in fields if given[name] is not None}
        if given["data"]:
            flags["data.train"] = given["data"]
        # Whatever the recipe of a run says: looking at data must not end at its first bad row unless asked to.
        flags["data.on_bad_row"] = given["on_bad_row"] or "skip"
        config, detected = _inspect_config(given["stage"], given["config_file"], flags)
        from rlhfkit.stages import inspect as stage

        rows = given["rows"]
        if given["as_json"] and rows is not None:
            raise ConfigError("--rows has no effect with --json, which prints counts alone", hint="give one of them")
        hurting = stage.run(
            config,
            detected=detected,
            rows=3 if rows is None else rows,
            as_json=bool(given["as_json"]),
            dump=given["dump"],
        )
        if given["strict"] and hurting:
            raise typer.Exit(1)

    annotations = {
        "data": Annotated[
            Optional[list[str]],  # noqa: UP045
            typer.Argument(
                metavar="DATA",
                help="Data as --data of the stages takes it: file, folder, hub id or name, optionally =weight.",
                show_default=False,
            ),
        ],
        "stage": Annotated[
            Optional[str],  # noqa: UP045
            one_of("--stage", "How the rows will be used; found from the rows if not given.", *TRAINED),
        ],
        "rows": Annotated[
            Optional[int],  # noqa: UP045
            typer.Option("--rows", min=0, help="How many rows are shown.", show_default="3"),
        ],
        "strict": Annotated[
            Optional[bool],  # noqa: UP045
            typer.Option("--strict", help="Exit with 1 if something would hurt training."),
        ],
        "as_json": Annotated[
            Optional[bool],  # noqa: UP045
            typer.Option("--json", help="Print the counts as one JSON object, and nothing else."),
        ],
        "dump": Annotated[
            Optional[Path],  # noqa: UP045
            typer.Option("--dump", help="Write the rows as they were parsed to this file, as JSON lines."),
        ],
        "on_bad_row": Annotated[
            Optional[str],  # noqa: UP045
            one_of(
                "--on-bad-row",
                "Skip and count a row that cannot be used, or stop at it.",
                "error",
                "skip",
                show_default="skip",
                rich_help_panel=PANELS["data"],
            ),
        ],
        **{name: option_of(field) for name, field in fields.items()},
        "config_file": Annotated[Optional[str], CONFIG_OPTION],  # noqa: UP045
    }
    examples = [
        "rlhfkit inspect alpaca.json --model Qwen/Qwen2.5-0.5B",
        "rlhfkit inspect ours.jsonl=2 belle.json --model ./llama --max-length 2048 --rows 10",
        "rlhfkit inspect pairs.jsonl --model runs/sft/final --stage rm --strict --json",
    ]
    summary = "Show rows as the model will see them, and count what would hurt training in all of them."
    register("inspect", command, annotations, summary, examples)


def _inspect_config(stage: str | None, recipe: str | None, flags: dict[str, Any]) -> tuple[StageConfig, bool]:
    """The configuration of the stage that will use the rows, and whether that stage was found from them."""
    named = stage or (read_recipe(recipe).get("stage") if recipe else None)
    limits = [path for path in flags if path.startswith("ppo.")]  # of prompts and answers
    if named is None and limits:
        named = "ppo"
    if named not in (None, *TRAINED):
        raise ConfigError(
            f"there is no stage '{named}' that trains on rows", hint=f"give --stage with one of {', '.join(TRAINED)}"
        )
    if limits and named is not None and TRAINED[named]().rollouts is None:
        raise ConfigError(
            "\n".join(f"{path}: has no effect on {named} rows" for path in limits),
            hint="leave it out, or give --stage ppo",
        )

    def load(name: str) -> Any:
        said = {path.replace("ppo.", f"{name}."): value for path, value in flags.items()}
        needless = [*NOT_INSPECTED, f"{name}.reward", f"{name}.engine"]
        try:
            return load_config(STAGES[name], recipe=recipe, flags=said, not_needed=needless)  # type: ignore[type-var]
        except ConfigError as error:
            raise ConfigError(error.message, hint="all options: rlhfkit inspect --help") from None

    config = load(named or "sft")
    if not config.data.train:
        raise ConfigError("no data is given", hint="rlhfkit inspect FILE --model FOLDER_OR_HUB_ID")
    use_endpoint(config.endpoint)
    if named is not None:
        return config, False
    from rlhfkit.data.sources import detect_stage

    return load(detect_stage(config.data.train[0])), True


_inspect_command()
