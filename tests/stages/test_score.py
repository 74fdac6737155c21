"""`rlhfkit score`: the numbers of the training, whatever stands beside a row, and refusals in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics, write_jsonl

from rlhfkit.chat.template import ChatEncoder
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, ScoreConfig
from rlhfkit.errors import ConfigError, DataError, ModelError, NonFiniteError, TemplateError
from rlhfkit.runtime.run import StageResult
from rlhfkit.stages import reward, score

# Pairs, ranked answers, a margin, an answer that takes all the room, and prompts that have to be cut for the longer
# answer, which cuts them for the shorter one too.
HELD_OUT = [
    {"prompt": "what do you think of the film?", "chosen": "it was good", "rejected": "very bad"},
    {"prompt": "say one word", "answers": ["good", "a good story", "bad", "very very bad"]},
    {"prompt": "count to three: " * 9, "chosen": "one two three", "rejected": "one " * 25},
    {"prompt": "one two three " * 15, "chosen": "a good film with a good story " * 3, "rejected": "bad", "margin": 0.5},
    {"prompt": "the film?", "chosen": "good " * 80, "rejected": "bad"},
]
MAX_LENGTH = 64


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "heldout.jsonl", HELD_OUT)


@pytest.fixture
def judge(settings: Callable[..., Any], pairs_file: Path, held_out: Path) -> StageResult:
    flags = settings(
        "rm", data__train=[str(pairs_file)], data__eval=[str(held_out)], data__max_length=MAX_LENGTH, optim__lr=5e-3
    )
    return reward.run(load_config(RmConfig, flags=flags))


def scored(judge: StageResult | Path, *data: Path | str, **flags: Any) -> score.ScoreResult:
    model = judge.final if isinstance(judge, StageResult) else judge
    return score.run(load_config(ScoreConfig, flags={"model": str(model), "data": [*map(str, data)], **flags}))


def test_the_numbers_are_those_of_the_training(judge: StageResult, held_out: Path) -> None:
    found = scored(judge, held_out)
    trained = read_metrics(judge.out)[-1]
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
        assert found.totals[name] == pytest.approx(trained[f"eval_{name}"], abs=1e-5)
    assert found.totals["truncated"] == 3
    assert (found.totals["rows"], found.totals["answers"], found.totals["pairs"]) == (5, 12, 10)

    # What the training recorded: the report in the run folder, mean and spread beside the model.
    kept = json.loads((judge.out / "evaluation.json").read_text())
    assert (kept.pop("step"), kept.pop("precision")) == (3, "fp32")
    assert found.report is not None
    again = found.report.as_dict()
    assert set(kept) == set(again)
    for name in set(kept) - {"reliability", "histogram"}:
        assert kept[name] == pytest.approx(again[name], abs=1e-5)
    assert kept["histogram"]["edges"] == again["histogram"]["edges"]
    for side in ("chosen", "rejected"):
        assert kept["histogram"]["counts"][side] == pytest.approx(again["histogram"]["counts"][side])
    assert [b["pairs"] for b in kept["reliability"]] == [b["pairs"] for b in again["reliability"]]
    record = json.loads((judge.final / "rlhfkit.json").read_text())
    assert record["score_mean"] == pytest.approx(found.totals["score_mean"], abs=1e-5)
    assert record["score_std"] == pytest.approx(found.totals["score_std"], abs=1e-5)
    assert found.normalized is not None
    flat = torch.tensor([s for row in found.normalized for s in row])
    assert flat.mean() == pytest.approx(0, abs=1e-4)
    assert flat.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_a_cut_prompt_is_the_same_for_all_its_answers(judge: StageResult, tmp_path: Path) -> None:
    """As in training; alone, the short answer keeps more of the prompt, and that is another score."""
    row = HELD_OUT[2]
    pair = scored(judge, write_jsonl(tmp_path / "pair.jsonl", [row])).scores[0]
    alone = [{"prompt": row["prompt"], "response": row[name]} for name in ("chosen", "rejected")]
    chosen, rejected = (s[0] for s in scored(judge, write_jsonl(tmp_path / "alone.jsonl", alone)).scores)
    assert rejected == pytest.approx(pair[1], abs=1e-5)
    assert abs(chosen - pair[0]) > 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_order_never_and_batches_hardly_matter(
    judge: StageResult, held_out: Path, pairs_file: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    rows = [json.loads(line) for path in (held_out, pairs_file) for line in path.read_text().splitlines()]
    rows = [*rows, *rows[:3]]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    straight = scored(judge, held_out, pairs_file, precision=precision).scores
    turned = scored(
        judge, write_jsonl(tmp_path / "shuffled.jsonl", [rows[i] for i in order]), precision=precision
    ).scores
    straight = [*straight, *straight[:3]]
    assert turned == [straight[i] for i in order]
    single = scored(judge, held_out, pairs_file, precision=precision, micro_batch_tokens=1).scores
    for one, many in zip(single, straight, strict=False):
        assert one == pytest.approx(many, abs=tolerance)


def test_single_answers_have_one_score_a_row(judge: StageResult, tmp_path: Path) -> None:
    """The forms that models' answers come in: of sft, of samples.jsonl, of generate; an empty answer among them."""
    asked, said = "what do you think of the film?", "it was good"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    rows = [
        {"prompt": asked, "response": said},
        {"step": 3, "prompt": asked, "answer": said, "reward": 0.5, "ended": True},
        {"prompt": turns[:1], "response": said, "ended": False},
        {"messages": turns},
        {"instruction": asked, "input": "", "output": said},
        {"prompt": asked, "response": ""},
    ]
    data = write_jsonl(tmp_path / "answers.jsonl", rows)
    found = scored(judge, data, output=str(tmp_path / "new" / "scores.jsonl"))
    assert found.report is None
    assert len({row[0] for row in found.scores[:5]}) == 1
    assert found.scores[5] != found.scores[0]
    lines = [json.loads(line) for line in (tmp_path / "new" / "scores.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{data}:{i}" for i in range(1, 7)]
    assert [line["score"] for line in lines] == [row[0] for row in found.scores]
    assert found.normalized is not None
    assert [line["normalized"] for line in lines] == [row[0] for row in found.normalized]
    assert sum(found.totals["histogram"]["counts"]["scores"]) == 6


def test_ranked_rows_are_written_with_all_their_scores(judge: StageResult, held_out: Path, tmp_path: Path) -> None:
    found = scored(judge, held_out, output=str(tmp_path / "scores.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in lines] == found.scores
    assert [len(line["normalized"]) for line in lines] == [2, 4, 2, 2, 2]


def test_a_model_without_a_record_has_no_normalised_scores(judge: StageResult, held_out: Path, capsys: Any) -> None:
    (judge.final / "rlhfkit.json").unlink()
    found = scored(judge, held_out)
    assert found.normalized is None
    assert "the folder has no record of ours" in capsys.readouterr().err


def test_what_differs_from_the_training_is_said(judge: StageResult, held_out: Path, capsys: Any) -> None:
    longer = scored(judge, held_out, max_length=128, precision="bf16")
    assert longer.totals["truncated"] < 3
    said = capsys.readouterr().err
    assert "max_length was 64 in training and is 128 here" in said
    assert "precision was fp32 in training and is bf16 here" in said
    scored(judge, held_out)
    assert "in training and is" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a film?"}, "the row fits no score format; its fields are prompt"),
        ({"text": "a film"}, "plain text has no answer to score"),
        (
            {"messages": [{"role": "assistant", "content": "good"}]},
            r'field "messages\[0\]": the role is assistant where user is needed',
        ),
        ({"prompt": "a film?", "chosen": "good"}, "the row has no rejected"),
    ],
)
def test_rows_without_an_answer_are_refused(
    judge: StageResult, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [row, {"prompt": "a film?", "response": "good"}])
    with pytest.raises(DataError, match=words) as error:
        scored(judge, data)
    assert "rows.jsonl:1" in str(error.value)
    found = scored(judge, data, on_bad_row="skip")
    assert (found.totals["rows"], found.totals["skipped"], found.where) == (1, 1, [f"{data}:2"])
    alone = write_jsonl(tmp_path / "alone.jsonl", [row])
    with pytest.raises(DataError, match="none of its 1 rows can be used for score"):
        scored(judge, alone, on_bad_row="skip")


def test_rows_that_the_template_refuses(judge: StageResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ChatEncoder.encode

    def refuse_system(self: ChatEncoder, messages: Any) -> Any:
        if messages[0].role == "system" and messages[0].content == "no":
            raise TemplateError("the template refuses this conversation", hint="change the row")
        return encode(self, messages)

    monkeypatch.setattr(ChatEncoder, "encode", refuse_system)
    row = {"prompt": "a film?", "response": "good"}
    data = write_jsonl(tmp_path / "rows.jsonl", [row | {"system": "no"}, row])
    with pytest.raises(TemplateError, match=r"rows\.jsonl:1: the template refuses.*\n.*--on-bad-row skip"):
        scored(judge, data)
    found = scored(judge, data, on_bad_row="skip")
    assert (found.totals["rows"], found.totals["skipped"], found.where) == (1, 1, [f"{data}:2"])
    alone = write_jsonl(tmp_path / "alone.jsonl", [row | {"system": "no"}])
    with pytest.raises(DataError, match=r"no row is left to score; the first: .*alone\.jsonl:1: the template refuses"):
        scored(judge, alone, on_bad_row="skip")


def test_other_refusals(judge: StageResult, held_out: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no reward head"):
        scored(tiny_model, held_out)
    with pytest.raises(ConfigError, match=r"the weight of .* has no effect: each row is scored once"):
        scored(judge, f"{held_out}=2")
    with pytest.raises(ConfigError, match="is among the data"):
        scored(judge, held_out, output=str(held_out))
    with pytest.raises(ConfigError, match="is among the data"):
        scored(judge, tmp_path, output=str(tmp_path / "scores.jsonl"))
    with pytest.raises(ConfigError, match="is a folder"):
        scored(judge, held_out, output=str(tmp_path))
    with pytest.raises(ConfigError, match="512 positions"):
        scored(judge, held_out, max_length=1024)
    with pytest.raises(ConfigError, match="hold no conversation"):
        scored(judge, held_out, max_length=4)


def test_a_score_that_is_no_number_is_refused(judge: StageResult, held_out: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = judge.final / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"heldout\.jsonl:1: the score is nan"):
        scored(judge, held_out)


def test_a_pooling_that_is_not_ours_is_refused(judge: StageResult, held_out: Path) -> None:
    path = judge.final / "rlhfkit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooling": "mean"}))
    with pytest.raises(ModelError, match="pooled by 'mean'"):
        scored(judge, held_out)
