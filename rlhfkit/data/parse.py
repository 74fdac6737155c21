"""Rows of any common format become records of a stage; a fault names the row, the field and what was found in it.

One function per stage reads top to bottom: which format is this row, what is its prompt, what are its answers. Nothing
is guessed: a row that fits no format, or two, is refused with the fields it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhfkit.chat.messages import Conversation, Message, Role
from rlhfkit.data.read import RawRow
from rlhfkit.data.records import PreferenceRecord, PromptRecord, Record, SftRecord
from rlhfkit.errors import DataError

Stage = Literal["sft", "rm", "ppo"]
Fields = Mapping[str, Any]

ACCEPTED_FORMATS: dict[Stage, str] = {
    "sft": (
        "prompt + response (or prompt + completion, query + response, question + answer); "
        "instruction + input + output, with history and system if there are any; "
        "messages as a list of {role, content}; conversations as a list of {from, value}; text"
    ),
    "rm": (
        "prompt + chosen + rejected; messages or conversations + chosen + rejected; "
        "instruction + input + chosen + rejected; chosen + rejected as two conversations with one beginning; "
        "prompt + answers, best first; instruction + input + output as a list, best first; margin if there is one"
    ),
    "ppo": (
        "prompt; messages or conversations; instruction + input; question; query; turns; "
        "a preference row, of which the prompt is used"
    ),
}

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
}


_MOST_FIELDS_NAMED = 12


class _FieldFault(Exception):
    """A fault of one field; ``parse_row`` adds the row and the accepted formats."""

    def __init__(self, field: str, fault: str) -> None:
        super().__init__(f'field "{field}": {fault}')


class _FormatFault(Exception):
    """A row that fits no format, or several."""

    def __init__(self, why: str, fields: Fields) -> None:
        names = [_shortened(name) + (" (null)" if value is None else "") for name, value in fields.items()]
        listed = ", ".join(names[:_MOST_FIELDS_NAMED]) + (", …" if len(names) > _MOST_FIELDS_NAMED else "")
        super().__init__(f"{why}; its fields are {listed or 'none'}")


def parse_row(row: RawRow, stage: Stage) -> Record:
    """The record that a row holds for a stage: SftRecord, PreferenceRecord or PromptRecord.

    Raises:
        DataError: names the row, the field, what was found and the accepted formats.
    """
    try:
        return _PARSERS[stage](row)
    except (_FieldFault, _FormatFault) as fault:
        raise DataError(f"{row.where}: {fault}", hint=f"{stage} rows are {ACCEPTED_FORMATS[stage]}") from None


# --- the three stages -------------------------------------------------------------------------------------------------


_SFT_FORMATS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("messages",),
    ("conversations",),
)


def _parse_sft(row: RawRow) -> SftRecord:
    fields = row.fields
    names = _sft_format(fields)
    if names == ("text",):
        text = _text("text", fields["text"])
        if not text.strip():
            raise _FieldFault("text", f"{_found(text)} where text to learn is needed")
        return SftRecord(row.where, text=text)
    if len(names) == 1:
        messages = _learned_conversation(fields, names[0])
    else:
        messages = _learned_pair(fields, *names)
    return SftRecord(row.where, messages=messages)


def _learned_conversation(fields: Fields, name: str) -> Conversation:
    turns = _conversation(name, fields[name])
    if not any(turn.role == "assistant" for turn in turns):
        raise _FieldFault(name, "there is no assistant turn to learn")
    if turns[-1].role == "user":
        if fields.get("chosen") is not None:
            raise _FieldFault(name, 'it ends with a user turn whose answer is in "chosen"; this is rm data')
        turns = turns[:-1]
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.content.strip():
            raise _FieldFault(f"{name}[{i}]", "the assistant's text is empty")
    return _with_system(fields, _with_history(fields, name, turns))


def _learned_pair(fields: Fields, prompt_name: str, answer_name: str) -> Conversation:
    prompt = _prompt(fields, prompt_name)
    answer = _answer(answer_name, fields[answer_name])
    if not answer.strip():
        raise _FieldFault(answer_name, "the answer is empty")
    if any(turn.role == "assistant" and not turn.content.strip() for turn in prompt):
        raise _FieldFault("history" if fields.get("history") else prompt_name, "an assistant's text in it is empty")
    return (*prompt, Message("assistant", answer))


def _sft_format(fields: Fields) -> tuple[str, ...]:
    complete = [names for names in _SFT_FORMATS if all(fields.get(name) is not None for name in names)]
    if len(complete) == 1:
        return complete[0]
    if len(complete) > 1:
        listed = ", ".join(" + ".join(names) for names in complete)
        raise _FormatFault(f"the row fits several sft formats ({listed})", fields)
    # A null among the fields of a format is that field's fault; all null is how tables store an absent format.
    for names in _SFT_FORMATS:
        values = [fields.get(name) for name in names]
        if all(name in fields for name in names) and any(value is not None for value in values):
            return names
    # Last, because alpaca sets on the hub carry the rendered prompt as a further field of this name.
    if fields.get("text") is not None:
        return ("text",)
    raise _FormatFault("the row fits no sft format", fields)


def _parse_preference(row: RawRow) -> PreferenceRecord:
    fields = row.fields
    found = _ranked_answers(fields)
    prompt_name = _prompt_name(fields, ("messages", "conversations", "instruction", "question", "query"))
    if prompt_name is not None:
        prompt, answers = _answers_to(fields, prompt_name, found)
    elif _is_pair(found):
        common, tails = _shared_beginning(found)
        prompt, answers = _with_system(fields, common), _last_turns(common, found, tails)
    else:
        raise _FormatFault("the row has ranked answers but no prompt", fields)
    _check_answers([name for name, _ in found], answers)
    return PreferenceRecord(row.where, prompt=prompt, answers=answers, margin=_margin(fields.get("margin")))


def _ranked_answers(fields: Fields) -> list[tuple[str, Any]]:
    """The answers of a preference row, best first, each with the name of its field."""
    pair = fields.get("chosen") is not None or fields.get("rejected") is not None
    if pair and fields.get("answers") is not None:
        raise _FormatFault("the row fits several rm formats (chosen + rejected, answers)", fields)
    if pair:
        for name in ("chosen", "rejected"):
            if name not in fields:
                raise _FormatFault(f"the row has no {name}", fields)
        return [("chosen", fields["chosen"]), ("rejected", fields["rejected"])]
    if fields.get("answers") is not None:
        name = "answers"
    elif fields.get("instruction") is not None and isinstance(fields.get("output"), list):
        name = "output"
    else:
        raise _FormatFault("the row fits no rm format", fields)
    ranked = fields[name]
    if not isinstance(ranked, list) or len(ranked) < 2:
        raise _FieldFault(name, f"{_found(ranked)} where a list of two or more answers, best first, is needed")
    return [(f"{name}[{i}]", answer) for i, answer in enumerate(ranked)]


def _is_pair(found: Sequence[tuple[str, Any]]) -> bool:
    return [name for name, _ in found] == ["chosen", "rejected"]


def _check_answers(names: Sequence[str], answers: Sequence[str]) -> None:
    first_with: dict[str, str] = {}
    for name, answer in zip(names, answers, strict=True):
        if not answer.strip():
            raise _FieldFault(name, "the answer is empty")
        if answer in first_with:
            raise _FieldFault(name, f'the answer is equal to "{first_with[answer]}", so there is nothing to prefer')
        first_with[answer] = name


def _margin(value: Any) -> float:
    if value is None or value == "":  # a CSV cell left empty
        return 0.0
    try:
        # CSV has no numbers, so a text that spells one counts.
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise _FieldFault("margin", f"{_found(value)} where a number is needed")
    return margin


_PPO_PROMPTS = ("messages", "conversations", "instruction", "question", "query", "turns")


def _parse_prompt(row: RawRow) -> PromptRecord:
    fields = row.fields
    name = _prompt_name(fields, _PPO_PROMPTS)
    if name is not None:
        prompt = _prompt(fields, name, drop_answer=name in ("messages", "conversations"))
    elif fields.get("chosen") is not None and fields.get("rejected") is not None:
        common, _ = _shared_beginning(_ranked_answers(fields))
        prompt = _with_system(fields, _without_answer("chosen", common))
    else:
        raise _FormatFault("the row has no prompt", fields)
    used = {name, "system", "history"} | ({"input"} if name == "instruction" else set())
    return PromptRecord(row.where, prompt=prompt, columns={key: fields[key] for key in fields if key not in used})


_PARSERS: dict[Stage, Callable[[RawRow], Record]] = {
    "sft": _parse_sft,
    "rm": _parse_preference,
    "ppo": _parse_prompt,
}


# --- prompts ----------------------------------------------------------------------------------------------------------


def _prompt_name(fields: Fields, others: Sequence[str]) -> str | None:
    """The field that holds the prompt. One called ``prompt`` wins: sets that have it repeat its text under others."""
    present = [name for name in ("prompt", *others) if fields.get(name) is not None]
    if len(present) > 1 and present[0] != "prompt":
        raise _FormatFault(f"several fields could be the prompt ({', '.join(present)})", fields)
    return present[0] if present else None


def _prompt(fields: Fields, name: str, *, drop_answer: bool = False) -> Conversation:
    """The conversation up to the answer; ends with a user turn.

    Args:
        fields: the row.
        name: the field that holds the prompt, with ``system``, ``history`` and alpaca's ``input`` beside it.
        drop_answer: leave out an assistant turn at the end, as full conversations have it.
    """
    value = fields[name]
    if name == "instruction":
        turns: Conversation = (Message("user", _instruction(fields)),)
    elif name == "turns":
        turns = (Message("user", _first_of_turns(value)),)
    elif isinstance(value, str) and name not in ("messages", "conversations"):
        turns = _open_transcript(name, value) if _is_transcript(value) else (Message("user", _text(name, value)),)
    elif isinstance(value, list) or name in ("messages", "conversations"):
        turns = _conversation(name, value)
    else:
        raise _FieldFault(name, f"{_found(value)} where text or a list of turns is needed")
    if drop_answer:
        turns = _without_answer(name, turns)
    if turns[-1].role != "user":
        raise _FieldFault(name, "the prompt ends with an assistant turn; it must end with a user turn")
    if not turns[-1].content.strip():
        raise _FieldFault(name, "the user's text is empty")
    return _with_system(fields, _with_history(fields, name, turns))


def _without_answer(name: str, messages: Conversation) -> Conversation:
    kept = messages[:-1] if messages and messages[-1].role == "assistant" else messages
    if not kept or kept[-1].role != "user":
        raise _FieldFault(name, "there is no user turn to answer")
    return kept


def _instruction(fields: Fields) -> str:
    instruction = _text("instruction", fields["instruction"])
    value = fields.get("input")
    extra = "" if value is None else _text("input", value)
    if not extra.strip():
        extra = _first_instance_input(fields.get("instances"))
    if not extra.strip():
        return instruction
    return f"{instruction}\n{extra}" if instruction.strip() else extra


def _first_instance_input(instances: Any) -> str:
    """The input of a self-instruct task, which stands in its first instance; without it the task lacks its object."""
    first = instances[0] if isinstance(instances, list) and instances else None
    value = first.get("input") if isinstance(first, dict) else None
    return value if isinstance(value, str) else ""


def _first_of_turns(turns: Any) -> str:
    if not isinstance(turns, list) or not turns:
        raise _FieldFault("turns", f"{_found(turns)} where a list of user turns is needed")
    return _text("turns[0]", turns[0])


def _with_history(fields: Fields, name: str, turns: Conversation) -> Conversation:
    """Earlier turns, a list of [user, assistant] pairs, in front of the prompt."""
    history = fields.get("history")
    if history is None or history == [] or history == "":
        return turns
    if len(turns) > 1:
        raise _FieldFault("history", f'earlier turns beside "{name}", which is a whole conversation')
    if not isinstance(history, list):
        raise _FieldFault("history", f"{_found(history)} where a list of [user, assistant] pairs is needed")
    earlier: list[Message] = []
    for i, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _FieldFault(f"history[{i}]", f"{_found(pair)} where a [user, assistant] pair is needed")
        user, assistant = (_text(f"history[{i}][{side}]", text) for side, text in enumerate(pair))
        if not user.strip():
            raise _FieldFault(f"history[{i}][0]", "the user's text is empty")
        earlier += [Message("user", user), Message("assistant", assistant)]
    return (*earlier, *turns)


def _with_system(fields: Fields, turns: Conversation) -> Conversation:
    value = fields.get("system")
    system = "" if value is None else _text("system", value)
    if not system.strip():
        return turns
    if turns[0].role != "system":
        return (Message("system", system), *turns)
    if turns[0].content != system:
        raise _FieldFault("system", "the conversation already opens with another system turn")
    return turns


# --- answers ----------------------------------------------------------------------------------------------------------


def _answer(name: str, value: Any) -> str:
    """One assistant text: a string, one message, or a list of one message."""
    if isinstance(value, str):
        return _text(name, value)
    if isinstance(value, list) and len(value) == 1:
        return _answer(f"{name}[0]", value[0])
    if not isinstance(value, dict):
        raise _FieldFault(name, f"{_found(value)} where one answer is needed")
    message = _message(name, value)
    if message.role != "assistant":
        raise _FieldFault(name, f"a {message.role} turn where an assistant turn is needed")
    return message.content


def _answers_to(
    fields: Fields, prompt_name: str, found: Sequence[tuple[str, Any]]
) -> tuple[Conversation, tuple[str, ...]]:
    """The prompt and its answers, where an answer may repeat the conversation before it."""
    prompt = _prompt(fields, prompt_name)
    raw_prompt = fields[prompt_name]
    is_text = isinstance(raw_prompt, str)
    from_transcript = is_text and _is_transcript(raw_prompt)
    prompts: list[Conversation] = []
    answers: list[str] = []
    for name, value in found:
        turns = _repeated_conversation(name, value, from_transcript)
        if turns is None:
            prompts.append(prompt)
            answers.append(_transcript_answer(name, value) if from_transcript else _answer(name, value))
            continue
        before = _with_system(fields, turns[:-1])
        if before != prompt and not (is_text and not from_transcript and _is_one_turn_of(prompt, before)):
            raise _FieldFault(name, "the conversation before its answer is not the prompt")
        prompts.append(before)
        answers.append(turns[-1].content)
    if any(other != prompts[0] for other in prompts):
        raise _FieldFault(found[-1][0], "the turns before the answers differ, so they do not answer one prompt")
    return prompts[0], tuple(answers)


def _is_one_turn_of(prompt: Conversation, conversation: Conversation) -> bool:
    """Whether a prompt of one user turn is part of a conversation, which is then the fuller prompt."""
    return [turn.role for turn in prompt if turn.role != "system"] == ["user"] and prompt[-1] in conversation


def _repeated_conversation(name: str, value: Any, from_transcript: bool) -> Conversation | None:
    """The turns of an answer that carries its conversation; None for an answer alone."""
    if isinstance(value, list) and len(value) > 1:
        turns = _conversation(name, value)
    elif from_transcript and isinstance(value, str) and _is_transcript(value):
        turns = _transcript(name, value)
    else:
        return None
    if turns[-1].role != "assistant":
        raise _FieldFault(name, "it ends with a user turn, so it holds no answer")
    return turns


def _transcript_answer(name: str, value: Any) -> str:
    text = _answer(name, value)
    if _TRANSCRIPT_TURN.search(text):
        raise _FieldFault(name, "further turns follow the answer")
    return text.strip()


def _shared_beginning(pair: Sequence[tuple[str, Any]]) -> tuple[Conversation, list[Conversation]]:
    """The longest run of whole turns that two conversations begin with, and what is left of each."""
    conversations = []
    for name, value in pair:
        if isinstance(value, str) and _is_transcript(value):
            conversations.append(_transcript(name, value))
        elif isinstance(value, list) and len(value) > 1:
            conversations.append(_conversation(name, value))
        else:
            raise _FieldFault(
                name,
                f"{_found(value)}, and the row has no prompt; without one, chosen and rejected are whole "
                "conversations: lists of turns, or transcripts of Human: and Assistant: turns",
            )
    first, second = conversations
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return first[:shared], [first[shared:], second[shared:]]


def _last_turns(
    common: Conversation, pair: Sequence[tuple[str, Any]], tails: Sequence[Conversation]
) -> tuple[str, ...]:
    if not tails[0] and not tails[1]:
        raise _FieldFault("rejected", 'the conversation is equal to "chosen", so there is nothing to prefer')
    if not common or common[-1].role != "user":
        raise _FieldFault("rejected", f'it parts from "chosen" at turn {len(common) + 1}, which is no answer to a user')
    for (name, _), tail in zip(pair, tails, strict=True):
        if len(tail) != 1:
            raise _FieldFault(name, f"{len(tail)} turns follow what chosen and rejected share; one answer is needed")
    return tuple(tail[0].content for tail in tails)


# --- hh-rlhf transcripts ----------------------------------------------------------------------------------------------


_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def _is_transcript(text: str) -> bool:
    if text.startswith("\n\nHuman:"):
        return True
    # Stripped of its first line breaks it looks like any text, unless an answer follows.
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _transcript_turns(name: str, text: str) -> Conversation:
    parts = _TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    speakers, contents = parts[1::2], parts[2::2]
    return tuple(
        Message("user" if speaker == "Human" else "assistant", _text(name, content).strip())
        for speaker, content in zip(speakers, contents, strict=True)
    )


def _transcript(name: str, text: str) -> Conversation:
    turns = _transcript_turns(name, text)
    _check_turns(name, turns)
    return turns


def _open_transcript(name: str, text: str) -> Conversation:
    """The turns of a transcript that waits for its answer, that is, ends with an empty ``Assistant:``."""
    turns = _transcript_turns(name, text)
    if turns[-1] != Message("assistant", ""):
        raise _FieldFault(name, 'a transcript that does not end with an open "Assistant:" turn')
    _check_turns(name, turns)
    return turns[:-1]


# --- turns and texts --------------------------------------------------------------------------------------------------


def _conversation(name: str, value: Any) -> Conversation:
    if not isinstance(value, list) or not value:
        raise _FieldFault(name, f"{_found(value)} where a list of turns is needed")
    turns = tuple(_message(f"{name}[{i}]", item) for i, item in enumerate(value))
    _check_turns(name, turns)
    return turns


def _message(name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise _FieldFault(name, f"{_found(item)} where a turn like {{role, content}} or {{from, value}} is needed")
    role_key, content_key = ("role", "content") if item.get("role") is not None else ("from", "value")
    if role_key not in item or content_key not in item:
        raise _FieldFault(name, f"{_found(item)} where a turn like {{role, content}} or {{from, value}} is needed")
    role = item[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        said = f'the role "{role}"' if isinstance(role, str) else f"{_found(role)} as role"
        raise _FieldFault(f"{name}.{role_key}", f"{said} is not supported; roles are {', '.join(_ROLES)}")
    if item.get("tool_calls"):
        raise _FieldFault(f"{name}.tool_calls", "tool calls are not supported")
    return Message(_ROLES[role], _content(f"{name}.{content_key}", item[content_key]))


def _check_turns(name: str, turns: Conversation) -> None:
    """User and assistant alternate after an optional system turn, and the user always says something."""
    start = 1 if turns[0].role == "system" else 0
    if len(turns) == start:
        raise _FieldFault(name, "a system turn alone; a user turn is needed after it")
    for i, turn in enumerate(turns[start:]):
        needed = "assistant" if i % 2 else "user"
        if turn.role != needed:
            raise _FieldFault(
                f"{name}[{start + i}]",
                f"the role is {turn.role} where {needed} is needed; "
                "user and assistant alternate after an optional system turn",
            )
        if needed == "user" and not turn.content.strip():
            raise _FieldFault(f"{name}[{start + i}]", "the user's text is empty")


def _content(name: str, value: Any) -> str:
    """A turn's text, given as a string or as a list of text parts."""
    if not isinstance(value, list):
        return _text(name, value)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or "type" not in part:
            raise _FieldFault(
                f"{name}[{i}]", f'{_found(part)} where a part like {{"type": "text", "text": ...}} is needed'
            )
        if part["type"] != "text":
            raise _FieldFault(f"{name}[{i}]", f'a part of the type "{part["type"]}"; only text is supported')
        texts.append(_text(f"{name}[{i}].text", part.get("text")))
    return "".join(texts)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _FieldFault(name, f"{_found(value)} where text is needed")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise _FieldFault(name, f"half a surrogate pair (\\u{code:04x}) at character {error.start}") from None
    return value


def _found(value: Any) -> str:
    """How to call a value in a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the text {_shortened(value)!r}" if value.strip() else "an empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no fields'}"
    return f"a {type(value).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
