"""What a row of a data set is once its format is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhfkit.chat.messages import Conversation

REASONS_KEPT = 5


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
    """Answers to one prompt, best first; two answers are the usual pair. A single one is scored, not compared.

    ``prompt`` ends with a user turn. ``margin`` (reward units) is subtracted inside the ranking loss; 0 is none.
    """

    where: str
    prompt: Conversation
    answers: tuple[str, ...]
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class LabelledRecord:
    """Answers to one prompt, each desirable or not. ``prompt`` ends with a user turn."""

    where: str
    prompt: Conversation
    answers: tuple[str, ...]
    labels: tuple[bool, ...]  # of each answer, whether it is desirable


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A conversation that waits for an answer. ``columns`` holds the row's other fields, for reward functions."""

    where: str
    prompt: Conversation
    columns: Mapping[str, Any] = field(default_factory=dict)


Record = SftRecord | PreferenceRecord | LabelledRecord | PromptRecord


@dataclass
class Tally:
    """How many rows have something, and the places of the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.extend(Tally(1, [where]))

    def extend(self, other: Tally) -> None:
        self.count += other.count
        self.first = [*self.first, *other.first][:REASONS_KEPT]
