"""Help and usage errors in the reader's language: Typer's commands, with their texts passed through ``tr``.

What Typer and Click say themselves is in the catalogue too, under ``theirs``.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import typer
from typer import rich_utils
from typer.core import TyperCommand, TyperGroup

from rlhfkit.words import chosen, tr
from rlhfkit.words.lines import Prose

# Texts that Typer's help and error boxes are put together from.
_THEIRS = (
    "DEPRECATED_STRING", "DEFAULT_STRING", "ENVVAR_STRING", "REQUIRED_LONG_STRING", "ARGUMENTS_PANEL_TITLE",
    "OPTIONS_PANEL_TITLE", "COMMANDS_PANEL_TITLE", "ERRORS_PANEL_TITLE", "ABORTED_TEXT", "RICH_HELP",
)  # fmt: skip
_USAGE = ("Usage: ", "[OPTIONS]", "COMMAND [ARGS]...")


class _Highlighter(rich_utils.OptionHighlighter):
    """Everything in Typer's help passes through it."""

    def __call__(self, text: Any) -> Prose:
        found = super().__call__(text)
        return Prose(found.plain, found.style, spans=found.spans)


class Command(TyperCommand):
    """A command whose help is shown in the chosen language."""

    def get_params(self, ctx: Any) -> Any:
        return _translated(super().get_params(ctx))

    def get_usage(self, ctx: Any) -> str:
        return _usage(super().get_usage(ctx))


class Group(TyperGroup):
    """The commands together. Its ``main`` also shows usage errors in the chosen language."""

    def get_params(self, ctx: Any) -> Any:
        return _translated(super().get_params(ctx))

    def get_usage(self, ctx: Any) -> str:
        return _usage(super().get_usage(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.help = help_text(command.help or "")
            command.rich_help_panel = tr(command.rich_help_panel or "") or None
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.help = help_text(self.help or "")
        super().format_help(ctx, formatter)

    def main(self, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if chosen() == "en" or not standalone_mode:
            return super().main(standalone_mode=standalone_mode, **extra)
        for name in _THEIRS:
            if hasattr(rich_utils, name):
                setattr(rich_utils, name, tr(getattr(rich_utils, name)))
        rich_utils.highlighter = _Highlighter()
        try:
            code = super().main(standalone_mode=False, **extra)
        except typer.Abort:
            rich_utils.rich_abort_error()
            sys.exit(1)
        except Exception as error:
            if not hasattr(error, "format_message"):  # not Click's
                raise
            words = tr(error.format_message())
            error.format_message = lambda: words
            rich_utils.rich_format_error(error)  # type: ignore[arg-type]
            sys.exit(getattr(error, "exit_code", 1))
        sys.exit(code if isinstance(code, int) else 0)


def help_text(text: str) -> str:
    """The help of a command, paragraph by paragraph; command lines stay as they are."""
    return "\n\n".join(map(_paragraph, inspect.cleandoc(text).split("\n\n")))


def _paragraph(text: str) -> str:
    return text if chosen() == "en" or text.lstrip().startswith("rlhfkit ") else tr(" ".join(text.split()))


def _translated(parameters: Any) -> Any:
    """The options and arguments of a command with help and panel in the chosen language."""
    if chosen() != "en":
        for parameter in parameters:
            words, bracket, choices = (getattr(parameter, "help", None) or "").partition(" \\[")
            parameter.help = tr(words) + bracket + choices
            parameter.rich_help_panel = tr(getattr(parameter, "rich_help_panel", None) or "") or None
    return parameters


def _usage(text: str) -> str:
    for word in _USAGE:
        text = text.replace(word, tr(word))
    return text
