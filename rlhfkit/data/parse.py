"""Rows of any common format become records of a stage; a fault names the row, the field and what was found in it.

One function per stage reads top to bottom: which format is this row, what is its prompt, what are its answers. Nothing
is guessed: a row that fits no format, or two, is refused with the fields it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhfkit.chat.messages import Conversation, Message
from rlhfkit.data.records import LabelledRecord, PreferenceRecord, PromptRecord, Record, SftRecord
from rlhfkit.data.rows import OnRemark, RawRow, Remark
from rlhfkit.data.turns import (
    ROLES,
    TRANSCRIPT_TURN,
    FieldFault,
    conversation_of,
    found_words,
    is_transcript,
    message_of,
    open_transcript,
    shortened,
    text_of,
    transcript,
)
from rlhfkit.errors import DataError

Stage = Literal["sft", "rm", "kto", "ppo", "score"]
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
    "kto": (
        "label (true: desirable) beside prompt + completion, prompt + response and the other sft formats, text aside; "
        "prompt + chosen + rejected and the other rm formats"
    ),
    "ppo": (
        "prompt; messages or conversations; instruction + input; question; query; turns; "
        "a preference row, of which the prompt is used"
    ),
    "score": (
        "prompt + chosen + rejected and the other rm formats; "
        "prompt + response, prompt + answer and the other sft formats, text aside"
    ),
}

OPEN_TURN = "the last user turn is left out, since no answer follows it"
PROMPT_UNUSED = '"prompt" is not used: without an answer beside it, "text" is learned as it stands'
INPUT_UNUSED = '"input" is not used: it belongs to an "instruction"'

# The words of two faults that are counted apart; see fault_kind.
_EMPTY_ANSWER = "the answer is empty"
_EMPTY_TURN = "the assistant's text is empty"
_EMPTY_EARLIER_TURN = "an assistant's text in it is empty"
_NOTHING_TO_PREFER = "so there is nothing to prefer"

_MOST_FIELDS_NAMED = 12


class _FormatFault(Exception):
    """A row that fits no format, or several."""

    def __init__(self, why: str, fields: Fields) -> None:
        names = [shortened(name) + (" (null)" if value is None else "") for name, value in fields.items()]
        listed = ", ".join(names[:_MOST_FIELDS_NAMED]) + (", …" if len(names) > _MOST_FIELDS_NAMED else "")
        super().__init__(f"{why}; its fields are {listed or 'none'}")


def parse_row(row: RawRow, stage: Stage, on_remark: OnRemark | None = None) -> Record:
    """The record that a row holds for a stage: SftRecord, PreferenceRecord, LabelledRecord or PromptRecord.

    Args:
        row: as its file has it.
        stage: what the record is for.
        on_remark: takes what is to be told of a row that has no fault.

    Raises:
        DataError: names the row, the field, what was found and the accepted formats.
    """
    remarks: list[str] = []
    try:
        record = _PARSERS[stage](row, remarks)
    except (FieldFault, _FormatFault) as fault:
        raise DataError(f"{row.where}: {fault}", hint=f"{stage} rows are {ACCEPTED_FORMATS[stage]}") from None
    if on_remark is not None:
        for what in remarks:
            on_remark(Remark(row.where, what))
    return record


def fault_kind(message: str) -> Literal["empty answer", "equal answers", "other"]:
    """What kind of fault an error of ``parse_row`` tells; found in its words, which is all that reports keep of it."""
    if message.endswith((_EMPTY_ANSWER, _EMPTY_TURN, _EMPTY_EARLIER_TURN)):
        return "empty answer"
    return "equal answers" if message.endswith(_NOTHING_TO_PREFER) else "other"


def fault_place(message: str) -> str:
    """The place that an error of ``parse_row`` about one field begins with, as ``file:line``."""
    return message.rpartition(': field "')[0] or message


def likely_stage(fields: Fields) -> Stage | None:
    """The stage that a row seems made for: ranked answers, else an answer (a labelled one: kto) or plain text, else a
    prompt.

    Only the presence of fields counts, so that a row with a fault in it still says what it was meant to be.
    """
    given = {name for name, value in fields.items() if value is not None}
    if given & {"chosen", "rejected"} or any(isinstance(fields.get(name), list) for name in ("answers", "output")):
        return "rm"
    if any(len(names) > 1 and all(name in fields for name in names) and given & set(names) for names in _SFT_FORMATS):
        return "kto" if isinstance(fields.get("label"), bool) else "sft"
    conversation = fields.get("messages") or fields.get("conversations")
    if isinstance(conversation, list):
        turns = [turn for turn in conversation if isinstance(turn, dict)]
        roles = {ROLES.get(str(turn.get("role") or turn.get("from"))) for turn in turns}
        if "assistant" not in roles:
            return "ppo"
        return "kto" if isinstance(fields.get("label"), bool) else "sft"
    if given & {"prompt", *_PPO_PROMPTS}:
        return "ppo"
    return "sft" if "text" in given else None


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


def _parse_sft(row: RawRow, remarks: list[str]) -> SftRecord:
    fields = row.fields
    names = _sft_format(fields)
    if names == ("text",):
        text = text_of("text", fields["text"])
        if not text.strip():
            raise FieldFault("text", f"{found_words(text)} where text to learn is needed")
        if fields.get("prompt") is not None:
            remarks.append(PROMPT_UNUSED)
        return SftRecord(row.where, text=text)
    if len(names) == 1:
        messages = _learned_conversation(fields, names[0], remarks)
    else:
        messages = _learned_pair(fields, remarks, *names)
    return SftRecord(row.where, messages=messages)


def _learned_conversation(fields: Fields, name: str, remarks: list[str]) -> Conversation:
    turns = conversation_of(name, fields[name])
    _tell_unused_input(fields, name, remarks)
    if not any(turn.role == "assistant" for turn in turns):
        raise FieldFault(name, "there is no assistant turn to learn")
    if turns[-1].role == "user":
        if fields.get("chosen") is not None:
            raise FieldFault(name, 'it ends with a user turn whose answer is in "chosen"; this is rm data')
        turns = turns[:-1]
        remarks.append(OPEN_TURN)
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.content.strip():
            raise FieldFault(f"{name}[{i}]", _EMPTY_TURN)
    return _with_system(fields, _with_history(fields, name, turns))


def _learned_pair(fields: Fields, remarks: list[str], prompt_name: str, answer_name: str) -> Conversation:
    prompt = _prompt(fields, prompt_name)
    _tell_unused_input(fields, prompt_name, remarks)
    answer = _answer(answer_name, fields[answer_name])
    if not answer.strip():
        raise FieldFault(answer_name, _EMPTY_ANSWER)
    if any(turn.role == "assistant" and not turn.content.strip() for turn in prompt):
        raise FieldFault("history" if fields.get("history") else prompt_name, _EMPTY_EARLIER_TURN)
    return (*prompt, Message("assistant", answer))


def _sft_format(fields: Fields, stage: Stage = "sft") -> tuple[str, ...]:
    complete = [names for names in _SFT_FORMATS if all(fields.get(name) is not None for name in names)]
    if len(complete) == 1:
        return complete[0]
    if len(complete) > 1:
        listed = ", ".join(" + ".join(names) for names in complete)
        raise _FormatFault(f"the row fits several {stage} formats ({listed})", fields)
    # A null among the fields of a format is that field's fault; all null is how tables store an absent format.
    for names in _SFT_FORMATS:
        values = [fields.get(name) for name in names]
        if all(name in fields for name in names) and any(value is not None for value in values):
            return names
    # Last, because alpaca sets on the hub carry the rendered prompt as a further field of this name.
    if fields.get("text") is not None:
        return ("text",)
    raise _FormatFault(f"the row fits no {stage} format", fields)


def _parse_preference(row: RawRow, remarks: list[str]) -> PreferenceRecord:
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
    _tell_unused_input(fields, prompt_name, remarks)
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
        raise FieldFault(name, f"{found_words(ranked)} where a list of two or more answers, best first, is needed")
    return [(f"{name}[{i}]", answer) for i, answer in enumerate(ranked)]


def _is_pair(found: Sequence[tuple[str, Any]]) -> bool:
    return [name for name, _ in found] == ["chosen", "rejected"]


def _check_answers(names: Sequence[str], answers: Sequence[str]) -> None:
    first_with: dict[str, str] = {}
    for name, answer in zip(names, answers, strict=True):
        if not answer.strip():
            raise FieldFault(name, _EMPTY_ANSWER)
        if answer in first_with:
            raise FieldFault(name, f'the answer is equal to "{first_with[answer]}", {_NOTHING_TO_PREFER}')
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
        raise FieldFault("margin", f"{found_words(value)} where a number is needed")
    return margin


def _parse_labelled(row: RawRow, remarks: list[str]) -> LabelledRecord:
    """An answer with its label, or a preference row: its best answer is desirable, its worst is not."""
    fields = row.fields
    if fields.get("label") is None:
        if "label" in fields:
            raise FieldFault("label", "null where true or false is needed")
        if not any(fields.get(name) is not None for name in ("chosen", "rejected", "answers", "output")):
            raise _FormatFault("the row has neither a label nor ranked answers", fields)
        ranked = _parse_preference(row, remarks)
        return LabelledRecord(row.where, ranked.prompt, (ranked.answers[0], ranked.answers[-1]), (True, False))
    names = _sft_format(fields, "kto")
    if names == ("text",):
        raise _FormatFault("plain text has no answer to label", fields)
    if len(names) == 1:
        turns = _learned_conversation(fields, names[0], remarks)
    else:
        turns = _learned_pair(fields, remarks, *names)
    return LabelledRecord(row.where, turns[:-1], (turns[-1].content,), (_label(fields["label"]),))


def _label(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}  # CSV has texts alone
    word = str(value).strip().lower()
    if not isinstance(value, (bool, int, str)) or word not in known:
        raise FieldFault("label", f"{found_words(value)} where true (desirable) or false is needed")
    return known[word]


_PPO_PROMPTS = ("messages", "conversations", "instruction", "question", "query", "turns")


def _parse_prompt(row: RawRow, remarks: list[str]) -> PromptRecord:
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


def _parse_scored(row: RawRow, remarks: list[str]) -> PreferenceRecord:
    """A preference row, or a prompt with one answer, which may be empty: a model wrote it, and it has a score."""
    fields = row.fields
    ranked = any(fields.get(name) is not None for name in ("chosen", "rejected", "answers"))
    if ranked or isinstance(fields.get("output"), list):
        return _parse_preference(row, remarks)
    names = ("prompt", "answer") if _has_only_answer(fields) else _sft_format(fields, "score")
    if names == ("text",):
        raise _FormatFault("plain text has no answer to score", fields)
    if len(names) == 1:
        *turns, answer = _learned_conversation(fields, names[0], remarks)
        return PreferenceRecord(row.where, prompt=tuple(turns), answers=(answer.content,))
    _tell_unused_input(fields, names[0], remarks)
    return PreferenceRecord(row.where, prompt=_prompt(fields, names[0]), answers=(_answer(names[1], fields[names[1]]),))


def _has_only_answer(fields: Fields) -> bool:
    """Whether the row is prompt + answer, as samples.jsonl has it, and no format of sft."""
    present = {
        name for name in ("prompt", "answer", "response", "completion", "question") if fields.get(name) is not None
    }
    return present == {"prompt", "answer"}


_PARSERS: dict[Stage, Callable[[RawRow, list[str]], Record]] = {
    "sft": _parse_sft,
    "rm": _parse_preference,
    "kto": _parse_labelled,
    "ppo": _parse_prompt,
    "score": _parse_scored,
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
        turns: Conversation = (_instruction(fields),)
    elif name == "turns":
        turns = (Message("user", _first_of_turns(value)),)
    elif isinstance(value, str) and name not in ("messages", "conversations"):
        turns = open_transcript(name, value) if is_transcript(value) else (Message("user", text_of(name, value)),)
    elif isinstance(value, list) or name in ("messages", "conversations"):
        turns = conversation_of(name, value)
    else:
        raise FieldFault(name, f"{found_words(value)} where text or a list of turns is needed")
    if drop_answer:
        turns = _without_answer(name, turns)
    if turns[-1].role != "user":
        raise FieldFault(name, "the prompt ends with an assistant turn; it must end with a user turn")
    if not turns[-1].content.strip():
        raise FieldFault(name, "the user's text is empty")
    return _with_system(fields, _with_history(fields, name, turns))


def _without_answer(name: str, messages: Conversation) -> Conversation:
    kept = messages[:-1] if messages and messages[-1].role == "assistant" else messages
    if not kept or kept[-1].role != "user":
        raise FieldFault(name, "there is no user turn to answer")
    return kept


def _instruction(fields: Fields) -> Message:
    instruction = text_of("instruction", fields["instruction"])
    value = fields.get("input")
    extra = "" if value is None else text_of("input", value)
    if not extra.strip():
        extra = _first_instance_input(fields.get("instances"))
    if not extra.strip():
        return Message("user", instruction)
    if not instruction.strip():
        return Message("user", extra)
    return Message("user", f"{instruction}\n{extra}", input=extra)


def _tell_unused_input(fields: Fields, prompt_name: str | None, remarks: list[str]) -> None:
    """Of an ``input`` beside a prompt of another name. Beside ``instruction``, a ``prompt`` is known to repeat both."""
    value = fields.get("input")
    given = bool(value.strip()) if isinstance(value, str) else bool(value)
    repeated = prompt_name == "prompt" and fields.get("instruction") is not None
    if given and prompt_name != "instruction" and not repeated:
        remarks.append(INPUT_UNUSED)


def _first_instance_input(instances: Any) -> str:
    """The input of a self-instruct task, which stands in its first instance; without it the task lacks its object."""
    first = instances[0] if isinstance(instances, list) and instances else None
    value = first.get("input") if isinstance(first, dict) else None
    return value if isinstance(value, str) else ""


def _first_of_turns(turns: Any) -> str:
    if not isinstance(turns, list) or not turns:
        raise FieldFault("turns", f"{found_words(turns)} where a list of user turns is needed")
    return text_of("turns[0]", turns[0])


def _with_history(fields: Fields, name: str, turns: Conversation) -> Conversation:
    """Earlier turns, a list of [user, assistant] pairs, in front of the prompt."""
    history = fields.get("history")
    if history is None or history == [] or history == "":
        return turns
    if len(turns) > 1:
        raise FieldFault("history", f'earlier turns beside "{name}", which is a whole conversation')
    if not isinstance(history, list):
        raise FieldFault("history", f"{found_words(history)} where a list of [user, assistant] pairs is needed")
    earlier: list[Message] = []
    for i, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise FieldFault(f"history[{i}]", f"{found_words(pair)} where a [user, assistant] pair is needed")
        user, assistant = (text_of(f"history[{i}][{side}]", text) for side, text in enumerate(pair))
        if not user.strip():
            raise FieldFault(f"history[{i}][0]", "the user's text is empty")
        earlier += [Message("user", user), Message("assistant", assistant)]
    return (*earlier, *turns)


def _with_system(fields: Fields, turns: Conversation) -> Conversation:
    value = fields.get("system")
    system = "" if value is None else text_of("system", value)
    if not system.strip():
        return turns
    if turns[0].role != "system":
        return (Message("system", system), *turns)
    if turns[0].content != system:
        raise FieldFault("system", "the conversation already opens with another system turn")
    return turns


# --- answers ----------------------------------------------------------------------------------------------------------


def _answer(name: str, value: Any) -> str:
    """One assistant text: a string, one message, or a list of one message."""
    if isinstance(value, str):
        return text_of(name, value)
    if isinstance(value, list) and len(value) == 1:
        return _answer(f"{name}[0]", value[0])
    if not isinstance(value, dict):
        raise FieldFault(name, f"{found_words(value)} where one answer is needed")
    message = message_of(name, value)
    if message.role != "assistant":
        raise FieldFault(name, f"a {message.role} turn where an assistant turn is needed")
    return message.content


def _answers_to(
    fields: Fields, prompt_name: str, found: Sequence[tuple[str, Any]]
) -> tuple[Conversation, tuple[str, ...]]:
    """The prompt and its answers, where an answer may repeat the conversation before it."""
    prompt = _prompt(fields, prompt_name)
    raw_prompt = fields[prompt_name]
    is_text = isinstance(raw_prompt, str)
    from_transcript = is_text and is_transcript(raw_prompt)
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
            raise FieldFault(name, "the conversation before its answer is not the prompt")
        prompts.append(prompt if before == prompt else before)  # the row's own knows its input
        answers.append(turns[-1].content)
    if any(other != prompts[0] for other in prompts):
        raise FieldFault(found[-1][0], "the turns before the answers differ, so they do not answer one prompt")
    return prompts[0], tuple(answers)


def _is_one_turn_of(prompt: Conversation, conversation: Conversation) -> bool:
    """Whether a prompt of one user turn is part of a conversation, which is then the fuller prompt."""
    return [turn.role for turn in prompt if turn.role != "system"] == ["user"] and prompt[-1] in conversation


def _repeated_conversation(name: str, value: Any, from_transcript: bool) -> Conversation | None:
    """The turns of an answer that carries its conversation; None for an answer alone."""
    if isinstance(value, list) and len(value) > 1:
        turns = conversation_of(name, value)
    elif from_transcript and isinstance(value, str) and is_transcript(value):
        turns = transcript(name, value)
    else:
        return None
    if turns[-1].role != "assistant":
        raise FieldFault(name, "it ends with a user turn, so it holds no answer")
    return turns


def _transcript_answer(name: str, value: Any) -> str:
    text = _answer(name, value)
    if TRANSCRIPT_TURN.search(text):
        raise FieldFault(name, "further turns follow the answer")
    return text.strip()


def _shared_beginning(pair: Sequence[tuple[str, Any]]) -> tuple[Conversation, list[Conversation]]:
    """The longest run of whole turns that two conversations begin with, and what is left of each."""
    conversations = []
    for name, value in pair:
        if isinstance(value, str) and is_transcript(value):
            conversations.append(transcript(name, value))
        elif isinstance(value, list) and len(value) > 1:
            conversations.append(conversation_of(name, value))
        else:
            raise FieldFault(
                name,
                f"{found_words(value)}, and the row has no prompt; without one, chosen and rejected are whole "
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
        raise FieldFault("rejected", f'the conversation is equal to "chosen", {_NOTHING_TO_PREFER}')
    if not common or common[-1].role != "user":
        raise FieldFault("rejected", f'it parts from "chosen" at turn {len(common) + 1}, which is no answer to a user')
    for (name, _), tail in zip(pair, tails, strict=True):
        if len(tail) != 1:
            raise FieldFault(name, f"{len(tail)} turns follow what chosen and rejected share; one answer is needed")
    return tuple(tail[0].content for tail in tails)
