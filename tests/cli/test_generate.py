"""Answers to one prompt, to a file and in a chat."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhfkit.chat.messages import Message

SHORT = ("--precision", "fp32", "--max-new-tokens", "8")
Conversations = list[list[tuple[str, str]]]


@pytest.fixture
def adapter(cli: Any, sft_file: Path) -> Path:
    """A LoRA folder that answers otherwise than its base."""
    flags = ("--precision", "fp32", "--max-length", "128", "--batch-size", "4", "--trackers", "none", "--lr", "0.05")
    outcome = cli("sft", "--model", "tiny", "--data", sft_file, "--out", "run", "--lora-rank", "4", *flags)
    assert outcome.code == 0, outcome.err
    return Path("run/final")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Conversations:
    """The conversations that the model was given to answer, as (role, content)."""
    from rlhfkit.stages.generate import Speaker

    seen: Conversations = []
    real = Speaker.answer

    def spy(self: Speaker, conversations: Sequence[Sequence[Message]], *rest: Any) -> Any:
        seen.extend([(m.role, m.content) for m in conversation] for conversation in conversations)
        return real(self, conversations, *rest)

    monkeypatch.setattr(Speaker, "answer", spy)
    return seen


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_one_prompt_streamed_or_not(cli: Any, asked: Conversations) -> None:
    prompt = ("generate", "--model", "tiny", "--prompt", "说一个字", "--system", "be brief", *SHORT)
    streamed, whole = cli(*prompt), cli(*prompt, "--no-stream")
    assert streamed.code == whole.code == 0
    assert streamed.out == whole.out
    assert streamed.out.strip()
    assert asked == [[("system", "be brief"), ("user", "说一个字")]] * 2
    assert cli(*prompt, "--seed", "1").out != streamed.out
    assert cli(*prompt, "--temperature", "0").out == cli(*prompt, "--temperature", "0").out
    assert cli(*prompt, "--temperature", "0").out == cli(*prompt, "--temperature", "0", "--seed", "1").out


def test_file_to_file_keeps_order_and_columns(cli: Any, prompts_file: Path) -> None:
    many = ("generate", "--model", "tiny", "--input", prompts_file, *SHORT)
    outcome = cli(*many, "--output", "out/answers.jsonl", "--batch-size", "3")
    assert outcome.code == 0, outcome.err
    assert "8 answers in out/answers.jsonl" in outcome.err
    rows = rows_of("out/answers.jsonl")
    assert [row["n"] for row in rows] == list(range(8))
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": f"say one word {i}"}] for i in range(8)]
    assert all(isinstance(row["response"], str) and row["ended"] in (True, False) for row in rows)
    # An answer depends on its prompt's place and the seed, not on its neighbours.
    assert cli(*many, "--output", "other.jsonl", "--batch-size", "8").code == 0
    assert rows_of("other.jsonl") == rows


@pytest.mark.parametrize(("kept", "half"), [(3, 9), (5, 0), (0, 20), (8, 0)])
def test_file_to_file_goes_on_after_a_half_written_file(cli: Any, prompts_file: Path, kept: int, half: int) -> None:
    command = ("generate", "--model", "tiny", "--input", prompts_file, "--output", "a.jsonl", *SHORT)
    assert cli(*command).code == 0
    whole = Path("a.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join(lines[:kept]) + lines[min(kept, 7)][:half])
    again = cli(*command)
    assert again.code == 0, again.err
    assert Path("a.jsonl").read_bytes() == whole
    assert (f"a.jsonl holds {kept} of 8 answers already: going on from there" in again.err) == (kept > 0)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"prompt": [{"role": "user", "content": "another"}], "response": "x"}\n', 1),
        ("notes of mine\n", 1),
    ],
)
def test_a_foreign_output_is_refused_and_kept(cli: Any, prompts_file: Path, content: str, line: int) -> None:
    Path("a.jsonl").write_text(content)
    outcome = cli("generate", "--model", "tiny", "--input", "prompts.jsonl", "--output", "a.jsonl", *SHORT)
    assert outcome.code == 1
    assert outcome.err.endswith(
        f"error: a.jsonl:{line} is not the answer to row {line} of prompts.jsonl\n"
        "  → give another --output, or delete this one to start again\n"
    )
    assert Path("a.jsonl").read_text() == content


def test_more_answers_than_prompts_are_refused(cli: Any, prompts_file: Path) -> None:
    command = ("generate", "--model", "tiny", "--output", "a.jsonl", *SHORT)
    assert cli(*command, "--input", prompts_file).code == 0
    fewer = write_jsonl(Path("fewer.jsonl"), [{"prompt": f"say one word {i}"} for i in range(3)])
    outcome = cli(*command, "--input", fewer)
    assert outcome.code == 1
    assert "a.jsonl:4 is not the answer to row 4 of fewer.jsonl" in outcome.err


def test_chat_remembers_until_told_to_forget(cli: Any, asked: Conversations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\nmore\n/clear\nthree\n/exit\nnever read\n"))
    outcome = cli("generate", "--model", "tiny", "--system", "s", *SHORT)
    assert outcome.code == 0, outcome.err
    assert "type a message; /clear forgets the conversation" in outcome.err
    assert "the conversation is forgotten" in outcome.err
    first, second, third, fresh = asked
    assert first == [("system", "s"), ("user", "one")]
    assert second[:2] == first
    assert [role for role, _ in second] == ["system", "user", "assistant", "user"]
    assert second[3] == ("user", "two")
    assert third[:4] == second
    assert third[5] == ("user", "more")
    assert fresh == [("system", "s"), ("user", "three")]
    assert second[2][1].strip() in outcome.out


def test_chat_ends_with_the_input(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert cli("generate", "--model", "tiny", *SHORT).code == 0


def test_a_stopped_answer_leaves_the_chat_as_it_was(
    cli: Any, asked: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhfkit.stages.generate import Speaker

    real = Speaker.words

    def stop_once(self: Speaker, ids: Sequence[int]) -> str:
        monkeypatch.setattr(Speaker, "words", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Speaker, "words", stop_once)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/exit\n"))
    outcome = cli("generate", "--model", "tiny", *SHORT)
    assert outcome.code == 0
    assert "(stopped; this turn is forgotten)" in outcome.err
    assert asked == [[("user", "one")], [("user", "two")]]


def test_a_lora_folder_loads_with_its_base_and_as_adapter(cli: Any, adapter: Path) -> None:
    prompt = ("--prompt", "what do you think of film 3?", "--temperature", "0", *SHORT)
    base = cli("generate", "--model", "tiny", *prompt)
    direct = cli("generate", "--model", adapter, *prompt)
    beside = cli("generate", "--model", "tiny", "--adapter", adapter, *prompt)
    alone = cli("generate", "--adapter", adapter, *prompt)
    assert base.code == direct.code == beside.code == alone.code == 0
    assert direct.out == beside.out == alone.out
    assert direct.out != base.out


def test_an_adapter_on_an_adapter_is_refused(cli: Any, adapter: Path) -> None:
    outcome = cli("generate", "--model", adapter, "--adapter", adapter, "--prompt", "x", *SHORT)
    assert outcome.code == 1
    assert outcome.err == (
        "error: run/final is a LoRA folder itself\n  → give the base as --model, or leave --adapter out\n"
    )


def test_a_model_as_adapter_is_refused(cli: Any) -> None:
    outcome = cli("generate", "--model", "tiny", "--adapter", "tiny", "--prompt", "x", *SHORT)
    assert outcome.code == 1
    assert outcome.err == "error: tiny is no LoRA folder: it has no adapter_config.json\n"


LONG = "a film " * 100  # tokens: about 200, of the 512 positions that the model has


def test_a_prompt_longer_than_the_model_is_an_error(cli: Any) -> None:
    outcome = cli("generate", "--model", "tiny", "--prompt", LONG * 3, *SHORT)
    assert outcome.code == 1
    assert re.search(
        r"the prompt has \d{3} tokens, which with 1 of an answer are more than .* 512 positions", outcome.err
    )
    assert outcome.out == ""


def test_padding_rows_are_told_and_never_drawn(cli: Any) -> None:
    """Even where they are the likeliest by far; the answer is the one of the model without such rows."""
    whole = cli("generate", "--model", "tiny", "--prompt", "one", "--temperature", "0", *SHORT)
    assert "note: ids 339 to 383 are padding rows of the head, no tokens: they are never drawn" in whole.err
    model = AutoModelForCausalLM.from_pretrained("tiny")
    with torch.no_grad():
        model.get_output_embeddings().weight[339:] *= 1000
    model.save_pretrained("loud")
    AutoTokenizer.from_pretrained("tiny").save_pretrained("loud")
    loud = cli("generate", "--model", "loud", "--prompt", "one", "--temperature", "0", *SHORT)
    assert loud.out == whole.out


def test_what_is_left_for_the_answer_is_said(cli: Any, asked: Conversations) -> None:
    outcome = cli("generate", "--model", "tiny", "--prompt", LONG * 2, "--precision", "fp32", "--max-new-tokens", "400")
    assert outcome.code == 0, outcome.err
    assert re.search(r"note: \d+ of the model's 512 positions are left for the answer", outcome.err)
    refused = cli("generate", "--model", "tiny", "--prompt", "one", "--max-new-tokens", "512")
    assert refused.code == 2
    assert "max_new_tokens: 512 leave no room for a prompt in the 512 positions of tiny" in refused.err


def test_a_file_with_too_long_a_prompt_is_refused_before_the_first_answer(cli: Any, asked: Conversations) -> None:
    write_jsonl(Path("prompts.jsonl"), [{"prompt": "one"}, {"prompt": LONG * 3}])
    outcome = cli("generate", "--model", "tiny", "--input", "prompts.jsonl", "--output", "answers.jsonl", *SHORT)
    assert outcome.code == 1
    assert "prompts.jsonl:2: the prompt has " in outcome.err
    assert asked == []
    assert not Path("answers.jsonl").exists()


def test_a_chat_forgets_its_oldest_turns_when_it_is_full(
    cli: Any, asked: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n{LONG}\n{LONG}\n{LONG}\n{LONG * 3}\nsix\n/exit\n"))
    outcome = cli("generate", "--model", "tiny", "--system", "s", *SHORT)
    assert outcome.code == 0, outcome.err
    first, second, third, fourth, sixth = asked
    assert (len(first), len(second), len(third)) == (2, 4, 6)
    assert fourth[0] == sixth[0] == ("system", "s")
    assert len(fourth) < 8
    assert fourth[-1] == ("user", LONG.strip())
    assert re.search(r"note: the [123] oldest questions and answers are forgotten", outcome.err)
    assert "error: the prompt has " in outcome.err  # the fifth, by itself
    assert sixth[-1] == ("user", "six")
