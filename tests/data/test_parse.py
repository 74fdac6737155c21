"""Parsing rows: each format becomes the same record, each fault names its field."""

from __future__ import annotations

from typing import Any

import pytest

from rlhfkit.chat.messages import Conversation, Message
from rlhfkit.data.parse import ACCEPTED_FORMATS, Stage, fault_kind, fault_place, likely_stage, parse_row
from rlhfkit.data.records import LabelledRecord, PreferenceRecord, PromptRecord, SftRecord
from rlhfkit.data.rows import RawRow
from rlhfkit.errors import DataError

WHERE = "rows.jsonl:7"


def chat(*contents: str, system: str | None = None) -> Conversation:
    """A conversation whose turns alternate, the user first."""
    turns = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


def roles(*contents: str) -> list[dict[str, str]]:
    return [message.as_dict() for message in chat(*contents)]


def sharegpt(*contents: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(contents)]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def hh(*contents: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(contents))


def parse(stage: Stage, fields: dict[str, Any]) -> Any:
    return parse_row(RawRow(WHERE, fields), stage)


def fault(stage: Stage, fields: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        parse(stage, fields)
    assert caught.value.hint == f"{stage} rows are {ACCEPTED_FORMATS[stage]}"
    place, message = caught.value.message.split(": ", 1)
    assert place == WHERE
    return message


# --- SFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q", "response": "a"}, chat("q", "a")),
        ({"prompt": "q", "completion": "a"}, chat("q", "a")),
        ({"query": "q", "response": "a"}, chat("q", "a")),
        ({"question": "q", "answer": "a", "level": 3}, chat("q", "a")),
        ({"prompt": " q \n", "response": " a\n"}, chat(" q \n", " a\n")),
        ({"instruction": "q", "output": "a"}, chat("q", "a")),
        ({"instruction": "q", "input": None, "output": "a"}, chat("q", "a")),
        ({"instruction": "q", "input": "", "output": "a"}, chat("q", "a")),
        ({"instruction": "q", "input": "with", "output": "a"}, chat("q\nwith", "a")),
        ({"instruction": "", "input": "with", "output": "a"}, chat("with", "a")),
        ({"instruction": "q", "output": "a", "history": ""}, chat("q", "a")),
        ({"instruction": "q", "output": "a", "history": []}, chat("q", "a")),
        (
            {"instruction": "q", "input": "i", "output": "a", "history": [["u", "v"], ["w", "x"]]},
            chat("u", "v", "w", "x", "q\ni", "a"),
        ),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["u", "v"]]},
            chat("u", "v", "q", "a", system="s"),
        ),
        ({"prompt": "q", "response": "a", "system": ""}, chat("q", "a")),
        ({"messages": roles("q", "a", "r", "b")}, chat("q", "a", "r", "b")),
        ({"messages": [{"role": "system", "content": "s"}, *roles("q", "a")]}, chat("q", "a", system="s")),
        ({"messages": roles("q", "a"), "system": "s"}, chat("q", "a", system="s")),
        ({"messages": roles("q", "a", "left open")}, chat("q", "a")),
        (
            {"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]), assistant("a")]},
            chat("q!", "a"),
        ),
        ({"conversations": sharegpt("q", "a", "r", "b")}, chat("q", "a", "r", "b")),
        ({"conversations": sharegpt("q", "a"), "system": "s"}, chat("q", "a", system="s")),
        ({"conversations": [{"from": "system", "value": "s"}, *sharegpt("q", "a")]}, chat("q", "a", system="s")),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]}, chat("q", "a")),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, chat("q", "a")),
        ({"conversations": roles("q", "a")}, chat("q", "a")),
        ({"prompt": roles("q", "a", "r"), "response": "b"}, chat("q", "a", "r", "b")),
        ({"prompt": roles("q"), "completion": [assistant("a")]}, chat("q", "a")),
        ({"prompt": hh(" q ", "a", "r") + "\n\nAssistant:", "response": " b"}, chat("q", "a", "r", " b")),
        # What tables of mixed formats hold, and the rendered prompt that alpaca sets carry.
        ({"messages": None, "instruction": "q", "input": None, "output": "a"}, chat("q", "a")),
        ({"instruction": "q", "input": "", "output": "a", "text": "Below is an instruction."}, chat("q", "a")),
        ({"prompt": "q", "prompt_id": "7", "messages": roles("q", "a")}, chat("q", "a")),
    ],
)
def test_sft_formats(fields: dict[str, Any], expected: Conversation) -> None:
    assert parse("sft", fields) == SftRecord(WHERE, messages=expected)


def test_sft_text() -> None:
    assert parse("sft", {"text": " as it is\n", "label": 1}) == SftRecord(WHERE, text=" as it is\n")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q", "response": None}, 'field "response": null where one answer is needed'),
        ({"prompt": None, "response": "a"}, 'field "prompt": null where text or a list of turns is needed'),
        ({"prompt": 5, "response": "a"}, 'field "prompt": the number 5 where text or a list of turns is needed'),
        ({"question": "q", "answer": 4.5}, 'field "answer": the number 4.5 where one answer is needed'),
        ({"question": "q", "answer": True}, 'field "answer": true where one answer is needed'),
        (
            {"messages": [{"role": "user", "content": "q", "weight": 0}, {**assistant("a"), "weight": 0}]},
            'field "messages[1].weight": the number 0: turns cannot be weighed; every answer is learned',
        ),
        ({"prompt": "q", "response": " \n"}, 'field "response": the answer is empty'),
        ({"prompt": "", "response": "a"}, 'field "prompt": the user\'s text is empty'),
        ({"instruction": " ", "input": "", "output": "a"}, 'field "instruction": the user\'s text is empty'),
        ({"instruction": "q", "input": 3, "output": "a"}, 'field "input": the number 3 where text is needed'),
        ({"instruction": "q", "output": ["a", "b"]}, 'field "output": a list of 2 where one answer is needed'),
        ({"instruction": "q", "output": "a", "system": 1}, 'field "system": the number 1 where text is needed'),
        (
            {"instruction": "q", "output": "a", "history": "u v"},
            "field \"history\": the text 'u v' where a list of [user, assistant] pairs is needed",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["u"]]},
            'field "history[0]": a list of 1 where a [user, assistant] pair is needed',
        ),
        (
            {"instruction": "q", "output": "a", "history": [["u", None]]},
            'field "history[0][1]": null where text is needed',
        ),
        (
            {"instruction": "q", "output": "a", "history": [["u", ""]]},
            'field "history": an assistant\'s text in it is empty',
        ),
        (
            {"messages": roles("q", "a"), "history": [["u", "v"]]},
            'field "history": earlier turns beside "messages", which is a whole conversation',
        ),
        ({"messages": []}, 'field "messages": an empty list where a list of turns is needed'),
        ({"messages": "[]"}, "field \"messages\": the text '[]' where a list of turns is needed"),
        (
            {"messages": ["q", "a"]},
            "field \"messages[0]\": the text 'q' where a turn like {role, content} or {from, value} is needed",
        ),
        (
            {"messages": [{"role": "user"}, assistant("a")]},
            'field "messages[0]": an object with role where a turn like {role, content} or {from, value} is needed',
        ),
        ({"messages": [user(None), assistant("a")]}, 'field "messages[0].content": null where text is needed'),
        ({"messages": [user("q"), assistant(12)]}, 'field "messages[1].content": the number 12 where text is needed'),
        (
            {"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]},
            'field "conversations[0].value": the number 1 where text is needed',
        ),
        (
            {"messages": [*roles("q", "a"), {"role": "tool", "content": "x"}]},
            'field "messages[2].role": the role "tool" is not supported; '
            "roles are system, user, human, assistant, gpt, bing, chatgpt",
        ),
        (
            {"conversations": [{"from": "function", "value": "x"}]},
            'field "conversations[0].from": the role "function" is not supported; '
            "roles are system, user, human, assistant, gpt, bing, chatgpt",
        ),
        (
            {"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            'field "messages[1].tool_calls": tool calls are not supported',
        ),
        (
            {"messages": [user([{"type": "image_url", "image_url": "x"}]), assistant("a")]},
            'field "messages[0].content[0]": a part of the type "image_url"; only text is supported',
        ),
        (
            {"messages": [user("q"), user("r"), assistant("a")]},
            'field "messages[1]": the role is user where assistant is needed; '
            "user and assistant alternate after an optional system turn",
        ),
        (
            {"conversations": sharegpt("q", "a")[1:]},
            'field "conversations[0]": the role is assistant where user is needed; '
            "user and assistant alternate after an optional system turn",
        ),
        (
            {"messages": [*roles("q", "a"), {"role": "system", "content": "s"}]},
            'field "messages[2]": the role is system where user is needed; '
            "user and assistant alternate after an optional system turn",
        ),
        (
            {"messages": [{"role": "system", "content": "s"}]},
            'field "messages": a system turn alone; a user turn is needed after it',
        ),
        ({"messages": roles(" ", "a")}, 'field "messages[0]": the user\'s text is empty'),
        ({"messages": roles("q", "", "r", "b")}, 'field "messages[1]": the assistant\'s text is empty'),
        ({"messages": roles("q")}, 'field "messages": there is no assistant turn to learn'),
        (
            {"conversations": sharegpt("q", "a", "r"), "chosen": assistant("b"), "rejected": assistant("c")},
            'field "conversations": it ends with a user turn whose answer is in "chosen"; this is rm data',
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, *roles("q", "a")], "system": "other"},
            'field "system": the conversation already opens with another system turn',
        ),
        ({"text": " "}, 'field "text": an empty text where text to learn is needed'),
        ({"prompt": "q", "response": "a\ud800"}, 'field "response": half a surrogate pair (\\ud800) at character 1'),
        (
            {"prompt": hh("q", "a"), "response": "b"},
            'field "prompt": a transcript that does not end with an open "Assistant:" turn',
        ),
        (
            {"prompt": "q", "response": "a", "completion": "b"},
            "the row fits several sft formats (prompt + response, prompt + completion); "
            "its fields are prompt, response, completion",
        ),
        (
            {"messages": roles("q", "a"), "conversations": sharegpt("q", "a")},
            "the row fits several sft formats (messages, conversations); its fields are messages, conversations",
        ),
        (
            {"Body": "x", "Answer": 3, "note": None},
            "the row fits no sft format; its fields are Body, Answer, note (null)",
        ),
        ({}, "the row fits no sft format; its fields are none"),
    ],
)
def test_sft_faults(fields: dict[str, Any], expected: str) -> None:
    assert fault("sft", fields) == expected


# --- preferences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "prompt", "answers"),
    [
        ({"prompt": "q", "chosen": " a", "rejected": "b "}, chat("q"), (" a", "b ")),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, chat("q", system="s"), ("a", "b")),
        (
            {"prompt": roles("q", "x", "r"), "chosen": [assistant("a")], "rejected": [assistant("b")]},
            chat("q", "x", "r"),
            ("a", "b"),
        ),
        (
            {"messages": roles("q"), "chosen": assistant("a"), "rejected": assistant("b")},
            chat("q"),
            ("a", "b"),
        ),
        (
            {
                "conversations": sharegpt("q", "x", "r"),
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            chat("q", "x", "r"),
            ("a", "b"),
        ),
        (
            {"instruction": "q", "input": "i", "output": "ignored", "chosen": "a", "rejected": "b"},
            chat("q\ni"),
            ("a", "b"),
        ),
        (
            {"instruction": "q", "history": [["u", "v"]], "output": ["a", "b", "c"]},
            chat("u", "v", "q"),
            ("a", "b", "c"),
        ),
        ({"prompt": "q", "answers": ["a", "b", "c", "d"]}, chat("q"), ("a", "b", "c", "d")),
        ({"prompt": "q", "answers": [assistant("a"), [assistant("b")]]}, chat("q"), ("a", "b")),
        (
            {"chosen": roles("q", "x", "r", "a"), "rejected": roles("q", "x", "r", "b")},
            chat("q", "x", "r"),
            ("a", "b"),
        ),
        ({"chosen": hh("q ", "x", "r", " a"), "rejected": hh("q", "x", "r", "b\n")}, chat("q", "x", "r"), ("a", "b")),
        ({"chosen": hh("q", "a\n\nb")[2:], "rejected": hh("q", "b")[2:]}, chat("q"), ("a\n\nb", "b")),
        (
            {"prompt": hh("q", "x", "r") + "\n\nAssistant:", "chosen": " a", "rejected": " b\n"},
            chat("q", "x", "r"),
            ("a", "b"),
        ),
        (
            {"prompt": hh("q") + "\n\nAssistant:", "chosen": hh("q", "a"), "rejected": hh("q", "b")},
            chat("q"),
            ("a", "b"),
        ),
        # Sets that give the prompt as text and repeat the conversation in both answers.
        (
            {"prompt": "q", "chosen": roles("q", "a"), "rejected": roles("q", "b"), "messages": roles("q", "a")},
            chat("q"),
            ("a", "b"),
        ),
        (
            {"prompt": "q", "chosen": roles("q", "x", "r", "a"), "rejected": roles("q", "x", "r", "b"), "system": "s"},
            chat("q", "x", "r", system="s"),
            ("a", "b"),
        ),
        (
            {
                "prompt": roles("q", "x", "r"),
                "chosen": roles("q", "x", "r", "a"),
                "rejected": roles("q", "x", "r", "b"),
            },
            chat("q", "x", "r"),
            ("a", "b"),
        ),
    ],
)
def test_preference_formats(fields: dict[str, Any], prompt: Conversation, answers: tuple[str, ...]) -> None:
    assert parse("rm", fields) == PreferenceRecord(WHERE, prompt=prompt, answers=answers)


@pytest.mark.parametrize(("given", "margin"), [(None, 0.0), ("", 0.0), (0.5, 0.5), (2, 2.0), ("1.5", 1.5), (-1, -1.0)])
def test_margin(given: Any, margin: float) -> None:
    assert parse("rm", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": given}).margin == margin


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("big", "the text 'big'"),
        (True, "true"),
        ("nan", "the text 'nan'"),
        (float("inf"), "the number inf"),
        ([1], "a list of 1"),
    ],
)
def test_margin_must_be_a_number(given: Any, found: str) -> None:
    fields = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": given}
    assert fault("rm", fields) == f'field "margin": {found} where a number is needed'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "a"},
            'field "rejected": the answer is equal to "chosen", so there is nothing to prefer',
        ),
        (
            {"prompt": "q", "answers": ["a", "b", "a"]},
            'field "answers[2]": the answer is equal to "answers[0]", so there is nothing to prefer',
        ),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, 'field "chosen": the answer is empty'),
        ({"prompt": "q", "answers": ["a", ""]}, 'field "answers[1]": the answer is empty'),
        ({"prompt": "q", "chosen": "a", "rejected": None}, 'field "rejected": null where one answer is needed'),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, 'field "rejected": the number 3 where one answer is needed'),
        ({"prompt": "q", "chosen": "a"}, "the row has no rejected; its fields are prompt, chosen"),
        (
            {"prompt": "q", "answers": ["a"]},
            'field "answers": a list of 1 where a list of two or more answers, best first, is needed',
        ),
        (
            {"prompt": "q", "answers": "a"},
            "field \"answers\": the text 'a' where a list of two or more answers, best first, is needed",
        ),
        ({"answers": ["a", "b"]}, "the row has ranked answers but no prompt; its fields are answers"),
        (
            {"prompt": "q", "answers": ["a", "b"], "chosen": "a", "rejected": "b"},
            "the row fits several rm formats (chosen + rejected, answers); "
            "its fields are prompt, answers, chosen, rejected",
        ),
        (
            {"question": "q", "instruction": "q", "chosen": "a", "rejected": "b"},
            "several fields could be the prompt (instruction, question); "
            "its fields are question, instruction, chosen, rejected",
        ),
        ({"instruction": "q", "output": "a"}, "the row fits no rm format; its fields are instruction, output"),
        (
            {"prompt": "q", "chosen": [user("a")], "rejected": [assistant("b")]},
            'field "chosen[0]": a user turn where an assistant turn is needed',
        ),
        (
            {"prompt": roles("q", "a"), "chosen": "a", "rejected": "b"},
            'field "prompt": the prompt ends with an assistant turn; it must end with a user turn',
        ),
        (
            {"prompt": "other", "chosen": roles("q", "a"), "rejected": roles("q", "b")},
            'field "chosen": the conversation before its answer is not the prompt',
        ),
        (
            {"prompt": "q", "chosen": roles("q", "x", "r", "a"), "rejected": roles("q", "b")},
            'field "rejected": the turns before the answers differ, so they do not answer one prompt',
        ),
        (
            {"prompt": hh("q", "a"), "chosen": "a", "rejected": "b"},
            'field "prompt": a transcript that does not end with an open "Assistant:" turn',
        ),
        (
            {"prompt": hh("q"), "chosen": "a", "rejected": "b"},
            'field "prompt": a transcript that does not end with an open "Assistant:" turn',
        ),
        (
            {"prompt": hh("q") + "\n\nAssistant:", "chosen": " a\n\nHuman: r", "rejected": " b"},
            'field "chosen": further turns follow the answer',
        ),
        (
            {"chosen": hh("q", "a"), "rejected": hh("q", "a")},
            'field "rejected": the conversation is equal to "chosen", so there is nothing to prefer',
        ),
        (
            {"chosen": hh("q", "a", "r", "c"), "rejected": hh("q", "b", "r", "d")},
            'field "chosen": 3 turns follow what chosen and rejected share; one answer is needed',
        ),
        (
            {"chosen": hh("q", "a"), "rejected": hh("other", "a")},
            'field "rejected": it parts from "chosen" at turn 1, which is no answer to a user',
        ),
        (
            {"chosen": hh("q", "a"), "rejected": hh("q", "a", "r", "b")},
            'field "rejected": it parts from "chosen" at turn 3, which is no answer to a user',
        ),
        ({"chosen": hh("q", ""), "rejected": hh("q", "b")}, 'field "chosen": the answer is empty'),
        (
            {"chosen": "\n\nHuman: q\n\nHuman: r\n\nAssistant: a", "rejected": hh("q", "b")},
            'field "chosen[1]": the role is user where assistant is needed; '
            "user and assistant alternate after an optional system turn",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "field \"chosen\": the text 'a', and the row has no prompt; without one, chosen and rejected are whole "
            "conversations: lists of turns, or transcripts of Human: and Assistant: turns",
        ),
    ],
)
def test_preference_faults(fields: dict[str, Any], expected: str) -> None:
    assert fault("rm", fields) == expected


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "prompt", "columns"),
    [
        ({"prompt": "q", "kwargs": [{}], "key": 1}, chat("q"), {"kwargs": [{}], "key": 1}),
        ({"prompt": roles("q", "a", "r")}, chat("q", "a", "r"), {}),
        ({"prompt": hh("q", "a", "r") + "\n\nAssistant:"}, chat("q", "a", "r"), {}),
        ({"instruction": "q", "input": "i", "output": "a"}, chat("q\ni"), {"output": "a"}),
        (
            {"instruction": "q", "system": "s", "history": [["u", "v"]], "output": "a"},
            chat("u", "v", "q", system="s"),
            {"output": "a"},
        ),
        ({"question": "q", "answer": "a", "input": "kept"}, chat("q"), {"answer": "a", "input": "kept"}),
        ({"query": "q"}, chat("q"), {}),
        ({"messages": roles("q", "a", "r"), "id": 1}, chat("q", "a", "r"), {"id": 1}),
        ({"messages": roles("q", "a", "r", "dropped")}, chat("q", "a", "r"), {}),
        ({"conversations": sharegpt("q", "dropped")}, chat("q"), {}),
        ({"turns": ["q", "then"], "category": "writing"}, chat("q"), {"category": "writing"}),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, chat("q"), {"chosen": "a", "rejected": "a"}),
        (
            {"chosen": hh("q", "a"), "rejected": hh("q", "b")},
            chat("q"),
            {"chosen": hh("q", "a"), "rejected": hh("q", "b")},
        ),
        ({"prompt": "q", "question": "raw", "answer": None}, chat("q"), {"question": "raw", "answer": None}),
        (
            {"instruction": "q", "instances": [{"input": "i", "output": "a"}]},
            chat("q\ni"),
            {"instances": [{"input": "i", "output": "a"}]},
        ),
    ],
)
def test_prompt_formats(fields: dict[str, Any], prompt: Conversation, columns: dict[str, Any]) -> None:
    assert parse("ppo", fields) == PromptRecord(WHERE, prompt=prompt, columns=columns)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": " "}, 'field "prompt": the user\'s text is empty'),
        ({"prompt": 3}, 'field "prompt": the number 3 where text or a list of turns is needed'),
        (
            {"prompt": roles("q", "a")},
            'field "prompt": the prompt ends with an assistant turn; it must end with a user turn',
        ),
        ({"turns": []}, 'field "turns": an empty list where a list of user turns is needed'),
        ({"turns": [1]}, 'field "turns[0]": the number 1 where text is needed'),
        (
            {"messages": roles("q"), "question": "q"},
            "several fields could be the prompt (messages, question); its fields are messages, question",
        ),
        ({"Question": "q", "Answer": 3}, "the row has no prompt; its fields are Question, Answer"),
        ({"text": "q"}, "the row has no prompt; its fields are text"),
    ],
)
def test_prompt_faults(fields: dict[str, Any], expected: str) -> None:
    assert fault("ppo", fields) == expected


def test_long_rows_are_named_in_short() -> None:
    found = fault("sft", {f"column {i} {'x' * 100}": i for i in range(40)})
    assert found.count("column") == 12
    assert found.endswith("…, …")
    assert len(found) < 700


# --- what a row is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "stage"),
    [
        ({"prompt": "q", "response": "a"}, "sft"),
        ({"prompt": "q", "response": ""}, "sft"),
        ({"prompt": "q", "response": None}, "sft"),
        ({"instruction": "q", "input": "", "output": "a"}, "sft"),
        ({"messages": roles("q", "a")}, "sft"),
        ({"conversations": sharegpt("q", "a", "r")}, "sft"),
        ({"text": "words", "label": 1}, "sft"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "rm"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rm"),
        ({"prompt": "q", "chosen": "a"}, "rm"),
        ({"instruction": "q", "output": "", "chosen": "a", "rejected": "b"}, "rm"),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "b")}, "rm"),
        ({"messages": roles("q"), "chosen": "a", "rejected": "b"}, "rm"),
        ({"instruction": "q", "output": ["a", "b"]}, "rm"),
        ({"prompt": "q", "answers": ["a", "b"]}, "rm"),
        ({"prompt": "q"}, "ppo"),
        ({"prompt": "q", "chosen": None, "rejected": None}, "ppo"),
        ({"prompt": "q", "text": "Question: q"}, "ppo"),
        ({"messages": roles("q")}, "ppo"),
        ({"instruction": "q", "input": ""}, "ppo"),
        ({"question": "q", "level": 3}, "ppo"),
        ({"turns": ["q", "r"]}, "ppo"),
        ({"title": "t", "body": "b"}, None),
        ({}, None),
    ],
)
def test_likely_stage(fields: dict[str, Any], stage: Stage | None) -> None:
    assert likely_stage(fields) == stage


@pytest.mark.parametrize(
    ("stage", "fields", "kind"),
    [
        ("sft", {"prompt": "q", "response": " "}, "empty answer"),
        ("sft", {"messages": roles("q", "")}, "empty answer"),
        ("sft", {"instruction": "q", "output": "a", "history": [["u", ""]]}, "empty answer"),
        ("rm", {"prompt": "q", "chosen": "", "rejected": "b"}, "empty answer"),
        ("rm", {"prompt": "q", "chosen": "a", "rejected": "a"}, "equal answers"),
        ("rm", {"chosen": roles("q", "a"), "rejected": roles("q", "a")}, "equal answers"),
        ("sft", {"messages": roles("", "a")}, "other"),
        ("sft", {"prompt": "the answer is empty"}, "other"),
        ("rm", {"prompt": "q", "answers": "so there is nothing to prefer"}, "other"),
    ],
)
def test_fault_kind(stage: Stage, fields: dict[str, Any], kind: str) -> None:
    message = f"{WHERE}: {fault(stage, fields)}"
    assert fault_kind(message) == kind
    if ": field " in message:
        assert fault_place(message) == WHERE


# -- kto --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "answers", "labels"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, ("a",), (True,)),
        ({"prompt": "q", "response": "a", "label": "False"}, ("a",), (False,)),
        ({"instruction": "q", "output": "a", "label": 1}, ("a",), (True,)),
        ({"messages": roles("q", "a"), "label": "0"}, ("a",), (False,)),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("good", "bad"), (True, False)),
        ({"prompt": "q", "answers": ["best", "fair", "worst"]}, ("best", "worst"), (True, False)),
    ],
)
def test_labelled_answers(fields: dict[str, Any], answers: tuple[str, ...], labels: tuple[bool, ...]) -> None:
    assert parse("kto", fields) == LabelledRecord(WHERE, chat("q"), answers, labels)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "q", "completion": "a"}, "the row has neither a label nor ranked answers"),
        ({"prompt": "q", "completion": "a", "label": None}, 'field "label": null where true or false is needed'),
        ({"prompt": "q", "completion": "a", "label": "good"}, "where true (desirable) or false is needed"),
        ({"prompt": "q", "completion": "a", "label": 0.5}, "the number 0.5 where true (desirable) or false"),
        ({"prompt": "q", "completion": " ", "label": True}, 'field "completion": the answer is empty'),
        ({"text": "all of it", "label": True}, "plain text has no answer to label"),
    ],
)
def test_faults_of_labelled_rows(fields: dict[str, Any], words: str) -> None:
    assert words in fault("kto", fields)
