"""The application, and how a function becomes one of its commands."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from rlhfkit import __version__, words
from rlhfkit.words import mark
from rlhfkit.words.command_line import Command, Group

HUB = "https://huggingface.co"

app = typer.Typer(
    name="rlhfkit",
    cls=Group,
    help="SFT, reward model and PPO for people with one GPU.\n\nStart with: rlhfkit demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# It takes effect before the command line is parsed, so that faults of parsing are told in this language too.
LanguageOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        words.FLAG,
        metavar="en|zh",
        help="Language of help and messages; else RLHFKIT_LANG, else that of the locale.",
        show_default=False,
        autocompletion=lambda: list(words.LANGUAGES),
    ),
]
PANEL_OF = {
    **dict.fromkeys(("sft", "rm", "ppo", "demo"), mark("Training")),
    **dict.fromkeys(("dpo", "kto", "grpo", "rloo"), mark("Training through TRL")),
    **dict.fromkeys(("inspect", "report", "score", "generate", "serve-reward"), mark("Looking at data and results")),
    **dict.fromkeys(("doctor", "fix-checkpoint", "convert", "merge"), mark("Model folders")),
    **dict.fromkeys(("init", "families"), mark("Getting started")),
}


def register(
    name: str, command: Callable[..., None], annotations: dict[str, Any], summary: str, examples: list[str]
) -> None:
    """Make a command of a function that takes these words, each None where it is not given."""
    parameters = [
        inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for word, annotation in annotations.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    command.__doc__ = summary + "\n\n[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {e}" for e in examples)
    as_command(name)(command)


def as_command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command, with the options that every command has."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*, lang: str | None, **given: Any) -> None:
            function(**given)

        own = inspect.signature(function, eval_str=True).parameters.values()
        language = inspect.Parameter("lang", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=LanguageOption)
        command.__signature__ = inspect.Signature([*own, language])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, language)}
        app.command(name, cls=Command, rich_help_panel=PANEL_OF.get(name))(command)
        return function

    return register


def use_endpoint(endpoint: str) -> None:
    """Before anything of the hub is imported: its endpoint is read once, at import."""
    if endpoint:
        os.environ["HF_ENDPOINT"] = endpoint
    if os.environ.get("HF_ENDPOINT", HUB).rstrip("/") != HUB:
        # A mirror stands for the hub's web address; large files would come from its other storage, xet, past it.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


def _version(value: bool) -> None:
    if value:
        print(f"rlhfkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    lang: LanguageOption = None,
) -> None:
    pass
