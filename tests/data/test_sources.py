"""Data sources: names, weights, bad rows, the hub, and mixing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfkit.chat.messages import Message
from rlhfkit.config.sources import DataSource, parse_source
from rlhfkit.data.records import Record, SftRecord
from rlhfkit.data.sources import LoadReport, detect_stage, load_records, mix
from rlhfkit.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A hub with one data set, ``us/rows``; the list takes what was asked for."""
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, config: str | None = None, *, split: str) -> list[dict[str, Any]]:
        asked.append((f"{name}/{config}" if config else name, split))
        if name == "us/many" and config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'zh']\nmore")
        if name == "us/many":
            return [{"prompt": config, "response": "a1"}]
        if name != "us/rows":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nsecond line")
        return [{"prompt": "q1", "response": "a1"}, {"prompt": "q2", "response": 2}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def save(name: str, *rows: dict[str, Any]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def pair(text: str) -> dict[str, str]:
    return {"prompt": f"q {text}", "response": f"a {text}"}


def load(*specs: str, **options: Any) -> tuple[list[list[Record]], LoadReport]:
    return load_records(specs, "sft", **{"on_bad_row": "error", **options})


def wheres(specs: str, **options: Any) -> list[str]:
    records, _ = load(specs, **options)
    return [record.where for record in records[0]]


def refusal(*specs: str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load(*specs, **options)
    return caught.value


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("rows.jsonl", DataSource("rows.jsonl", 1.0)),
        ("rows.jsonl=0.5", DataSource("rows.jsonl", 0.5)),
        ("owner/name:test=3", DataSource("owner/name:test", 3.0)),
        ("lr=2.jsonl=0.25", DataSource("lr=2.jsonl", 0.25)),
    ],
)
def test_parse_source(spec: str, expected: DataSource) -> None:
    assert parse_source(spec) == expected


def test_an_existing_path_with_an_equals_sign_is_taken_whole() -> None:
    save("rows=2", pair("x"))
    assert parse_source("rows=2") == DataSource("rows=2", 1.0)
    assert parse_source("rows=2=2") == DataSource("rows=2", 2.0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "half", ""])
def test_a_weight_is_a_number_above_zero(weight: str) -> None:
    with pytest.raises(ConfigError, match=f'"rows.jsonl={weight}": its weight "{weight}" is not a number above 0'):
        parse_source(f"rows.jsonl={weight}")


def test_a_source_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="has no name"):
        parse_source("=2")


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_one_list_and_one_report_per_source() -> None:
    first = save("a.jsonl", pair("1"), pair("2"))
    second = save("b.jsonl", pair("3"))
    records, report = load(f"{first}=0.5", second)
    assert records[1] == [SftRecord("b.jsonl:1", (Message("user", "q 3"), Message("assistant", "a 3")))]
    assert [record.where for record in records[0]] == ["a.jsonl:1", "a.jsonl:2"]
    assert [(s.name, s.rows_read, s.rows_kept, s.rows_skipped) for s in report.sources] == [
        ("a.jsonl", 2, 2, 0),
        ("b.jsonl", 1, 1, 0),
    ]


def test_the_first_bad_row_is_an_error_with_both_ways_on() -> None:
    error = refusal(save("a.jsonl", pair("1"), {"prompt": "q", "response": 5}))
    assert error.message == 'a.jsonl:2: field "response": the number 5 where one answer is needed'
    assert error.hint.startswith("sft rows are prompt + response")
    assert error.hint.endswith("; or leave such rows out with --on-bad-row skip")


def test_a_broken_line_is_a_bad_row_like_any_other() -> None:
    Path("a.jsonl").write_text(f"{json.dumps(pair('1'))}\n{{broken}}\n{json.dumps(pair('2'))}\n")
    error = refusal("a.jsonl")
    assert error.message.startswith("a.jsonl:2: not valid JSON at column 2")
    assert "--on-bad-row skip" in error.hint
    assert wheres("a.jsonl", on_bad_row="skip") == ["a.jsonl:1", "a.jsonl:3"]


def test_skipped_rows_are_counted_and_the_first_five_named() -> None:
    bad = [{"prompt": "q", "response": ""}] * 6
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*bad, pair("1")]) + "nonsense\n")
    records, report = load("a.jsonl", on_bad_row="skip")
    source = report.sources[0]
    assert [record.where for record in records[0]] == ["a.jsonl:7"]
    assert (source.rows_read, source.rows_kept, source.rows_skipped) == (8, 1, 7)
    assert source.reasons == [f'a.jsonl:{line}: field "response": the answer is empty' for line in range(1, 6)]


def test_a_source_without_a_usable_row_is_an_error() -> None:
    error = refusal(save("a.jsonl", {"x": 1}, {"x": 2}), on_bad_row="skip")
    assert error.message == (
        "a.jsonl: none of its 2 rows can be used for sft; the first: "
        "a.jsonl:1: the row fits no sft format; its fields are x"
    )


def test_a_fault_of_the_whole_file_is_never_skipped() -> None:
    Path("a.jsonl").write_bytes(json.dumps(pair("1")).encode() + b"\n" + '{"prompt": "你好"}\n'.encode("gb18030"))
    error = refusal("a.jsonl", on_bad_row="skip")
    assert "a.jsonl:2: not UTF-8" in error.message
    assert "--on-bad-row" not in error.hint


def test_stages_make_their_own_records() -> None:
    name = save("a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1})
    preference = load_records([name], "rm", on_bad_row="error")[0][0][0]
    prompt = load_records([name], "ppo", on_bad_row="error")[0][0][0]
    assert (type(preference).__name__, type(prompt).__name__) == ("PreferenceRecord", "PromptRecord")


# --- where a source is ------------------------------------------------------------------------------------------------


def test_a_path_comes_before_a_name_and_a_name_before_the_hub(hub: list[tuple[str, str]]) -> None:
    save("listed.jsonl", pair("1"))
    Path("datasets.yaml").write_text("us/rows: listed.jsonl\n")
    assert wheres("us/rows") == ["listed.jsonl:1"]
    save("us/rows", pair("2"))
    assert wheres("us/rows") == ["us/rows:1"]
    assert hub == []


def test_names_are_read_from_the_given_file_and_count_from_its_folder() -> None:
    save("lists/data/a.jsonl", pair("1"))
    Path("lists/names.yaml").write_text("short: data/a.jsonl\nlong:\n  path: data/a.jsonl\n")
    Path("datasets.yaml").write_text("short: missing.jsonl\n")
    for name in ("short", "long=2"):
        assert wheres(name, names_file=Path("lists/names.yaml")) == ["lists/data/a.jsonl:1"]


def test_a_name_may_stand_for_a_hub_data_set(hub: list[tuple[str, str]]) -> None:
    Path("datasets.yaml").write_text("ours: {path: us/rows, split: validation}\nalso: us/rows\n")
    assert wheres("ours", on_bad_row="skip") == ["us/rows:validation: row 1"]
    assert wheres("also", on_bad_row="skip") == ["us/rows: row 1"]
    assert hub == [("us/rows", "validation"), ("us/rows", "train")]


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("ours: [", "datasets.yaml:2: not valid YAML: expected the node content"),
        ("- ours\n", "datasets.yaml: not a mapping of names to data sets"),
        ("ours: 3\n", 'datasets.yaml: entry "ours" has no path'),
        ("ours: {split: train}\n", 'datasets.yaml: entry "ours" has no path'),
        ("ours: {path: a.jsonl, weight: 2}\n", 'datasets.yaml: entry "ours" has the unknown key "weight"'),
        ("ours: {path: us/rows, split: 3}\n", 'datasets.yaml: entry "ours" has a split that is no text'),
        ("ours: {path: a.jsonl, split: test}\n", 'datasets.yaml: entry "ours" has a split, but a.jsonl is local'),
        ("ours: {path: us/rows, config: [en]}\n", 'datasets.yaml: entry "ours" has a config that is no text'),
        ("ours: {path: a.jsonl, config: en}\n", 'datasets.yaml: entry "ours" has a config, but a.jsonl is local'),
        ("ours: {path: us/rows/a, config: b}\n", 'datasets.yaml: entry "ours" names two configs, a and b'),
        ("ours: a.jsonl\nother: a.jsonl\nours: b.jsonl\n", "datasets.yaml:3: not valid YAML: 'ours' stands twice"),
        ("ours: {path: us/rows:a, split: b}\n", 'datasets.yaml: entry "ours" names two splits, a and b'),
        ("ours: gone.jsonl\n", 'datasets.yaml: entry "ours": gone.jsonl: no such file or folder'),
        ("ours: gone\n", 'datasets.yaml: entry "ours": gone: no such file or folder'),
    ],
)
def test_faults_of_the_names_file(listing: str, expected: str) -> None:
    save("a.jsonl", pair("1"))
    Path("datasets.yaml").write_text(listing + "\n" if listing.endswith("[") else listing)
    assert refusal("ours").message.startswith(expected)


def test_a_missing_names_file_is_an_error_only_when_asked_for() -> None:
    assert refusal("ours", names_file=Path("names.yaml")).message == "names.yaml: no such file or folder"


def test_an_unknown_name_shows_the_names_near_it() -> None:
    Path("datasets.yaml").write_text("alpaca_zh: a.jsonl\nother: b.jsonl\n")
    error = refusal("alpaca-zh")
    assert error.message == '"alpaca-zh" is no file, no name in datasets.yaml and no hub id (owner/name)'
    assert error.hint == "near it in datasets.yaml: alpaca_zh"


@pytest.mark.parametrize("spec", ["owner/rows.jsonl", "./owner/rows", "/nowhere/rows", "owner/rows.csv.gz=2"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(hub: list[tuple[str, str]], spec: str) -> None:
    assert "no such file" in refusal(spec).message
    assert hub == []


def test_hub_rows_are_named_by_number(hub: list[tuple[str, str]]) -> None:
    error = refusal("us/rows:test[:2]")
    assert error.message == 'us/rows:test[:2]: row 2: field "response": the number 2 where one answer is needed'
    assert hub == [("us/rows", "test[:2]")]


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("us/many/20231101.zh", ("us/many/20231101.zh", "train")),
        ("us/many/zh:test[10%:20%]=0.5", ("us/many/zh", "test[10%:20%]")),
        ("listed", ("us/many/en", "test")),
        ("short", ("us/many/en", "train")),
    ],
)
def test_a_configuration_of_a_hub_data_set(hub: list[tuple[str, str]], spec: str, asked: tuple[str, str]) -> None:
    Path("datasets.yaml").write_text("listed: {path: us/many, config: en, split: test}\nshort: us/many/en\n")
    (place,) = wheres(spec)
    assert hub == [asked]
    assert place == (asked[0] if asked[1] == "train" else ":".join(asked)) + ": row 1"


def test_a_missing_configuration_is_told_with_those_there_are(hub: list[tuple[str, str]]) -> None:
    error = refusal("us/many")
    assert error.message.endswith(
        "failed: ValueError: Config name is missing. Please pick one among the available configs: ['en', 'zh']"
    )
    assert error.hint == "name one of its configurations: us/many/CONFIGURATION"


@pytest.mark.parametrize("endpoint", [None, "https://mirror.example"])
def test_a_hub_failure_says_which_hub_was_asked(
    hub: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, endpoint: str | None
) -> None:
    if endpoint is None:
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
    else:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    error = refusal("them/rows")
    assert error.message == (
        f'"them/rows" (split "train") is no local path, and loading it from {endpoint or "https://huggingface.co"} '
        "failed: FileNotFoundError: Dataset 'them/rows' doesn't exist on the Hub"
    )
    assert error.hint == "give a local file or folder, or ask another hub with --hf-endpoint URL"


def test_local_files_do_not_import_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would now fail
    assert wheres(save("a.jsonl", pair("1"))) == ["a.jsonl:1"]


# --- mixing -----------------------------------------------------------------------------------------------------------


def test_weight_one_keeps_all_rows_in_order() -> None:
    assert list(mix([[3, 1, 2], [9, 8]], [1.0, 1.0], seed=0)) == [3, 1, 2, 9, 8]


def test_whole_copies_then_a_sample_without_replacement() -> None:
    rows = list(range(10))
    mixed = mix([rows, [99]], [2.3, 1.0], seed=5)
    assert mixed[:20] == [*rows, *rows]
    assert mixed[23:] == [99]
    sample = mixed[20:23]
    assert sample == sorted(set(sample))
    assert Counter(mixed).most_common(1)[0][1] == 3


def test_a_fraction_is_a_seeded_sample_in_order() -> None:
    rows = list(range(100))
    drawn = list(mix([rows], [0.25], seed=1))
    assert len(drawn) == 25
    assert drawn == sorted(set(drawn))
    assert drawn == list(mix([rows], [0.25], seed=1))
    assert drawn != list(mix([rows], [0.25], seed=2))
    assert drawn != rows[:25]


def test_the_draw_of_a_source_does_not_depend_on_the_others() -> None:
    rows = list(range(100))
    assert mix([[0] * 7, rows], [0.5, 0.2], seed=3)[-20:] == list(mix([[], rows], [1.0, 0.2], seed=3))


def test_mix_needs_a_weight_for_each_source() -> None:
    with pytest.raises(ValueError, match="zip"):
        mix([[1], [2]], [1.0], seed=0)


# --- what a source is for ---------------------------------------------------------------------------------------------


def test_the_stage_is_that_of_most_rows(hub: list[tuple[str, str]]) -> None:
    prompts = [{"prompt": f"q{i}"} for i in range(3)]
    assert detect_stage(save("few.jsonl", *prompts[:2], *[pair(str(i)) for i in range(3)]) + "=0.5") == "sft"
    assert detect_stage(save("more.jsonl", pair("1"), *prompts)) == "ppo"
    assert detect_stage(save("ranked.jsonl", {"prompt": "q", "chosen": "a", "rejected": "a"})) == "rm"
    assert detect_stage("us/rows") == "sft"
    Path("broken.jsonl").write_text('{"prompt": "q", "response": "a"}\n{"prompt": q}\n', encoding="utf-8")
    assert detect_stage("broken.jsonl") == "sft"


def test_rows_of_no_stage_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        detect_stage(save("odd.jsonl", {"title": "t", "body": "b"}))
    assert caught.value.message == "odd.jsonl: its rows fit no stage; the fields of the first are title, body"
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        detect_stage("nothing.jsonl")


def test_a_last_user_turn_that_is_left_out_is_told() -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    rows = [{"messages": turns[:2]}, {"messages": turns}, {"conversations": turns}, {"messages": turns[2:]}]
    labelled = [row | {"label": True} for row in rows]
    for stage, given in (("sft", rows), ("kto", labelled), ("score", rows)):
        groups, report = load_records([save(f"{stage}.jsonl", *given)], stage, on_bad_row="skip")  # type: ignore[arg-type]
        (source,) = report.sources
        assert (len(groups[0]), source.rows_skipped) == (3, 1)
        assert source.sentences() == [
            f"2 rows: the last user turn is left out, since no answer follows it (first: {stage}.jsonl:2)"
        ]
    # Here it is what the rows are for.
    for stage, given in (("ppo", rows[1:]), ("rm", [row | {"chosen": "a", "rejected": "b"} for row in rows[1:]])):
        _, report = load_records([save("other.jsonl", *given)], stage, on_bad_row="error")  # type: ignore[arg-type]
        assert report.sources[0].sentences() == []


def test_empty_answers_are_counted_apart() -> None:
    rows = [{"prompt": "q", "response": text} for text in ("a", "", "b", " ", None)]
    _, report = load(save("rows.jsonl", *rows), on_bad_row="skip")
    (source,) = report.sources
    assert (source.rows_kept, source.rows_skipped, source.empty_answers.count) == (2, 3, 2)
    assert source.empty_answers.first == ["rows.jsonl:2", "rows.jsonl:4"]
    assert source.equal_answers.count == 0


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("stage", "row", "field"),
    [
        ("sft", {"prompt": "q", "input": "x", "response": "a"}, "input"),
        ("kto", {"question": "q", "input": "x", "answer": "a", "label": True}, "input"),
        ("rm", {"prompt": "q", "input": "x", "chosen": "a", "rejected": "b"}, "input"),
        ("score", {"query": "q", "input": "x", "response": "a"}, "input"),
        ("sft", {"messages": TURNS, "input": "x"}, "input"),
        ("score", {"conversations": TURNS, "input": ["x"]}, "input"),
        ("rm", {"chosen": TURNS, "rejected": [TURNS[0], TURNS[0] | {"role": "assistant"}], "input": "x"}, "input"),
        ("sft", {"question": "q", "answer": "a", "instruction": "i", "input": "x"}, "input"),
        ("sft", {"prompt": "q", "text": "t"}, "prompt"),
        # Used, empty, or known to stand in the prompt.
        ("sft", {"instruction": "q", "input": "x", "output": "a"}, ""),
        ("sft", {"prompt": "q", "input": " ", "response": "a"}, ""),
        ("rm", {"prompt": "q x", "instruction": "q", "input": "x", "chosen": "a", "rejected": "b"}, ""),
        ("sft", {"instruction": "q", "output": "a", "text": "t"}, ""),
        ("sft", {"text": "t"}, ""),
    ],
)
def test_a_field_of_another_format_that_is_not_used_is_told(stage: Any, row: dict[str, Any], field: str) -> None:
    _, report = load_records([save("a.jsonl", row)], stage, on_bad_row="error")
    said = report.sources[0].sentences()
    assert [sentence.startswith(f'1 rows: "{field}" is not used: ') for sentence in said] == [True] * bool(field)
