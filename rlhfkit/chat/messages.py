"""A conversation: what every data format becomes and every template renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``content`` is plain text: nothing in it ever becomes a control token.

    Args:
        role: whose turn it is.
        content: all of its words.
        input: of an alpaca row with an input, that input: ``content`` is the instruction, a line break, and this.
            A template may render the two apart. Messages of the same words are equal whether or not they know it.
    """

    role: Role
    content: str
    input: str = field(default="", compare=False)

    @property
    def instruction(self) -> str:
        """What stands in front of the input; all of the words if there is none."""
        return self.content.removesuffix(f"\n{self.input}") if self.input else self.content

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}

    def with_input(self) -> dict[str, str]:
        """The same with what its input is, for a reader that has a template of its own."""
        return self.as_dict() | ({"input": self.input} if self.input else {})


def message_with_input(role: Role, content: str, given: Any) -> Message:
    """A message as `Message.with_input` has it; what is given as its input counts if the words end with it."""
    known = isinstance(given, str) and given.strip() and content.endswith(f"\n{given}")
    return Message(role, content, input=given if known else "")


Conversation = tuple[Message, ...]


def last_user_text(conversation: Sequence[Message]) -> str:
    """The newest user turn, for tables and logs; empty when there is none."""
    return next((m.content for m in reversed(conversation) if m.role == "user"), "")
