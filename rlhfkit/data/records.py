"""What a row of a data set is once its format is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhfkit.chat.messages import Conversation


@dataclass(frozen=True, slots=True)
class SftRecord:
    """A conversation whose assistant turns are learned, or a plain text of which every token is learned.

    Exactly one of ``messages`` and ``text`` is set. ``where`` names the row for messages, as ``file:line``.
    """

    where: str
    messages: Conversation = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """Answers to one prompt, best first; two answers are the usual pair.

    ``prompt`` ends with a user turn. ``margin`` (reward units) is subtracted inside the ranking loss; 0 is none.
    """

    where: str
    prompt: Conversation
    answers: tuple[str, ...]
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A conversation that waits for an answer. ``columns`` holds the row's other fields, for reward functions."""

    where: str
    prompt: Conversation
    columns: Mapping[str, Any] = field(default_factory=dict)


Record = SftRecord | PreferenceRecord | PromptRecord
