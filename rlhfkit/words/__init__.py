"""What people read, in their language. The code speaks English; ``tr`` stands where a text is shown.

Messages are written in place, as plain strings and f-strings, and errors, JSON and files keep them so. The screen, the
error text and the pages pass them through ``tr``, which finds the finished text in the catalogue of the language
(``words/zh.json``): by its fixed parts, with what stood between them carried over. ``docs/contributing.md`` says how a
message gets its translation; a test fails where one has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from itertools import zip_longest

from rlhfkit.errors import ConfigError, RlhfkitError
from rlhfkit.words.catalogue import Catalogue

LANGUAGES = ("en", "zh")
VARIABLE = "RLHFKIT_LANG"
FLAG = "--lang"

_language = "en"  # of the Python API; the command line chooses


def tr(text: str) -> str:
    """A text for people, in the language they read."""
    return text if _language == "en" else catalogue(_language).translate(text)


def told(error: RlhfkitError) -> str:
    """An error and what to do next, in the language they read."""
    return f"{tr(error.message)}\n  → {tr(error.hint)}" if error.hint else tr(error.message)


def mark(text: str) -> str:
    """The text itself: tells the catalogue of a word that is passed to ``tr`` elsewhere."""
    return text


def choose(language: str) -> None:
    """The language of everything that is shown from now on."""
    global _language
    _language = language


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Another language for a while."""
    before = chosen()
    choose(language)
    try:
        yield
    finally:
        choose(before)


def chosen() -> str:
    """The language of what is shown now."""
    return _language


def wanted(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The language that a command line and its environment ask for: ``--lang``, else RLHFKIT_LANG, else the locale.

    Raises:
        ConfigError: a language without a catalogue is named. A locale without one is English.
    """
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name == FLAG and (equals or following):
            return _known(FLAG, value if equals else following)
    if named := environment.get(VARIABLE):
        return _known(VARIABLE, named)
    locale = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def _known(source: str, language: str) -> str:
    if (found := language.replace("-", "_").partition("_")[0].lower()) in LANGUAGES:
        return found
    raise ConfigError(f"{source}: there is no language '{language}'", hint="choose en or zh")


@cache
def catalogue(language: str) -> Catalogue:
    """The catalogue of a language, read once."""
    return Catalogue.parse((files("rlhfkit.words") / f"{language}.json").read_text(encoding="utf-8"))
