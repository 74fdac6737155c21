"""The loss mask of every shipped template, token by token: + is learned, the rest is not."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import BAICHUAN1, BAICHUAN2, byte_level, sentencepiece

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import ChatEncoder, load_template

SYSTEM = Message("system", "me")
USER = Message("user", "Hello you")
ANSWER = Message("assistant", "Hi")
NEXT = Message("user", "Hi")
LAST = Message("assistant", "fine")


def marked(tokenizer: Any, template: str, *messages: Message) -> list[tuple[str, bool]]:
    chat = ChatEncoder(tokenizer, load_template(template)).encode(messages)
    return list(zip(tokenizer.convert_ids_to_tokens(chat.ids), chat.supervised, strict=True))


def expected(*tokens: str) -> list[tuple[str, bool]]:
    return [(t.removeprefix("+"), t.startswith("+")) for text in tokens for t in text.split(" ")]


def test_chatml() -> None:
    assert marked(byte_level(), "chatml", SYSTEM, USER, ANSWER, NEXT, LAST) == expected(
        "<|im_start|> system Ċ me <|im_end|> Ċ",
        "<|im_start|> user Ċ Hello Ġyou <|im_end|> Ċ",
        "<|im_start|> assistant Ċ +Hi +<|im_end|> Ċ",
        "<|im_start|> user Ċ Hi <|im_end|> Ċ",
        "<|im_start|> assistant Ċ +fine +<|im_end|>",
    )


def test_qwen_brings_its_system_text_only_where_there_is_none() -> None:
    without = marked(byte_level(), "qwen", USER, ANSWER)
    text = "".join(token for token, _ in without).replace("Ġ", " ").replace("Ċ", "\n")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello you<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>"
    )
    assert [token for token, learned in without if learned] == ["Hi", "<|im_end|>"]
    assert marked(byte_level(), "qwen", SYSTEM, USER, ANSWER) == marked(byte_level(), "chatml", SYSTEM, USER, ANSWER)


def test_llama2() -> None:
    assert marked(sentencepiece(), "llama2", SYSTEM, USER, ANSWER, NEXT, LAST) == expected(
        "<s> ▁[ INST ] ▁ < < SYS > > <0x0A> me <0x0A> < < / SYS > > <0x0A> <0x0A>",
        "Hello ▁you ▁[ / INST ] +▁Hi +▁ +</s>",
        "<s> ▁[ INST ] ▁Hi ▁[ / INST ] +▁fine +▁ +</s>",
    )


def test_llama3() -> None:
    tokenizer = byte_level(bos="<|begin_of_text|>", eos="<|end_of_text|>")
    assert marked(tokenizer, "llama3", SYSTEM, USER, ANSWER, NEXT, LAST) == expected(
        "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ me <|eot_id|>",
        "<|start_header_id|> user <|end_header_id|> ĊĊ Hello Ġyou <|eot_id|>",
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ +Hi +<|eot_id|>",
        "<|start_header_id|> user <|end_header_id|> ĊĊ Hi <|eot_id|>",
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ +fine +<|eot_id|>",
    )


def test_baichuan1() -> None:
    assert marked(sentencepiece(BAICHUAN1), "baichuan", USER, ANSWER, NEXT, LAST) == expected(
        "<reserved_102> ▁Hello ▁you <reserved_103> +▁Hi +</s>",
        "<reserved_102> ▁Hi <reserved_103> +▁fine +</s>",
    )


def test_baichuan2_ends_only_the_last_answer() -> None:
    tokenizer = sentencepiece(BAICHUAN2, space="never")
    assert marked(tokenizer, "baichuan2", SYSTEM, USER, ANSWER, NEXT, LAST) == expected(
        "me <reserved_106> Hello ▁you <reserved_107> +Hi <reserved_106> Hi <reserved_107> +fine +</s>"
    )


def test_alpaca() -> None:
    system = Message("system", "Below")
    assert marked(sentencepiece(), "alpaca", system, USER, ANSWER, NEXT, LAST) == expected(
        "<s> ▁Below <0x0A> <0x0A> # # # ▁ I n s t r u c t i o n : <0x0A>",
        "Hello ▁you <0x0A> <0x0A> # # # ▁Response : +Hi +</s>",
        "▁ # # # ▁ I n s t r u c t i o n : <0x0A> Hi <0x0A> <0x0A> # # # ▁Response : +fine +</s>",
    )


def test_only_assistants_are_learned() -> None:
    encoder = ChatEncoder(byte_level(), load_template("chatml"))
    chat = encoder.encode([SYSTEM, USER])
    assert chat.ids == []
    assert chat.supervised == []


@pytest.mark.parametrize("space", ["always", "first"])
def test_chatml_on_sentencepiece_puts_no_space_after_the_header(space: str) -> None:
    front = "▁" if space == "always" else ""
    assert marked(sentencepiece(space=space), "chatml", USER, ANSWER) == expected(
        f"<|im_start|> {front}user <0x0A> Hello ▁you <|im_end|> {'▁ ' if front else ''}<0x0A>",
        f"<|im_start|> {front}assistant <0x0A> +Hi +<|im_end|>",
    )
