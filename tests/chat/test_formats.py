"""Prompts equal, id for id, to the official forms as they are described, written here a second time and otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_tokenizers import BAICHUAN1, BAICHUAN2, HOMES, NO_SYSTEM, byte_level, random_conversations, sentencepiece

from rlhfkit.chat.messages import Conversation, Message
from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.data.parse import parse_row
from rlhfkit.data.records import PromptRecord
from rlhfkit.data.rows import RawRow
from rlhfkit.errors import TemplateError

Official = Callable[[Any, Conversation], list[int]]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def split_system(messages: Conversation) -> tuple[str | None, Conversation]:
    return (messages[0].content, messages[1:]) if messages[0].role == "system" else (None, messages)


def make_context(tokenizer: Any, messages: Conversation, default_system: str | None = None) -> list[int]:
    """Qwen's function of that name: role, line break and text are encoded one by one."""
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    line_break = ids_of(tokenizer, "\n")
    if messages[0].role != "system" and default_system is not None:
        messages = (Message("system", default_system), *messages)
    ids: list[int] = []
    for message in messages:
        turn = ids_of(tokenizer, message.role) + line_break + ids_of(tokenizer, message.content)
        ids += [start, *turn, end, *line_break]
    return [*ids, start, *ids_of(tokenizer, "assistant"), *line_break]


def chatml(tokenizer: Any, messages: Conversation) -> list[int]:
    return make_context(tokenizer, messages)


def qwen(tokenizer: Any, messages: Conversation) -> list[int]:
    return make_context(tokenizer, messages, "You are a helpful assistant.")


def llama2(tokenizer: Any, messages: Conversation) -> list[int]:
    """Meta's: the system text joins the first question; each turn is stripped, encoded alone, and has bos and eos."""
    system, turns = split_system(messages)
    texts = [m.content for m in turns]
    if system is not None:
        texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
    ids: list[int] = []
    for question, answer in zip(texts[:-1:2], texts[1::2], strict=True):
        turn = f"[INST] {question.strip()} [/INST] {answer.strip()} "
        ids += [tokenizer.bos_token_id, *ids_of(tokenizer, turn), tokenizer.eos_token_id]
    return [*ids, tokenizer.bos_token_id, *ids_of(tokenizer, f"[INST] {texts[-1].strip()} [/INST]")]


def llama3(tokenizer: Any, messages: Conversation) -> list[int]:
    """Meta's: header, two line breaks, the stripped text, and the end of the turn."""
    begin, start, end, turn_end = (
        tokenizer.convert_tokens_to_ids(t)
        for t in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )

    def header(role: str) -> list[int]:
        return [start, *ids_of(tokenizer, role), end, *ids_of(tokenizer, "\n\n")]

    ids = [begin]
    for message in messages:
        ids += [*header(message.role), *ids_of(tokenizer, message.content.strip()), turn_end]
    return ids + header("assistant")


def baichuan_chat(tokenizer: Any, messages: Conversation, user: str, assistant: str, eos: bool) -> list[int]:
    roles = {"user": [tokenizer.convert_tokens_to_ids(user)], "assistant": [tokenizer.convert_tokens_to_ids(assistant)]}
    ids: list[int] = []
    for message in messages:
        ids += roles.get(message.role, []) + ids_of(tokenizer, message.content)
        ids += [tokenizer.eos_token_id] if eos and message.role == "assistant" else []
    return ids + roles["assistant"]


def baichuan(tokenizer: Any, messages: Conversation) -> list[int]:
    return baichuan_chat(tokenizer, messages, *BAICHUAN1, eos=True)


def baichuan2(tokenizer: Any, messages: Conversation) -> list[int]:
    return baichuan_chat(tokenizer, messages, *BAICHUAN2, eos=False)


PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def alpaca(tokenizer: Any, messages: Conversation) -> list[int]:
    """Stanford's prompt without input, its answer directly after the colon; further turns follow the eos."""
    system, turns = split_system(messages)
    text = f"{PREAMBLE if system is None else system}\n\n"
    ids = [tokenizer.bos_token_id]
    for message in turns:
        if message.role == "user":
            text += f"### Instruction:\n{message.content}\n\n### Response:"
        else:
            ids += [*ids_of(tokenizer, text + message.content), tokenizer.eos_token_id]
            text = ""
    return ids + ids_of(tokenizer, text)


OFFICIAL: dict[str, Official] = {
    "alpaca": alpaca,
    "baichuan": baichuan,
    "baichuan2": baichuan2,
    "chatml": chatml,
    "llama2": llama2,
    "llama3": llama3,
    "qwen": qwen,
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_prompt_is_the_official_one(name: str) -> None:
    tokenizer = HOMES[name]()
    encoder = ChatEncoder(tokenizer, load_template(name))
    for messages in random_conversations(17, 150, system=name not in NO_SYSTEM):
        assert encoder.encode_prompt(messages) == OFFICIAL[name](tokenizer, messages), messages


@pytest.mark.parametrize("name", sorted(set(OFFICIAL) - {"baichuan", "baichuan2"}))
def test_control_text_from_the_user_is_the_official_text(name: str) -> None:
    """Not so with Baichuan, whose official code lets a user type a role: see test_roles_of_baichuan_stay_text.

    The tokenizers merge inside such strings (`_e`, `/s`), so it must be one text to them, not a text cut in two.
    """
    tokenizer = HOMES[name]()
    encoder = ChatEncoder(tokenizer, load_template(name))
    fragments = (encoder.turn_end, *encoder.template.controls, *tokenizer.all_special_tokens)
    for messages in random_conversations(18, 100, fragments=fragments, blanks=False):
        assert encoder.encode_prompt(messages) == OFFICIAL[name](tokenizer, messages), messages


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_ordinary_prompt_is_what_apply_chat_template_gives(name: str) -> None:
    tokenizer = HOMES[name]()
    encoder = ChatEncoder(tokenizer, load_template(name))
    for messages in random_conversations(19, 100, system=name not in NO_SYSTEM, blanks=False):
        official = tokenizer.apply_chat_template(
            [m.as_dict() for m in messages],
            chat_template=encoder.template.source,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert encoder.encode_prompt(messages) == official, messages


def test_baichuan2_does_not_end_a_question() -> None:
    tokenizer = HOMES["baichuan2"]()
    source = load_template("baichuan2").source
    question = {"role": "user", "content": "Hi"}
    assert tokenizer.apply_chat_template([question], chat_template=source, tokenize=False) == "<reserved_106>Hi"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece(), sentencepiece(space="first")])
def test_a_template_of_the_tokenizers_own_gives_the_ids_of_apply_chat_template(tokenizer: Any) -> None:
    """Headers that end in a space, texts that begin with a line break: all that merges there merges here."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' : ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant :' }}{% endif %}"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = source
    encoder = ChatEncoder(tokenizer, Template("tokenizer", source))
    for messages in random_conversations(20, 100):
        official = tokenizer.apply_chat_template(
            [m.as_dict() for m in messages], add_generation_prompt=True, return_dict=False
        )
        assert encoder.encode_prompt(messages) == official, messages


PROMPT_DICT = {  # of Stanford Alpaca's train.py
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"instruction": "Hello you", "input": "Hi"}, "prompt_input"),
        ({"instruction": " Hello\nyou ", "input": "\nHi </s>\n\n### Response:"}, "prompt_input"),
        ({"instruction": "Hello you", "input": ""}, "prompt_no_input"),
        ({"instruction": "Hello you"}, "prompt_no_input"),
    ],
)
def test_alpaca_has_both_forms_of_stanford(row: dict[str, str], form: str) -> None:
    tokenizer = sentencepiece()
    encoder = ChatEncoder(tokenizer, load_template("alpaca"))
    asked = parse_row(RawRow("a.json", {**row, "output": "fine"}), "ppo")
    assert isinstance(asked, PromptRecord)
    prompt = [tokenizer.bos_token_id, *ids_of(tokenizer, PROMPT_DICT[form].format(**row))]
    assert encoder.encode_prompt(asked.prompt) == prompt
    learned = encoder.encode((*asked.prompt, Message("assistant", "fine")))
    assert learned.ids[: len(prompt)] == prompt
    assert [i for i, mark in zip(learned.ids, learned.supervised, strict=True) if mark] == learned.ids[len(prompt) :]


def test_other_templates_have_the_input_in_the_text() -> None:
    for name in sorted(set(OFFICIAL) - {"alpaca"}):
        encoder = ChatEncoder(HOMES[name](), load_template(name))
        apart, whole = Message("user", "Hello you\nHi", input="Hi"), Message("user", "Hello you\nHi")
        assert encoder.encode_prompt([apart]) == encoder.encode_prompt([whole])


def test_an_input_that_a_template_leaves_out_is_told() -> None:
    source = "{% for m in messages %}{{ (m['instruction'] or m['content']) + eos_token }}{% endfor %}"
    encoder = ChatEncoder(sentencepiece(), Template("own", source))
    with pytest.raises(TemplateError, match=r"the template 'own' leaves out message 1 of 1 \(user\)"):
        encoder.encode_prompt([Message("user", "Hello you\nHi", input="Hi")])
