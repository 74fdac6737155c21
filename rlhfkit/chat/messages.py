"""A conversation: what every data format becomes and every template renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``content`` is plain text: nothing in it ever becomes a control token."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


def last_user_text(conversation: Sequence[Message]) -> str:
    """The newest user turn, for tables and logs; empty when there is none."""
    return next((m.content for m in reversed(conversation) if m.role == "user"), "")
