"""Options made from the fields of the configuration classes: a flag, its recipe key and its help cannot disagree."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional, Union

import typer

from rlhfkit.config.load import FieldPath, iterate_fields
from rlhfkit.config.stages import StageConfig
from rlhfkit.words import mark

PANELS = {
    "model": mark("Model"),
    "lora": "LoRA",
    "data": mark("Data"),
    "optim": mark("Optimisation"),
    "run": mark("Run"),
    "sft": mark("Supervised fine-tuning"),
    "rm": mark("Reward model"),
    "ppo": "PPO",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "": mark("Settings"),
}
CONFIG_OPTION = typer.Option(
    "--config", help="Recipe in YAML; flags win over it.", rich_help_panel=mark("Configuration")
)


def option_of(field: FieldPath, *, hidden: bool = False) -> Any:
    """The type Typer parses: the field's own, or None where the flag is not given."""
    declared = field.info.annotation
    inner = declared
    if isinstance(declared, types.UnionType) or typing.get_origin(declared) is Union:
        inner = next(a for a in typing.get_args(declared) if a is not type(None))
    flag = str(field.flag)
    names = [f"{flag}/--no-{flag.removeprefix('--')}"] if inner is bool else [flag]
    number: dict[str, Any] = (
        {"parser": _number_of(inner), "metavar": f"<{inner.__name__}>"} if inner in (int, float) else {}
    )
    option = typer.Option(
        *names,
        help=f"{field.info.description}{_bounds(field)}",
        show_default=_shown_default(field),
        rich_help_panel=PANELS[field.block],
        autocompletion=_completion(field),
        hidden=hidden,
        **number,
    )
    if typing.get_origin(inner) is list:
        return Annotated[Optional[list[str]], option]  # noqa: UP045 -- typer reads it at run time
    if typing.get_origin(inner) is Literal:
        # Bounds and choices are checked with everything else in load_config: all faults in one message.
        return Annotated[Optional[str], option]  # noqa: UP045
    return Annotated[Optional[inner], option]  # noqa: UP045


def _number_of(kind: Any) -> Callable[[str], Any]:
    """Reads a number; what is none is left to `load_config`, which names it with all other faults. Typer would stop at
    the first."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return read


def one_of(flag: str, help: str, *choices: str, **more: Any) -> Any:
    """An option with few values: they stand in its help, and the shell completes them."""
    return typer.Option(flag, help=f"{help} \\[{'|'.join(choices)}]", autocompletion=lambda: list(choices), **more)


def _completion(field: FieldPath) -> Callable[[], list[str]] | None:
    """What the shell completes; file names where there is nothing."""
    if typing.get_origin(field.info.annotation) is Literal:
        return lambda: list(typing.get_args(field.info.annotation))
    return {"family": family_names, "template": _template_names}.get(field.path.rpartition(".")[2])


def family_names() -> list[str]:
    from rlhfkit.families.registry import installed_families

    return ["auto", *(item.family.name for item in installed_families())]


def _template_names() -> list[str]:
    from rlhfkit.chat.template import template_names

    return ["auto", *template_names()]


def refused_option_of(path: str) -> Any:
    if elsewhere := next((f for f in iterate_fields(StageConfig) if f.path == path), None):
        return option_of(elsewhere, hidden=True)
    flag = "--" + path.rpartition(".")[2].replace("_", "-")
    return Annotated[Optional[str], typer.Option(flag, hidden=True)]  # noqa: UP045


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
