"""Conversations and texts as rows hold them: lists of turns, hh-rlhf transcripts, text in parts."""

from __future__ import annotations

import re
from typing import Any

from rlhfkit.chat.messages import Conversation, Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
}


class FieldFault(Exception):
    """A fault of one field; ``parse_row`` adds the row and the accepted formats."""

    def __init__(self, field: str, fault: str) -> None:
        super().__init__(f'field "{field}": {fault}')


# --- hh-rlhf transcripts ----------------------------------------------------------------------------------------------


TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(text: str) -> bool:
    if text.startswith("\n\nHuman:"):
        return True
    # Stripped of its first line breaks it looks like any text, unless an answer follows.
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def transcript_turns(name: str, text: str) -> Conversation:
    parts = TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    speakers, contents = parts[1::2], parts[2::2]
    return tuple(
        Message("user" if speaker == "Human" else "assistant", text_of(name, content).strip())
        for speaker, content in zip(speakers, contents, strict=True)
    )


def transcript(name: str, text: str) -> Conversation:
    turns = transcript_turns(name, text)
    check_turns(name, turns)
    return turns


def open_transcript(name: str, text: str) -> Conversation:
    """The turns of a transcript that waits for its answer, that is, ends with an empty ``Assistant:``."""
    turns = transcript_turns(name, text)
    if turns[-1] != Message("assistant", ""):
        raise FieldFault(name, 'a transcript that does not end with an open "Assistant:" turn')
    check_turns(name, turns)
    return turns[:-1]


# --- turns and texts --------------------------------------------------------------------------------------------------


def conversation_of(name: str, value: Any) -> Conversation:
    if not isinstance(value, list) or not value:
        raise FieldFault(name, f"{found_words(value)} where a list of turns is needed")
    turns = tuple(message_of(f"{name}[{i}]", item) for i, item in enumerate(value))
    check_turns(name, turns)
    return turns


def message_of(name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise FieldFault(name, f"{found_words(item)} where a turn like {{role, content}} or {{from, value}} is needed")
    role_key, content_key = ("role", "content") if item.get("role") is not None else ("from", "value")
    if role_key not in item or content_key not in item:
        raise FieldFault(name, f"{found_words(item)} where a turn like {{role, content}} or {{from, value}} is needed")
    role = item[role_key]
    if not isinstance(role, str) or role not in ROLES:
        said = f'the role "{role}"' if isinstance(role, str) else f"{found_words(role)} as role"
        raise FieldFault(f"{name}.{role_key}", f"{said} is not supported; roles are {', '.join(ROLES)}")
    if ROLES[role] == "assistant" and item.get("weight") not in (None, 1):
        raise FieldFault(
            f"{name}.weight", f"{found_words(item['weight'])}: turns cannot be weighed; every answer is learned"
        )
    if item.get("tool_calls"):
        raise FieldFault(f"{name}.tool_calls", "tool calls are not supported")
    return Message(ROLES[role], content_of(f"{name}.{content_key}", item[content_key]))


def check_turns(name: str, turns: Conversation) -> None:
    """User and assistant alternate after an optional system turn, and the user always says something."""
    start = 1 if turns[0].role == "system" else 0
    if len(turns) == start:
        raise FieldFault(name, "a system turn alone; a user turn is needed after it")
    for i, turn in enumerate(turns[start:]):
        needed = "assistant" if i % 2 else "user"
        if turn.role != needed:
            raise FieldFault(
                f"{name}[{start + i}]",
                f"the role is {turn.role} where {needed} is needed; "
                "user and assistant alternate after an optional system turn",
            )
        if needed == "user" and not turn.content.strip():
            raise FieldFault(f"{name}[{start + i}]", "the user's text is empty")


def content_of(name: str, value: Any) -> str:
    """A turn's text, given as a string or as a list of text parts."""
    if not isinstance(value, list):
        return text_of(name, value)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or "type" not in part:
            raise FieldFault(
                f"{name}[{i}]", f'{found_words(part)} where a part like {{"type": "text", "text": ...}} is needed'
            )
        if part["type"] != "text":
            raise FieldFault(f"{name}[{i}]", f'a part of the type "{part["type"]}"; only text is supported')
        texts.append(text_of(f"{name}[{i}].text", part.get("text")))
    return "".join(texts)


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldFault(name, f"{found_words(value)} where text is needed")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise FieldFault(name, f"half a surrogate pair (\\u{code:04x}) at character {error.start}") from None
    return value


def found_words(value: Any) -> str:
    """How to call a value in a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the text {shortened(value)!r}" if value.strip() else "an empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no fields'}"
    return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
