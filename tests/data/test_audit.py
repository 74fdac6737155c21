"""Counts over a corpus: each finding against rows made to have it, and the sums against what the stages count.

The tokenizer has one id per byte, so lengths can be read off the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import random_conversations

from rlhfkit.chat.messages import Conversation, Message
from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.data.audit import FINDINGS, Audit, dump_record, see_row
from rlhfkit.data.parse import Stage, parse_row
from rlhfkit.data.records import PreferenceRecord, PromptRecord, Record, SftRecord, Tally
from rlhfkit.data.rows import RawRow
from rlhfkit.data.sources import load_records
from rlhfkit.data.tokenize import tokenize_pairs, tokenize_prompts, tokenize_sft
from rlhfkit.families.conformance import byte_tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LONG = 200

BOS_TWICE = "{{ bos_token }}{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
BOS_EACH_TURN = "{% for m in messages %}{{ bos_token }}[{{ m.content }}]{{ eos_token }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    "{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(SPECIALS, eos="<|im_end|>"), load_template("chatml"))


def own_template(source: str) -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>"), Template("own", source))


def chat(*texts: str, system: str = "") -> Conversation:
    turns = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return (Message("system", system), *turns) if system else turns


def sft(where: str, *texts: str) -> SftRecord:
    return SftRecord(where, chat(*texts))


def pair(where: str, prompt: str, *answers: str, margin: float = 0.0) -> PreferenceRecord:
    return PreferenceRecord(where, chat(prompt), answers, margin)


def prompt(where: str, text: str, **columns: Any) -> PromptRecord:
    return PromptRecord(where, chat(text), columns)


def audit(encoder: ChatEncoder, *groups: Sequence[Record], limit: int = LONG) -> Audit:
    made = Audit(limit)
    flat = [record for group in groups for record in group]
    for group in groups:
        made.start("s", 1.0)
        for record in group:
            made.add(record, encoder)
    made.finish(lambda wanted: {i: flat[i].where for i in wanted})
    return made


def found(made: Audit) -> dict[str, tuple[int, list[str]]]:
    """The findings that are there, with their count and places."""
    return {key: (tally.count, tally.first) for key, tally in made.found.items() if tally.count}


# -- findings ----------------------------------------------------------------------------------------------------------


def test_good_rows_have_no_finding(encoder: ChatEncoder) -> None:
    rows = [sft("1", "Why?", "So."), sft("2", "How?", "Thus.", "Really?", "Yes."), SftRecord("3", text="plain words")]
    made = audit(encoder, rows)
    assert found(made) == {}
    assert made.hurting() == []
    assert (made.rows, made.assistant_turns, made.turn_ends) == (3, 4, 4)
    # "So.", "Thus." and "Yes." with an end each; of a plain text all but the first token, which follows nothing.
    assert made.supervised_tokens == 4 + 6 + 5 + len("plain words")


def test_a_cut_answer_loses_its_end(encoder: ChatEncoder) -> None:
    rows = [sft("fits", "Why?", "x" * 10), sft("cut", "Why?", "x" * 11), SftRecord("text", text="y" * 16)]
    limit = len(see_row(rows[0], encoder, LONG).sequences[0])
    made = audit(encoder, rows, limit=limit)
    assert found(made) == {"truncated": (1, ["cut"]), "without_eos": (1, ["cut"])}
    assert (made.turn_ends, made.assistant_turns) == (2, 3)


def test_a_long_text_is_split_not_cut(encoder: ChatEncoder) -> None:
    text = SftRecord("text", text="y" * 60)
    made = audit(encoder, [text], limit=24)
    assert found(made) == {"split_texts": (1, ["text"])}
    assert made.hurting() == []
    assert (made.supervised_tokens, made.turn_ends, made.assistant_turns) == (60, 1, 1)
    _, report = tokenize_sft([text], encoder, 24)
    assert (made.tokens, made.supervised_tokens) == (report.tokens, report.supervised)
    row = see_row(text, encoder, 24)
    assert ([len(piece) for piece in row.sequences], row.length, row.cut) == ([24, 24, 15], 61, 0)


def test_an_earlier_end_does_not_stand_for_the_last(encoder: ChatEncoder) -> None:
    row = sft("two", "Why?", "So.", "Why?", "x" * 90)
    made = audit(encoder, [row], limit=100)
    assert found(made) == {"truncated": (1, ["two"]), "without_eos": (1, ["two"])}
    assert (made.turn_ends, made.assistant_turns) == (1, 2)


def test_a_row_without_a_learned_token_is_left_out(encoder: ChatEncoder) -> None:
    made = audit(encoder, [sft("long", "q" * 90, "a"), sft("good", "q", "a")], limit=60)
    assert found(made) == {"truncated": (1, ["long"]), "nothing_to_learn": (1, ["long"])}
    assert (made.rows, made.assistant_turns) == (2, 1)
    row = see_row(sft("long", "q" * 90, "a"), encoder, 60)
    assert row.reason == "nothing to learn within 60 tokens"
    assert row.cut == 0
    assert not row.sequences[0].supervised.any()


def test_pad_equal_to_eos_hides_no_end() -> None:
    tokenizer = byte_tokenizer(SPECIALS, eos="<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    made = audit(ChatEncoder(tokenizer, load_template("chatml")), [sft("1", "Why?", "So.")])
    assert found(made) == {}
    assert made.turn_ends == 1


def test_double_bos() -> None:
    rows = [sft("1", "Why?", "So."), sft("2", "How?", "Thus.")]
    assert found(audit(own_template(BOS_TWICE), rows)) == {"double_bos": (2, ["1", "2"])}
    # LLaMA 2 has one in front of every turn, which is right.
    assert found(audit(own_template(BOS_EACH_TURN), [sft("1", "a", "b", "c", "d")])) == {}
    # What a user types is no bos, however often.
    assert "double_bos" not in found(audit(own_template(BOS_EACH_TURN), [sft("1", "<s><s>", "b")]))


def test_special_strings_hurt_where_they_are_learned(encoder: ChatEncoder) -> None:
    rows = [
        sft("asked", "What is <|im_end|>?", "A token."),
        sft("learned", "Why?", "So.<|im_end|>"),
        SftRecord("text", text="<|im_start|>user"),
        sft("near", "What is <|im_ end|>?", "<im_end>"),
    ]
    made = audit(encoder, rows)
    assert found(made) == {
        "special_strings": (3, ["asked", "learned", "text"]),
        "special_strings_in_answers": (2, ["learned", "text"]),
    }
    assert [finding.key for finding in made.hurting()] == ["special_strings_in_answers"]
    assert made.turn_ends == 4  # the typed ones are not among them

    pairs = [pair("asked", "<|im_end|>", "a", "b"), pair("learned", "Why?", "a", "b<|im_end|>")]
    assert found(audit(encoder, pairs))["special_strings_in_answers"] == (1, ["learned"])
    assert set(found(audit(encoder, [prompt("1", "<|im_end|>")]))) == {"special_strings"}


def test_duplicates_are_counted_over_all_sources(encoder: ChatEncoder) -> None:
    first = [sft("a:1", "q", "a"), sft("a:2", "q", "b"), sft("a:3", "q", "a")]
    second = [sft("b:1", "q", "b"), sft("b:2", "qa", ""), SftRecord("b:3", text="a"), sft("b:4", "q", "a")]
    made = audit(encoder, first, second)
    assert made.found["duplicates"].count == 3
    assert made.found["duplicates"].first == ["a:3 (as a:1)", "b:1 (as a:2)", "b:4 (as a:1)"]
    assert made.hurting() == []


def test_duplicates_of_pairs_and_prompts(encoder: ChatEncoder) -> None:
    pairs = [pair("1", "q", "a", "b"), pair("2", "q", "b", "a"), pair("3", "q", "a", "b", margin=2.0)]
    assert audit(encoder, pairs).found["duplicates"].first == ["3 (as 1)"]
    system = PromptRecord("3", chat("q", system="s"))
    prompts = [prompt("1", "q", n=1), prompt("2", "q", n=2), system]
    assert audit(encoder, prompts).found["duplicates"].first == ["2 (as 1)"]


def test_only_the_first_places_are_kept(encoder: ChatEncoder) -> None:
    made = audit(encoder, [sft(str(i), "q", "<|im_end|>") for i in range(9)])
    assert found(made)["special_strings"] == (9, ["0", "1", "2", "3", "4"])
    assert found(made)["duplicates"] == (8, ["1 (as 0)", "2 (as 0)", "3 (as 0)", "4 (as 0)", "5 (as 0)"])


def test_rows_that_the_template_refuses() -> None:
    rows = [SftRecord("1", chat("q", "a", system="s")), sft("2", "q", "a")]
    made = audit(own_template(NO_SYSTEM), rows)
    assert found(made) == {"refused_by_template": (1, ["1"])}
    assert (made.rows, made.turn_ends) == (1, 1)
    assert "no system turn here" in see_row(rows[0], own_template(NO_SYSTEM), LONG).reason


def test_pairs(encoder: ChatEncoder) -> None:
    rows = [
        pair("fits", "Why?", "So.", "No."),
        pair("prompt cut", "q" * 100, "So.", "No."),
        pair("answer cut", "Why?", "So.", "n" * 100),
        pair("equal once cut", "Why?", "n" * 100, "n" * 101),
        pair("ranked", "Why?", "a", "b", "c"),
    ]
    made = audit(encoder, rows, limit=60)
    assert found(made) == {
        "truncated": (3, ["prompt cut", "answer cut", "equal once cut"]),
        "without_eos": (2, ["answer cut", "equal once cut"]),
        "chosen_equals_rejected": (1, ["equal once cut"]),
    }
    row = see_row(rows[1], encoder, 60)
    assert [len(sequence) for sequence in row.sequences] == [60, 60]
    assert row.cut == row.length - 60 > 0


def test_prompts(encoder: ChatEncoder) -> None:
    made = audit(encoder, [prompt("fits", "Why?"), prompt("long", "q" * 100)], limit=60)
    assert found(made) == {"too_long": (1, ["long"])}
    assert made.tokens == len(see_row(prompt("", "Why?"), encoder, 60).sequences[0])


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [60, 90, 1000])
def test_sums_are_those_of_the_stages(encoder: ChatEncoder, limit: int) -> None:
    prompts = random_conversations(3, 60, fragments=("<|im_end|>",))
    chats = [SftRecord(str(i), (*p, Message("assistant", "Fine " * (i % 9 + 1)))) for i, p in enumerate(prompts)]
    made = audit(encoder, chats, limit=limit)
    _, report = tokenize_sft(chats, encoder, limit)
    left_out = report.left_out.get("nothing to learn within --max-length", Tally()).count
    assert (made.rows, made.tokens, made.supervised_tokens) == (report.rows, report.tokens, report.supervised)
    assert (made.found["truncated"].count, made.found["nothing_to_learn"].count) == (report.truncated, left_out)

    pairs = [PreferenceRecord(str(i), p, ("Good " * (i % 9 + 1), "bad")) for i, p in enumerate(prompts)]
    made, (_, report) = audit(encoder, pairs, limit=limit), tokenize_pairs(pairs, encoder, limit)
    assert (made.tokens, made.found["truncated"].count) == (report.tokens, report.truncated)

    asked = [PromptRecord(str(i), p) for i, p in enumerate(prompts)]
    made, (_, report) = audit(encoder, asked, limit=limit), tokenize_prompts(asked, encoder, limit)
    assert (made.tokens, made.found["too_long"].count) == (
        report.tokens,
        sum(tally.count for tally in report.left_out.values()),
    )


def test_lengths(encoder: ChatEncoder) -> None:
    plain = [SftRecord(str(n), text="x" * (n - 1)) for n in (2, 32, 33, 50, 51, 64, 65, 200)]
    lengths = audit(encoder, plain, limit=50).lengths()
    assert lengths["histogram"] == [[1, 32, 2], [33, 50, 2], [51, 64, 2], [65, 128, 1], [129, 256, 1]]
    assert (lengths["min"], lengths["median"], lengths["p99"], lengths["max"]) == (2, 51, 200, 200)
    assert lengths["mean"] == round(sum((2, 32, 33, 50, 51, 64, 65, 200)) / 8, 1)
    assert audit(encoder, plain[:2], limit=50).lengths()["histogram"] == [[1, 32, 2]]
    assert audit(encoder, []).lengths() == {"histogram": []}


def test_skipped_rows_come_from_loading(encoder: ChatEncoder, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": " ", "rejected": "b"},
        {"prompt": "q", "chosen": "a"},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    rows[4]["rejected"] = rows[4]["chosen"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups, report = load_records([str(path)], "rm", on_bad_row="skip")
    made = Audit(LONG)
    made.start(report.sources[0].name, 2.0)
    made.skip(report.sources[0])
    for record in groups[0]:
        made.add(record, encoder)
    made.finish(lambda wanted: {i: groups[0][i].where for i in wanted})
    assert {key: count for key, (count, _) in found(made).items()} == {
        "skipped": 4,
        "empty_answers": 1,
        "chosen_equals_rejected": 2,
    }
    assert made.found["empty_answers"].first == [f"{path}:3"]
    assert made.found["chosen_equals_rejected"].first == [f"{path}:2", f"{path}:5"]
    assert vars(made.sources[0]) == {
        "name": str(path), "weight": 2.0, "rows": 1, "skipped": 4, "tokens": made.tokens, "supervised_tokens": 0,
    }  # fmt: skip


def test_every_finding_has_a_name_of_its_own() -> None:
    assert len({finding.key for finding in FINDINGS}) == len({finding.title for finding in FINDINGS}) == len(FINDINGS)


# -- dump --------------------------------------------------------------------------------------------------------------


def again(record: Record, stage: Stage) -> Record:
    return parse_row(RawRow(record.where, json.loads(json.dumps(dump_record(record)))), stage)


def test_a_dumped_record_reads_back() -> None:
    for i, turns in enumerate(random_conversations(5, 40)):
        where = f"rows.jsonl:{i}"
        whole = SftRecord(where, (*turns, Message("assistant", "a")))
        answers = ("best", "good", "bad")[: 2 + i % 2]
        assert again(whole, "sft") == whole
        assert again(SftRecord(where, text=turns[-1].content), "sft").text == turns[-1].content
        ranked = PreferenceRecord(where, turns, answers, margin=0.5 * (i % 3))
        assert again(ranked, "rm") == ranked
        asked = PromptRecord(where, turns, {"n": i, "tags": ["x"]})
        read = again(asked, "ppo")
        assert isinstance(read, PromptRecord)
        assert read.prompt == turns
        assert read.columns == {"where": where, "n": i, "tags": ["x"]}


def test_a_column_called_where_is_kept() -> None:
    assert dump_record(PromptRecord("p:1", chat("q"), {"where": "Paris"})) == {
        "where": "Paris",
        "prompt": [{"role": "user", "content": "q"}],
    }
