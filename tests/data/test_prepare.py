"""Sources to token rows: the same rows however they are made, found again exactly as long as nothing has changed."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from chat_tokenizers import random_conversations

from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.data import prepare
from rlhfkit.data.batch import TokenRow
from rlhfkit.data.parse import Stage
from rlhfkit.data.prepare import Recipe, prepare_prompts, prepare_rows
from rlhfkit.data.sources import OnBad, load_records, locate
from rlhfkit.data.store import Store, cache_folder
from rlhfkit.data.tokenize import PairRow, tokenize_pairs, tokenize_prompts, tokenize_sft
from rlhfkit.errors import DataError, TemplateError
from rlhfkit.families.conformance import byte_tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LIMIT = 120


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with a cache of its own, and stretches so short that a few rows fill several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHFKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "STRETCH", 7)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(SPECIALS, eos="<|im_end|>"), load_template("chatml"))


@pytest.fixture(params=["one process", "several processes"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    several = request.param == "several processes"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2} if several else {0})
    return several


def dicts(turns: Sequence[Any]) -> list[dict[str, str]]:
    return [turn.as_dict() for turn in turns]


def save(name: str, rows: Sequence[Any]) -> str:
    Path(name).write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return name


def sft_rows(count: int = 60) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"prompt": dicts(turns), "response": f"Fine, 你好 {i} " * (i % 5 + 1)}
        for i, turns in enumerate(random_conversations(3, count))
    ]
    rows[9] = {"text": "plain text of which every token is learned, however long it may be"}
    return rows


def pairs(count: int = 30) -> list[dict[str, Any]]:
    return [
        {"prompt": dicts(turns), "answers": ["yes " * (i % 4 + 1), "no", f"maybe {i}"][: 2 + i % 2], "margin": i / 7}
        for i, turns in enumerate(random_conversations(4, count))
    ]


@contextmanager
def counting(expected: int) -> Iterator[Any]:
    yield lambda more: None


def make(
    name: str,
    encoder: ChatEncoder,
    *,
    stage: Stage = "sft",
    limit: int = LIMIT,
    on_bad_row: OnBad = "error",
    **own: Any,
) -> Store:
    said: list[str] = own.get("said", [])
    return prepare_rows(name, locate(name), Recipe(stage, encoder, limit, on_bad_row), counting, said.append)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, TokenRow):
        return bool(np.array_equal(found.ids, wanted.ids) and np.array_equal(found.supervised, wanted.supervised))
    assert isinstance(wanted, PairRow)
    arrays = zip([found.prompt, *found.answers], [wanted.prompt, *wanted.answers], strict=True)
    return found.margin == wanted.margin and all(np.array_equal(a, b) for a, b in arrays)


# -- the same rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [60, LIMIT])
def test_sft_rows_are_those_of_the_records(encoder: ChatEncoder, processes: bool, limit: int) -> None:
    name = save("a.jsonl", sft_rows())
    wanted, report = tokenize_sft(load_records([name], "sft", on_bad_row="error")[0][0], encoder, limit)
    store = make(name, encoder, limit=limit)
    assert len(store) == len(wanted)
    assert all(map(same, store, wanted))
    assert store.tokens == report
    assert (store.source.name, store.source.rows_kept, store.source.rows_skipped) == (name, 60, 0)
    if limit == 60:
        assert report.truncated
        assert report.left_out
        assert (report.split, report.pieces) == (1, 2)
    order = np.random.default_rng(0).permutation(len(wanted))
    assert all(same(store[i], wanted[i]) for i in order)
    assert all(map(same, store[3:20:4], wanted[3:20:4]))
    with pytest.raises(IndexError):
        store[len(wanted)]


def test_pairs_are_those_of_the_records(encoder: ChatEncoder, processes: bool) -> None:
    name = save("a.jsonl", pairs())
    wanted, report = tokenize_pairs(load_records([name], "rm", on_bad_row="error")[0][0], encoder, 80)
    store = make(name, encoder, stage="rm", limit=80)
    assert all(map(same, store, wanted))
    assert (len(store), store.tokens) == (len(wanted), report)


def test_prompts_are_those_of_the_records(encoder: ChatEncoder, processes: bool) -> None:
    name = save("a.jsonl", [{"prompt": dicts(turns), "n": i} for i, turns in enumerate(random_conversations(5, 40))])
    wanted, report = tokenize_prompts(load_records([name], "ppo", on_bad_row="error")[0][0], encoder, 100)
    rows, source, tokens = prepare_prompts(name, locate(name), Recipe("ppo", encoder, 100, "error"), counting)
    assert [row.record for row in rows] == [row.record for row in wanted]
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(rows, wanted, strict=True))
    assert (source.rows_kept, tokens) == (40, report)
    assert tokens.left_out


def test_skipped_rows_are_told_in_their_order(encoder: ChatEncoder, processes: bool) -> None:
    rows: list[Any] = sft_rows()
    rows[2], rows[8], rows[30], rows[50] = "{broken", {"prompt": "q", "response": ""}, "[]", {"x": 1}
    store = make(save("a.jsonl", rows), encoder, on_bad_row="skip")
    assert (store.source.rows_kept, store.source.rows_skipped) == (56, 4)
    assert [reason.split(": ")[0] for reason in store.source.reasons] == [f"a.jsonl:{n}" for n in (3, 9, 31, 51)]
    assert store.source.empty_answers.first == ["a.jsonl:9"]


@pytest.mark.parametrize(
    ("faults", "first"),
    [
        ({40: {"prompt": "q", "response": ""}, 45: "{broken"}, 'a.jsonl:41: field "response": the answer is empty'),
        ({40: "{broken", 41: {"prompt": "q"}}, "a.jsonl:41: not valid JSON at column 2"),
        ({50: {"prompt": "q"}, 52: "\udcff"}, "a.jsonl:51: the row fits no sft format"),
        ({52: "\udcff"}, "a.jsonl:53: not UTF-8: byte 0xff"),
    ],
)
def test_the_first_fault_in_the_file_is_the_one_told(
    encoder: ChatEncoder, processes: bool, faults: dict[int, Any], first: str
) -> None:
    rows: list[Any] = sft_rows()
    for number, row in faults.items():
        rows[number] = row
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    Path("a.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        make("a.jsonl", encoder)
    assert caught.value.message.startswith(first)
    assert not list(cache_folder().rglob("*.arrow"))


def without_system() -> ChatEncoder:
    """With a template that refuses system turns."""
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
        "[{{ m.content }}]{{ eos_token }}{% endfor %}"
    )
    return ChatEncoder(byte_tokenizer(SPECIALS, eos="<|im_end|>"), Template("own", source))


REFUSED = {  # rows of each stage, the same for all of them but for the system turn
    "sft": {"prompt": "q", "response": "a"},
    "rm": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "kto": {"prompt": "q", "completion": "a", "label": True},
    "ppo": {"prompt": "q"},
}


@pytest.mark.parametrize("stage", REFUSED)
def test_a_row_that_the_template_refuses_is_named(processes: bool, stage: Stage) -> None:
    rows = [REFUSED[stage] | ({"system": "s"} if i == 35 else {}) for i in range(40)]
    recipe = Recipe(stage, without_system(), LIMIT, "error")
    prepared = prepare_prompts if stage == "ppo" else partial(prepare_rows, say=print)
    with pytest.raises(
        TemplateError, match=r"^a\.jsonl:36: the template 'own' refuses .*no system turn here"
    ) as caught:
        prepared(save("a.jsonl", rows), locate("a.jsonl"), recipe, counting)
    assert caught.value.hint == (
        "change the row, or choose another format with --template; or leave such rows out with --on-bad-row skip"
    )


@pytest.mark.parametrize("stage", REFUSED)
def test_rows_that_the_template_refuses_are_skipped_and_counted(processes: bool, stage: Stage) -> None:
    rows: list[Any] = [REFUSED[stage] | ({"system": "s"} if i in (5, 35) else {}) for i in range(40)]
    rows[20] = {"x": 1}
    name = save("a.jsonl", rows)
    recipe = Recipe(stage, without_system(), LIMIT, "skip")
    if stage == "ppo":
        made, source, tokens = prepare_prompts(name, locate(name), recipe, counting)
    else:
        made = prepare_rows(name, locate(name), recipe, counting, print)  # type: ignore[assignment]
        source, tokens = made.source, made.tokens  # type: ignore[attr-defined]
    assert (len(made), source.rows_kept, source.rows_skipped, tokens.rows) == (37, 37, 3, 37)
    assert [reason.split(": ")[0] for reason in source.reasons] == ["a.jsonl:6", "a.jsonl:21", "a.jsonl:36"]
    assert source.reasons[0].endswith("no system turn here")


def test_no_row_that_the_template_takes_is_an_error() -> None:
    name = save("a.jsonl", [{"prompt": "q", "response": "a", "system": "s"}] * 3)
    with pytest.raises(DataError, match=r"none of its 3 rows can be used for sft; the first: a\.jsonl:1: the template"):
        make(name, without_system(), on_bad_row="skip")


def test_a_worker_that_is_killed_is_told(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    first, row = os.getpid(), prepare.make_rows

    def die(*given: Any) -> Any:
        return row(*given) if os.getpid() == first else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepare, "make_rows", die)
    with pytest.raises(DataError, match="was killed, most likely for want of memory"):
        make(save("a.jsonl", sft_rows()), encoder)


def test_remarks_are_counted_and_kept_with_the_rows(encoder: ChatEncoder, processes: bool) -> None:
    lines = ["prompt,response", *(f"q{i},a" for i in range(40)), ","]
    lines[3] = ","
    Path("a.csv").write_text("\n".join(lines) + "\n")
    for cached in (False, True):
        store = make("a.csv", encoder)
        assert (store.cached, len(store), store.source.rows_kept, store.source.rows_skipped) == (cached, 39, 39, 0)
        assert store.source.sentences() == ["2 rows: left out, since all cells are empty (first: a.csv:4)"]


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_rows_are_found_again(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save("a.jsonl", sft_rows())
    made = make(name, encoder, limit=60)
    monkeypatch.setattr(prepare, "make_rows", None)  # calling it would now fail
    again = make(name, encoder, limit=60)
    assert (made.cached, again.cached) == (False, True)
    assert all(map(same, again, made))
    assert (again.source, again.tokens, again.digest) == (made.source, made.tokens, made.digest)
    assert make(name, ChatEncoder(byte_tokenizer(SPECIALS, eos="<|im_end|>"), load_template("chatml")), limit=60).cached


def other_template(_: ChatEncoder) -> ChatEncoder:
    chatml = load_template("chatml")
    source = chatml.source.replace("user", "User") + "{# other #}"
    return ChatEncoder(
        byte_tokenizer(SPECIALS, eos="<|im_end|>"), Template("chatml", source, chatml.bodies, chatml.controls)
    )


def other_tokenizer(_: ChatEncoder) -> ChatEncoder:
    return ChatEncoder(byte_tokenizer((*SPECIALS, "<new>"), eos="<|im_end|>"), load_template("chatml"))


@pytest.mark.parametrize(
    "change",
    [
        {"limit": LIMIT - 1},
        {"on_bad_row": "skip"},
        {"stage": "rm"},
        {"encoder": other_template},
        {"encoder": other_tokenizer},
        {"content": '{"prompt": "q", "answers": ["a", "b"], "response": "one more"}\n'},
        {"name": "b.jsonl"},
        {"code": "of another version"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_rows_makes_them_anew(
    encoder: ChatEncoder, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save("a.jsonl", [{"prompt": "q", "answers": ["a", "b"], "response": "c"}] * 3)
    make(name, encoder)
    if content := change.pop("content", None):
        Path(name).write_text(Path(name).read_text() + content)
    if code := change.pop("code", None):
        monkeypatch.setattr(prepare, "_code", lambda: code)
    if renamed := change.pop("name", None):
        name = str(Path(name).rename(renamed))
    encoder = change.pop("encoder", lambda same: same)(encoder)
    assert not make(name, encoder, **change).cached
    assert make(name, encoder, **change).cached


def test_a_folder_is_known_by_all_its_files(encoder: ChatEncoder) -> None:
    Path("rows").mkdir()
    save("rows/a.jsonl", sft_rows(10))
    assert not make("rows", encoder).cached
    assert make("rows", encoder).cached
    Path("rows/b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "response": "a"}\n'))
    assert len(make("rows", encoder)) == 11


@pytest.mark.parametrize("damage", ["cut short", "one byte", "no account", "half an account", "other account"])
def test_a_damaged_entry_is_made_again(encoder: ChatEncoder, damage: str) -> None:
    name = save("a.jsonl", sft_rows())
    made = make(name, encoder)
    rows, account = made.folder / "rows.arrow", made.folder / "account.json"
    content = rows.read_bytes()
    wanted = [(row.ids, row.supervised) for row in made]
    if damage == "cut short":
        rows.write_bytes(content[: len(content) // 2])
    elif damage == "one byte":
        place = content.index(made[30].ids.tobytes()) + 5
        rows.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "no account":
        account.unlink()
    elif damage == "half an account":
        account.write_text(account.read_text()[:40])
    else:
        account.write_text("{}")
    said: list[str] = []
    again = make(name, encoder, said=said)
    assert said == [f"{made.folder} is damaged and is made again"]
    assert not again.cached
    assert all(same(row, TokenRow(*pair)) for row, pair in zip(again, wanted, strict=True))
    assert make(name, encoder).cached


def test_what_a_killed_run_left_is_no_entry(encoder: ChatEncoder) -> None:
    name = save("a.jsonl", sft_rows())
    made = make(name, encoder)
    made.folder.rename(made.folder.with_name(f".{made.folder.name}.partial"))
    assert not make(name, encoder).cached
    assert [path.name for path in cache_folder().rglob("rows.arrow")] == ["rows.arrow"]


def test_an_unusable_cache_is_told_and_done_without(encoder: ChatEncoder) -> None:
    name = save("a.jsonl", sft_rows())
    cache_folder().write_text("a file")
    said: list[str] = []
    store = make(name, encoder, said=said)
    assert len(store) == 60
    assert said == [f"the cache {cache_folder() / 'rows'} cannot be used (Not a directory): "
                    "token rows are kept for this run alone"]  # fmt: skip
    folder = store.folder
    assert folder.exists()
    del store
    assert not folder.exists()


def test_two_runs_make_the_same_rows_once(encoder: ChatEncoder) -> None:
    name = save("a.jsonl", sft_rows())
    key = Recipe("sft", encoder, LIMIT, "error").key(name, locate(name).content().digest or "")
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True)
    said: list[str] = []
    with (folder / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: said.append(str(len(make(name, encoder, said=said)))))
        other.start()
        while not said:
            time.sleep(0.01)
        assert said == ["another process makes token rows of the same data: waiting for it"]
    other.join(30)
    assert said[1:] == ["60"]


# -- processes and memory ----------------------------------------------------------------------------------------------


ENDLESS = """
import os, sys, time
from functools import partial
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.data import prepare
from rlhfkit.data.sources import locate
from rlhfkit.families.conformance import byte_tokenizer
from rlhfkit.runtime.screen import Screen
os.sched_getaffinity = lambda _: {0, 1}
first, row = os.getpid(), prepare.make_rows
def slow(*given):
    if os.getpid() != first:
        time.sleep(0.002)  # twenty seconds in all, and one for the stretch that a process has begun
    return row(*given)
prepare.make_rows = slow
encoder = ChatEncoder(byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), load_template("chatml"))
recipe = prepare.Recipe("sft", encoder, 64, "error")
prepare.prepare_rows("a.jsonl", locate("a.jsonl"), recipe, partial(Screen().counting, "rows"), print)
"""


@pytest.mark.parametrize(
    "number",
    [*(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL],
)
def test_no_process_outlives_the_first(number: signal.Signals) -> None:
    save("a.jsonl", [{"text": "words"}] * 20_000)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(workers := psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all of them
    else:
        process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors  # the first process's; the command line turns it into a word
        assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not list(cache_folder().rglob("account.json"))


MEMORY = """
import json, sys
from functools import partial
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.data.prepare import Recipe, prepare_rows
from rlhfkit.data.sources import locate
from rlhfkit.families.conformance import byte_tokenizer
from rlhfkit.runtime.screen import Screen
encoder = ChatEncoder(byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), load_template("chatml"))
recipe = Recipe("sft", encoder, 512, "error")
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for name in sys.argv[1:]:
    store = prepare_rows(name, locate(name), recipe, partial(Screen().counting, "rows"), print)
    print(len(store), peak())
"""


def test_memory_does_not_grow_with_the_rows() -> None:
    """As records and token rows in memory, the many take 30 MiB more than the few."""
    for name, rows in (("few.jsonl", 2_000), ("many.jsonl", 20_000)):
        save(name, [{"text": f"{i} " + "words " * 20} for i in range(rows)])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "few.jsonl", "many.jsonl", "many.jsonl"],
        capture_output=True,
        text=True,
        check=True,
    )
    few, many, again = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert (few[0], many[0], again[0]) == (2_000, 20_000, 20_000)
    assert many[1] - few[1] < 16 * 1024, done.stdout  # KiB
    assert again[1] - many[1] < 4 * 1024, done.stdout
