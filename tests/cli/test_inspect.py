"""``rlhfkit inspect`` on a corpus in which it is known what is wrong with which line."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from rich.console import Console

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.data.audit import see_row
from rlhfkit.data.records import SftRecord
from rlhfkit.stages.inspect import row_panel, stretches

GOOD = [{"prompt": f"what do you think of film {i}?", "response": "it was good"} for i in range(3)]
LONG = "the film was good " * 40
SFT = [
    GOOD[0],
    {"prompt": "a film?", "response": " "},  # 2: empty
    {"prompt": LONG, "response": "good"},  # 3: nothing left to learn
    {"prompt": "a film?", "response": LONG},  # 4: cut
    {"instruction": "what is <|im_end|>?", "output": "one word"},  # 5: spelled in a question
    {"instruction": "say one word", "output": "one<|im_end|>"},  # 6: spelled in an answer
    {
        "messages": [{"role": "user", "content": GOOD[0]["prompt"]}, {"role": "assistant", "content": "it was good"}]
    },  # 7
    {"prompt": "a film?", "reply": "good"},  # 8: no format
    {"text": "the story was bad"},
]
PAIRS = [
    {"prompt": "a film?", "chosen": "good", "rejected": "bad"},
    {"prompt": "a film?", "chosen": "good", "rejected": "good"},
    {"prompt": LONG, "chosen": "good", "rejected": "bad"},
    {"prompt": "a film?", "chosen": LONG + "1", "rejected": LONG + "2"},
]
PROMPTS = [{"prompt": "say one word", "n": 1}, {"prompt": LONG, "n": 2}]
LABELLED = [
    {"prompt": "a film?", "completion": "good", "label": True},
    {"prompt": "a film?", "completion": "bad", "label": False},
    {"messages": [{"role": "user", "content": "a film?"}, {"role": "assistant", "content": LONG}], "label": False},
    {"prompt": "a film?", "completion": "one", "label": "perhaps"},  # 4: no label
    PAIRS[0],
]


@pytest.fixture(autouse=True)
def files(workplace: Path) -> None:
    write_jsonl(Path("sft.jsonl"), SFT)
    write_jsonl(Path("pairs.jsonl"), PAIRS)
    write_jsonl(Path("prompts.jsonl"), PROMPTS)
    write_jsonl(Path("labelled.jsonl"), LABELLED)
    write_jsonl(Path("good.jsonl"), GOOD)


def inspect(cli: Any, *words: object) -> Any:
    return cli("inspect", *words, "--model", "tiny", "--max-length", "64")


def counts(cli: Any, *words: object) -> dict[str, Any]:
    outcome = inspect(cli, *words, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert isinstance(found, dict)
    return found


def test_sft_counts(cli: Any) -> None:
    found = counts(cli, "sft.jsonl")
    assert found["stage"] == "sft"
    assert {k: v for k, v in found.items() if v and isinstance(v, int)} == {
        "limit": 64,
        "rows": 7,
        "skipped": 2,
        "tokens": found["tokens"],
        "supervised_tokens": found["supervised_tokens"],
        "assistant_turns": 6,
        "turn_ends_learned": 5,
        "empty_answers": 1,
        "nothing_to_learn": 1,
        "truncated": 2,
        "without_eos": 1,
        "special_strings": 2,
        "special_strings_in_answers": 1,
        "duplicates": 1,
    }
    skipped = found["examples"].pop("skipped")
    assert [reason.split(": ")[0] for reason in skipped] == ["sft.jsonl:2", "sft.jsonl:8"]
    assert {key: places for key, places in found["examples"].items() if places} == {
        "empty_answers": ["sft.jsonl:2"],
        "nothing_to_learn": ["sft.jsonl:3"],
        "truncated": ["sft.jsonl:3", "sft.jsonl:4"],
        "without_eos": ["sft.jsonl:4"],
        "special_strings": ["sft.jsonl:5", "sft.jsonl:6"],
        "special_strings_in_answers": ["sft.jsonl:6"],
        "duplicates": ["sft.jsonl:7 (as sft.jsonl:1)"],
    }
    assert sum(rows for _, _, rows in found["lengths"]["histogram"]) == 7


def test_pair_counts(cli: Any) -> None:
    found = counts(cli, "pairs.jsonl")
    assert (found["stage"], found["rows"], found["skipped"]) == ("rm", 3, 1)
    assert found["supervised_tokens"] == 0
    assert found["examples"]["chosen_equals_rejected"] == ["pairs.jsonl:2", "pairs.jsonl:4"]
    assert found["examples"]["truncated"] == ["pairs.jsonl:3", "pairs.jsonl:4"]
    assert found["examples"]["without_eos"] == ["pairs.jsonl:4"]


def test_labelled_counts(cli: Any) -> None:
    found = counts(cli, "labelled.jsonl")
    assert (found["stage"], found["rows"], found["skipped"]) == ("kto", 4, 1)
    assert (found["desirable"], found["undesirable"]) == (2, 3)
    assert found["examples"]["without_eos"] == found["examples"]["truncated"] == ["labelled.jsonl:3"]


@pytest.mark.parametrize(("stage", "like"), [("dpo", "rm"), ("grpo", "ppo"), ("rloo", "ppo")])
def test_stages_through_trl_read_the_same_rows(cli: Any, stage: str, like: str) -> None:
    flags = ("--max-new-tokens", "8") if like == "ppo" else ()
    theirs, ours = (counts(cli, "pairs.jsonl", "--stage", name, *flags) for name in (stage, like))
    assert theirs == {**ours, "stage": stage}
    Path("tune.yaml").write_text(f"stage: {stage}\nmodel: {{path: tiny}}\ndata: {{train: [pairs.jsonl]}}\n")
    shown = cli("inspect", "--config", "tune.yaml", "--max-length", "64", *flags).out
    assert f"{stage} data; " in shown
    assert ("where its score is read" in shown) is False


def test_prompt_counts(cli: Any) -> None:
    found = counts(cli, "prompts.jsonl", "--max-new-tokens", "8")
    assert (found["stage"], found["rows"], found["too_long"], found["limit"]) == ("ppo", 2, 1, 56)
    found = counts(cli, "pairs.jsonl", "--max-new-tokens", "8", "--max-prompt-length", "32")
    assert (found["stage"], found["rows"], found["limit"]) == ("ppo", 4, 32)
    assert found["examples"]["too_long"] == ["pairs.jsonl:3"]


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (GOOD, 0),
        ([*GOOD, GOOD[0]], 0),  # a duplicate
        ([*GOOD, SFT[4]], 0),  # a special token spelled in a question
        *(([*GOOD, SFT[line - 1]], 1) for line in (2, 3, 4, 6, 8)),
        (PAIRS[:1], 0),
        *(([PAIRS[0], row], 1) for row in PAIRS[1:]),
    ],
)
def test_strict(cli: Any, rows: list[dict[str, Any]], code: int) -> None:
    write_jsonl(Path("rows.jsonl"), rows)
    outcome = inspect(cli, "rows.jsonl", "--json", "--strict")
    assert outcome.code == code, outcome.err
    assert bool(json.loads(outcome.out)["hurting"]) == bool(code)
    shown = inspect(cli, "rows.jsonl", "--rows", "0", "--strict")
    assert shown.code == code
    assert ("Would hurt training:" in shown.out) == bool(code)
    assert inspect(cli, "rows.jsonl", "--json").code == 0


def test_json_is_all_there_is_on_stdout(cli: Any) -> None:
    outcome = inspect(cli, "sft.jsonl", "good.jsonl=2", "--json", "--dump", "dump.jsonl")
    found = json.loads(outcome.out)
    assert [source["name"] for source in found["sources"]] == ["sft.jsonl", "good.jsonl"]
    assert [source["weight"] for source in found["sources"]] == [1.0, 2.0]
    assert [source["rows"] for source in found["sources"]] == [7, 3]
    assert found["rows"] == len(Path("dump.jsonl").read_text().splitlines()) == 10
    assert found["tokens"] == sum(source["tokens"] for source in found["sources"])
    # Between the sources, too: the first row of good.jsonl is that of sft.jsonl.
    assert found["duplicates"] == 2


@pytest.mark.parametrize("name", ["sft.jsonl", "pairs.jsonl", "prompts.jsonl", "labelled.jsonl"])
def test_a_dump_is_data_again(cli: Any, name: str) -> None:
    flags = () if name != "prompts.jsonl" else ("--max-new-tokens", "8")
    first = counts(cli, name, "--dump", "dump.jsonl", *flags)
    again = counts(cli, "dump.jsonl", "--stage", first["stage"], *flags)
    for key in (
        "rows",
        "tokens",
        "supervised_tokens",
        "truncated",
        "special_strings",
        "duplicates",
        "too_long",
        "undesirable",
    ):
        assert again[key] == first[key]
    assert again["skipped"] == 0
    rows = [json.loads(line) for line in Path("dump.jsonl").read_text().splitlines()]
    assert rows[0]["where"] == f"{name}:1"


def test_a_dump_is_what_was_parsed(cli: Any) -> None:
    Path("zh.csv").write_text('instruction,input,output\n翻译,"good, morning",早上好\n', encoding="utf-8")
    assert inspect(cli, "zh.csv", "--dump", "dump.jsonl", "--rows", "0").code == 0
    assert Path("dump.jsonl").read_text(encoding="utf-8") == (
        '{"where": "zh.csv:2", "messages": [{"role": "user", "content": "翻译\\ngood, morning"}, '
        '{"role": "assistant", "content": "早上好"}]}\n'
    )


def test_a_dump_replaces_no_data(cli: Any) -> None:
    outcome = inspect(cli, "good.jsonl", "--dump", "sft.jsonl")
    assert outcome.code == 1
    assert "sft.jsonl is there already, and was not written by --dump" in outcome.err
    assert len(Path("sft.jsonl").read_text().splitlines()) == len(SFT)
    os.mkfifo("pipe")
    outcome = inspect(cli, "good.jsonl", "--dump", "pipe")
    assert (outcome.code, Path("pipe").is_fifo()) == (1, True)
    for _ in range(2):  # a dump may be written anew
        assert inspect(cli, "good.jsonl", "--dump", "dump.jsonl", "--rows", "0").code == 0


def test_a_dump_is_whole_or_not_there(cli: Any) -> None:
    before = sorted(Path().iterdir())
    assert inspect(cli, "good.jsonl", "--template", "nothing", "--dump", "dump.jsonl").code == 1
    assert inspect(cli, "good.jsonl", "--dump", "no/such/dump.jsonl").code == 1
    assert sorted(Path().iterdir()) == before


def test_rows_that_the_template_refuses_are_among_the_skipped(cli: Any) -> None:
    write_jsonl(Path("system.jsonl"), [*GOOD, {**GOOD[0], "system": "be brief"}, {"prompt": "a film?"}])
    found = counts(cli, "system.jsonl", "--stage", "sft", "--template", "baichuan")
    assert (found["rows"], found["skipped"], found["refused_by_template"]) == (3, 2, 1)
    assert [reason.split(": ")[0] for reason in found["examples"]["skipped"]] == ["system.jsonl:5", "system.jsonl:4"]
    outcome = inspect(cli, "system.jsonl", "--stage", "sft", "--template", "baichuan", "--dump", "dump.jsonl")
    assert "skipped system.jsonl:4: the template 'baichuan' refuses this conversation" in outcome.out
    assert "4 records are in dump.jsonl" in outcome.out
    write_jsonl(Path("system.jsonl"), [{**GOOD[0], "system": "be brief"}, *GOOD])
    outcome = inspect(cli, "system.jsonl", "--template", "baichuan", "--on-bad-row", "error")
    assert outcome.code == 1
    assert "system.jsonl:1: the template 'baichuan' refuses this conversation" in outcome.err


def test_columns_beyond_json_become_text(cli: Any) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    Path("half.jsonl").write_text('{"prompt": "a film?", "n": "\\ud800"}\n', encoding="utf-8")
    table = {
        "prompt": ["a film?", "评论"],
        "day": [datetime.date(2026, 1, 2), None],
        "scores": [[1.5], [float("nan")]],
    }
    parquet.write_table(pyarrow.table(table), "days.parquet")
    flags = ("--max-new-tokens", "8", "--rows", "0", "--dump")
    assert inspect(cli, "half.jsonl", "days.parquet", *flags, "dump.jsonl").code == 0
    rows = [json.loads(line) for line in Path("dump.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [rows[0]["n"], rows[1]["day"], rows[2]["day"]] == ["\ud800", "2026-01-02", None]
    assert [row["scores"] for row in rows[1:]] == [[1.5], [None]]
    assert rows[2]["prompt"][0]["content"] == "评论"
    assert inspect(cli, "dump.jsonl", *flags, "again.jsonl").code == 0


# -- what it stops at --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            "sft.jsonl --stage rm",
            1,
            "sft.jsonl: none of its 9 rows can be used for rm; the first: sft.jsonl:1: the row",
        ),
        ("pairs.jsonl --stage sft", 1, "none of its 4 rows can be used for sft"),
        ("sft.jsonl --on-bad-row error", 1, 'sft.jsonl:2: field "response": the answer is empty'),
        ("god.jsonl", 1, "god.jsonl: no such file or folder"),
        ("sft.jsonl --stage generate", 2, "there is no stage 'generate' that trains on rows"),
        ("sft.jsonl --stage kto", 1, "none of its 9 rows can be used for kto"),
        ("sft.jsonl --stage sft --max-new-tokens 8", 2, "ppo.max_new_tokens: has no effect on sft rows"),
        (
            "prompts.jsonl --max-new-tokens 64",
            2,
            "data.max_length: 64 leaves no room for a prompt beside 64 new tokens",
        ),
        ("sft.jsonl --on-bad-row maybe", 2, "data.on_bad_row: input should be 'error' or 'skip' (found 'maybe')"),
        (
            "sft.jsonl --stage rm --max-new-tokens 8 --max-prompt-length 9",
            2,
            "ppo.max_prompt_length: has no effect on rm rows\nppo.max_new_tokens: has no effect on rm rows",
        ),
        ("sft.jsonl --json --rows 2", 2, "--rows has no effect with --json"),
        ("sft.jsonl --json --rows 0", 2, "--rows has no effect with --json"),
        ("", 2, "no data is given"),
        ("sft.jsonl=0", 2, 'its weight "0" is not a number above 0'),
        ("--config tune.yaml", 1, "nowhere.jsonl: no such file"),
        ("--config tune.yaml --stage rm", 2, "tune.yaml: this recipe is for stage 'sft', not 'rm'"),
    ],
)
def test_mistakes(cli: Any, words: str, code: int, message: str) -> None:
    Path("tune.yaml").write_text("stage: sft\ndata: {train: [nowhere.jsonl]}\n")
    outcome = inspect(cli, *words.split())
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_the_model_is_needed(cli: Any) -> None:
    outcome = cli("inspect", "sft.jsonl")
    assert outcome.code == 2
    assert "no model is given" in outcome.err
    assert "rlhfkit inspect --help" in outcome.err


def test_no_weight_is_read(cli: Any, tiny_model: Path) -> None:
    Path("bare").mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (Path("bare") / file.name).symlink_to(file)
    outcome = cli("inspect", "good.jsonl", "--model", "bare", "--max-length", "64", "--strict")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("words", ["", "--max-length 513", "--max-length 512"])
def test_what_the_stage_refuses_is_refused_here(cli: Any, words: str) -> None:
    """Of a model with 512 positions. A check in front of a run must not pass where the run would stop."""
    looked = cli("inspect", "good.jsonl", "--model", "tiny", *words.split(), "--strict", "--json")
    trained = cli("sft", "--data", "good.jsonl", "--model", "tiny", *words.split(), "--out", "run", "--plan")
    assert looked.code == trained.code == (2 if words.endswith("513") else 0)
    if looked.code:
        assert "data.max_length: 513 is more than the 512 positions" in looked.err
        assert looked.err == trained.err
    else:
        assert json.loads(looked.out)["limit"] == 512


def test_a_recipe_is_read_as_its_run_reads_it(cli: Any) -> None:
    recipe = "stage: sft\nmodel: {path: tiny}\ndata: {train: [sft.jsonl=3], max_length: 64, on_bad_row: error}\n"
    Path("tune.yaml").write_text(recipe + "lora: {alpha: 4}\n")
    outcome = cli("inspect", "--config", "tune.yaml", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == {**counts(cli, "sft.jsonl=3")}
    other = json.loads(cli("inspect", "good.jsonl", "--config", "tune.yaml", "--max-length", "80", "--json").out)
    assert (other["rows"], other["limit"]) == (3, 80)


# -- the screen --------------------------------------------------------------------------------------------------------


def test_what_is_shown(cli: Any) -> None:
    outcome = inspect(cli, "sft.jsonl", "good.jsonl=2", "--rows", "3")
    assert outcome.code == 0
    shown = outcome.out
    assert "sft data (as the rows look; say otherwise with --stage); rows of at most 64 tokens" in shown
    # One row of each source in turn.
    places = [line.split(" · ")[0].strip("╭─ ") for line in shown.splitlines() if " learned ─" in line]
    assert places == ["sft.jsonl:1", "good.jsonl:1"]
    assert "not used: nothing to learn within 64 tokens" in shown
    assert "⟦it was good<|im_end|>◀⟧" in shown
    for words in (
        'skipped sft.jsonl:2: field "response": the answer is empty',
        "8 ends of turn are learned, in 9 assistant turns",
        "good.jsonl ×2",
        "special-token strings in answers",
        "no row: refused by the template, split into pieces, double BOS",
        "Would hurt training: cannot be used, empty answer, nothing to learn, truncated, no end of turn, special-token",
    ):
        assert words in shown
    assert "beyond the limit" in shown


def test_pairs_and_prompts_are_shown(cli: Any) -> None:
    shown = inspect(cli, "pairs.jsonl", "--stage", "rm").out
    assert shown.index("chosen") < shown.index("⟦good<|im_end|>◀⟧") < shown.index("⟦bad<|im_end|>◀⟧")
    assert "tokens are cut" in shown
    shown = inspect(cli, "labelled.jsonl", "--rows", "2").out
    assert re.search(r"│ desirable .*⟦good<.im_end.>◀⟧.*│ undesirable .*⟦bad<.im_end.>◀⟧", shown, re.DOTALL)
    assert "2 desirable answers, 3 undesirable ones" in shown
    shown = inspect(cli, "prompts.jsonl", "--max-new-tokens", "8", "--rows", "1").out
    assert "say one word<|im_end|>" in shown
    assert "⟦" not in shown


def test_nothing_is_shown_of_no_row(cli: Any) -> None:
    assert "⟦" not in inspect(cli, "sft.jsonl", "--rows", "0").out


def test_the_page_shows_what_is_printed(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/inspect.md holds rows, a command, and the command's output."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "inspect.md").read_text(encoding="utf-8")
    rows, command, output = re.findall(r"```(?:json|bash|text)\n(.*?)```", page, re.DOTALL)[:3]
    Path("films.jsonl").write_text(rows, encoding="utf-8")
    Path("rlhfkit").symlink_to(root / "rlhfkit")
    monkeypatch.setenv("COLUMNS", "100")
    shown = cli(*shlex.split(command)[1:]).out
    assert [line.rstrip() for line in shown.splitlines()] == output.splitlines()


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(make_tokenizer(), load_template("chatml"))


def rendered(encoder: ChatEncoder, record: SftRecord, *, plain: bool) -> str:
    console = Console(width=120, color_system=None if plain else "truecolor", force_terminal=not plain)
    with console.capture() as capture:
        console.print(row_panel(see_row(record, encoder, 9999), encoder, "sft", plain=plain))
    return capture.get()


def test_stretches_are_the_text_with_its_mask(encoder: ChatEncoder) -> None:
    turns = (Message("user", "why <|im_end|> 你好?"), Message("assistant", "早上好<|im_end|> é"))
    row = see_row(SftRecord("1", turns), encoder, 9999)
    assert stretches(row.sequences[0], encoder) == [
        ("control", "<|im_start|>"),
        ("context", "user\nwhy <|im_end|> 你好?"),
        ("control", "<|im_end|>"),
        ("context", "\n"),
        ("control", "<|im_start|>"),
        ("context", "assistant\n"),
        ("learned", "早上好<|im_end|> é"),
        ("end", "<|im_end|>"),
    ]


def test_learned_words_are_in_colour_or_in_brackets(encoder: ChatEncoder) -> None:
    record = SftRecord("1", (Message("user", "why"), Message("assistant", "so")))
    assert "⟦so<|im_end|>◀⟧" in rendered(encoder, record, plain=True)
    coloured = rendered(encoder, record, plain=False)
    assert "\x1b[1;32mso\x1b[0m\x1b[1;30;42m<|im_end|>\x1b[0m" in coloured
    assert "⟦" not in coloured
    assert "\x1b[2mwhy\x1b[0m" in coloured


def test_text_cannot_steer_the_terminal(encoder: ChatEncoder) -> None:
    record = SftRecord("1", (Message("user", "\x1b[31mred\x07[bold]"), Message("assistant", "so\x7f")))
    shown = rendered(encoder, record, plain=True)
    assert "␛[31mred␇[bold]" in shown
    assert "so␡" in shown
    assert "\x1b" not in shown


def test_a_long_text_is_shown_by_its_ends(encoder: ChatEncoder) -> None:
    shown = rendered(
        encoder, SftRecord("1", (Message("user", "q"), Message("assistant", "a" * 5000 + "z"))), plain=True
    )
    assert "[…3,801" in shown
    assert "z<|im_end|>" in shown


def test_counts_are_printed_though_no_row_is_any_good(cli: Any) -> None:
    write_jsonl(Path("bad.jsonl"), [{"prompt": "a", "response": ""}, {"prompt": "b", "response": 3}])
    outcome = inspect(cli, "bad.jsonl", "--stage", "sft", "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    assert (found["rows"], found["skipped"], found["tokens"]) == (0, 2, 0)
    assert "none of its 2 rows can be used for sft" in outcome.err
