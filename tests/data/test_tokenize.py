"""Records to rows: what is cut, what is left out, and that both are told.

The tokenizer has one id per byte, so every row can be read as text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.data.batch import TokenRow
from rlhfkit.data.records import PreferenceRecord, PromptRecord, SftRecord, Tally
from rlhfkit.data.tokenize import tokenize_pairs, tokenize_prompts, tokenize_sft
from rlhfkit.errors import DataError
from rlhfkit.families.conformance import byte_tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
LENGTH = 23  # three controls, the rest a token per letter


@pytest.fixture
def encoder() -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(SPECIALS, eos="<|im_end|>"), load_template("chatml"))


def text(encoder: ChatEncoder, ids: Iterable[int]) -> str:
    return str(encoder.tokenizer.decode([int(i) for i in ids]))


def learned(encoder: ChatEncoder, row: TokenRow) -> str:
    return text(encoder, row.ids[row.supervised])


def sft(answer: str, question: str = "Why?", where: str = "a.jsonl:1") -> SftRecord:
    return SftRecord(where, (Message("user", question), Message("assistant", answer)))


def pair(*answers: str, question: str = "Why?", margin: float = 0.0) -> PreferenceRecord:
    return PreferenceRecord("p.jsonl:1", (Message("user", question),), answers, margin)


class Ticks:
    count = 0

    def __call__(self) -> None:
        self.count += 1


# -- SFT ---------------------------------------------------------------------------------------------------------------


def test_a_row_that_fits_is_whole(encoder: ChatEncoder) -> None:
    tick = Ticks()
    rows, report = tokenize_sft([sft("Because."), sft("So.")], encoder, LENGTH + 9, tick)
    assert [text(encoder, row.ids) for row in rows] == [PROMPT + "Because.<|im_end|>", PROMPT + "So.<|im_end|>"]
    assert [learned(encoder, row) for row in rows] == ["Because.<|im_end|>", "So.<|im_end|>"]
    assert (report.rows, report.tokens, report.supervised, report.truncated) == (2, 2 * LENGTH + 13, 13, 0)
    assert report.sentences() == []
    assert tick.count == 2


@pytest.mark.parametrize(("answer_room", "kept"), [(8, "Because."), (7, "Because"), (1, "B")])
def test_a_long_row_keeps_its_beginning_and_is_counted(encoder: ChatEncoder, answer_room: int, kept: str) -> None:
    rows, report = tokenize_sft([sft("Because."), sft("x")], encoder, LENGTH + answer_room)
    assert text(encoder, rows[0].ids) == PROMPT + kept
    assert learned(encoder, rows[0]) == kept
    cut = 2 if answer_room == 1 else 1  # the other row has one letter and its end
    assert report.truncated == cut
    assert report.sentences() == [f"{cut} of 2 rows were longer than --max-length and were cut"]


def test_a_row_with_nothing_to_learn_is_left_out_and_named(encoder: ChatEncoder) -> None:
    records = [sft("ok", where="a.jsonl:1"), *(sft("ok", "Why is it so?", where=f"a.jsonl:{n}") for n in (2, 3))]
    rows, report = tokenize_sft(records, encoder, LENGTH + 3)
    assert [text(encoder, row.ids) for row in rows] == [PROMPT + "ok<|im_end|>"]
    assert report.left_out == {"nothing to learn within --max-length": Tally(2, ["a.jsonl:2", "a.jsonl:3"])}
    assert (report.rows, report.tokens, report.supervised, report.truncated) == (3, LENGTH + 3, 3, 2)
    assert report.sentences() == [
        "2 of 3 rows were longer than --max-length and were cut",
        "2 of 3 rows left out: nothing to learn within --max-length (first: a.jsonl:2)",
    ]


def test_no_row_left_is_an_error(encoder: ChatEncoder) -> None:
    with pytest.raises(DataError) as caught:
        tokenize_sft([sft("ok")], encoder, LENGTH)
    assert caught.value.message == (
        "no row is left to train on: 1 of 1 rows were longer than --max-length and were cut; "
        "1 of 1 rows left out: nothing to learn within --max-length (first: a.jsonl:1)"
    )
    assert caught.value.hint == "raise --max-length, or for PPO --max-prompt-length"


@pytest.mark.parametrize("tokenize", [tokenize_sft, tokenize_pairs, tokenize_prompts])
def test_no_data_is_an_error(encoder: ChatEncoder, tokenize: Any) -> None:
    with pytest.raises(DataError, match=r"^no row is left to train on: the data is empty"):
        tokenize([], encoder, 64)


def test_every_answer_of_a_conversation_is_learned(encoder: ChatEncoder) -> None:
    turns = ("a", "b", "c", "d")
    messages = tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(turns))
    rows, report = tokenize_sft([SftRecord("a.jsonl:1", messages)], encoder, 128)
    assert learned(encoder, rows[0]) == "b<|im_end|>d<|im_end|>"
    assert report.supervised == 4


# -- plain text --------------------------------------------------------------------------------------------------------


def test_plain_text_learns_all_of_it_and_its_end(encoder: ChatEncoder) -> None:
    rows, report = tokenize_sft([SftRecord("t.jsonl:1", text="once <|im_end|>")], encoder, 64)
    row = rows[0]
    assert text(encoder, row.ids) == "once <|im_end|><|im_end|>"
    # The text's own "<|im_end|>" is bytes; the one token of that name is the end of the row.
    assert [int(i) for i in row.ids].count(encoder.turn_end_id) == 1
    assert row.ids[-1] == encoder.tokenizer.eos_token_id
    assert row.supervised.all()
    # Without a bos the first letter has nothing in front to be predicted from.
    assert (report.tokens, report.supervised) == (16, 15)


def with_bos() -> ChatEncoder:
    """Of a tokenizer that begins every text with its bos."""
    tokenizer = byte_tokenizer((*SPECIALS, "<s>"), bos="<s>", eos="<|im_end|>")
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return ChatEncoder(tokenizer, load_template("chatml"))


def test_plain_text_begins_with_the_bos() -> None:
    encoder = with_bos()
    rows, report = tokenize_sft([SftRecord("t.jsonl:1", text="once")], encoder, 64)
    assert text(encoder, rows[0].ids) == "<s>once<|im_end|>"
    assert report.supervised == 5


def test_a_bos_that_the_tokenizer_never_writes_does_not_open_a_text() -> None:
    """SmolLM2's bos is the token that opens a chat turn."""
    tokenizer = byte_tokenizer(SPECIALS, bos="<|im_start|>", eos="<|im_end|>")
    rows, _ = tokenize_sft([SftRecord("t.jsonl:1", text="once")], ChatEncoder(tokenizer, load_template("chatml")), 64)
    assert rows[0].ids[0] != tokenizer.bos_token_id


def test_a_bos_that_is_the_eos_does_not_open_a_text() -> None:
    encoder = ChatEncoder(byte_tokenizer(SPECIALS, bos="<|im_end|>", eos="<|im_end|>"), load_template("chatml"))
    rows, _ = tokenize_sft([SftRecord("t.jsonl:1", text="once")], encoder, 64)
    assert text(encoder, rows[0].ids) == "once<|im_end|>"


def test_long_text_is_split_and_all_of_it_is_learned(encoder: ChatEncoder) -> None:
    long = SftRecord("t.jsonl:1", text="once upon a time")
    rows, report = tokenize_sft([long, SftRecord("t.jsonl:2", text="brief")], encoder, 8)
    assert [text(encoder, row.ids) for row in rows] == ["once upo", "on a tim", "me<|im_end|>", "brief<|im_end|>"]
    # What a piece repeats of the one before is not learned again.
    assert [learned(encoder, row) for row in rows] == ["once upo", "n a tim", "e<|im_end|>", "brief<|im_end|>"]
    assert (report.rows, report.truncated, report.split, report.pieces) == (2, 0, 1, 3)
    # All but each text's first letter, which has nothing in front to be predicted from.
    assert report.supervised == sum(row.targets for row in rows) == len("once upon a time") + len("brief")
    assert report.tokens == sum(map(len, rows))
    assert report.sentences() == [
        "1 of 2 rows were plain text longer than --max-length and were split into 3 pieces",
    ]


def test_every_piece_begins_with_the_bos() -> None:
    encoder = with_bos()
    rows, report = tokenize_sft([SftRecord("t.jsonl:1", text="once upon a time")], encoder, 8)
    assert [text(encoder, row.ids) for row in rows] == ["<s>once up", "<s>pon a t", "<s>time<|im_end|>"]
    assert "".join(learned(encoder, row) for row in rows) == "once upon a time<|im_end|>"
    assert report.supervised == len("once upon a time") + 1


@pytest.mark.parametrize("length", range(40))
@pytest.mark.parametrize("bos", [False, True])
def test_no_piece_is_too_long_and_no_token_is_lost(encoder: ChatEncoder, length: int, bos: bool) -> None:
    encoder = with_bos() if bos else encoder
    words = "".join(chr(65 + i) for i in range(length + 1))
    rows, report = tokenize_sft([SftRecord("t.jsonl:1", text=words)], encoder, 8)
    assert max(map(len, rows)) <= 8
    assert "".join(learned(encoder, row) for row in rows) == words + "<|im_end|>"
    assert report.supervised == len(words) + bos
    assert (report.split, report.pieces) == ((1, len(rows)) if len(rows) > 1 else (0, 0))


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_are_whole_where_they_fit(encoder: ChatEncoder) -> None:
    tick = Ticks()
    rows, report = tokenize_pairs([pair("good", "bad", "poor one", margin=0.5)], encoder, LENGTH + 9, tick)
    (row,) = rows
    assert text(encoder, row.prompt) == PROMPT
    assert [text(encoder, a) for a in row.answers] == ["good<|im_end|>", "bad<|im_end|>", "poor one<|im_end|>"]
    assert row.margin == 0.5
    assert (report.rows, report.truncated, report.tokens) == (1, 0, 3 * LENGTH + 5 + 4 + 9)
    assert report.supervised == 0
    assert report.sentences() == []
    assert tick.count == 1


def test_a_prompt_without_room_is_cut_from_the_left_for_all_its_answers(encoder: ChatEncoder) -> None:
    rows, report = tokenize_pairs([pair("good", "bad"), pair("x", "y")], encoder, LENGTH + 3)
    # "good" and its end take 5 tokens, two too many; the shorter answer gets the same prompt in front.
    assert text(encoder, rows[0].prompt) == PROMPT.removeprefix("<|im_start|>u")
    assert len(rows[0].prompt) == LENGTH - 2
    assert [text(encoder, a) for a in rows[0].answers] == ["good<|im_end|>", "bad<|im_end|>"]
    assert text(encoder, rows[1].prompt) == PROMPT
    assert report.truncated == 1
    assert report.tokens == 2 * (LENGTH - 2) + 5 + 4 + 2 * (LENGTH + 2)
    assert report.sentences() == ["1 of 2 rows were longer than --max-length and were cut"]


def test_the_longest_answer_makes_the_room_wherever_it_stands(encoder: ChatEncoder) -> None:
    rows, _ = tokenize_pairs([pair("a", "longest", "mid")], encoder, LENGTH)
    assert len(rows[0].prompt) == LENGTH - 8


def test_an_answer_longer_than_the_limit_keeps_its_beginning(encoder: ChatEncoder) -> None:
    rows, report = tokenize_pairs([pair("0123456789", "ok")], encoder, 9)
    assert [text(encoder, a) for a in rows[0].answers] == ["01234567", "ok<|im_end|>"]
    assert text(encoder, rows[0].prompt) == "\n"  # one token of context is always there
    assert report.truncated == 1


def test_a_pair_is_counted_once_however_much_is_cut(encoder: ChatEncoder) -> None:
    _, report = tokenize_pairs([pair("0123456789", "0123456789")], encoder, 9)
    assert (report.rows, report.truncated) == (1, 1)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_long_prompts_are_left_out_whole(encoder: ChatEncoder) -> None:
    tick = Ticks()
    records = [
        PromptRecord(f"q.jsonl:{n}", (Message("user", question),), {"n": n})
        for n, question in enumerate(("Why?", "Why is it?", "How?", "And what else is it?"), start=1)
    ]
    rows, report = tokenize_prompts(records, encoder, LENGTH, tick)
    assert [text(encoder, row.prompt) for row in rows] == [PROMPT, PROMPT.replace("Why", "How")]
    assert [row.record for row in rows] == [records[0], records[2]]
    assert report.left_out == {"prompt longer than 23 tokens": Tally(2, ["q.jsonl:2", "q.jsonl:4"])}
    assert (report.rows, report.tokens, report.truncated) == (4, 2 * LENGTH, 0)
    assert report.sentences() == ["2 of 4 rows left out: prompt longer than 23 tokens (first: q.jsonl:2)"]
    assert tick.count == 4


def test_no_prompt_left_is_an_error(encoder: ChatEncoder) -> None:
    record = PromptRecord("q.jsonl:1", (Message("user", "Why?"),))
    with pytest.raises(DataError) as caught:
        tokenize_prompts([record], encoder, LENGTH - 1)
    assert caught.value.message == (
        "no row is left to train on: 1 of 1 rows left out: prompt longer than 22 tokens (first: q.jsonl:1)"
    )
