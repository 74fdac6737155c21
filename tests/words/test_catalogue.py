"""A finished text is known again by the fixed parts of the message that it was made from."""

from __future__ import annotations

import time

import pytest

from rlhfkit.runtime.screen import Screen
from rlhfkit.words import speaking
from rlhfkit.words.catalogue import Catalogue, Entry

CATALOGUE = Catalogue(
    Entry(english, chinese)
    for english, chinese in {
        "the row has no prompt": "这一行没有提示",
        "{path}: no such file or folder": "{path}：没有这个文件或目录",
        "{path}: no such file; its folder {folder} does not exist either": "{path}：目录 {folder} 里没有它",
        "{count} in the configuration:\n{faults}": "配置中有 {count}：\n{faults}",
        "{n} faults": "{n} 处错误",
        "{message} (found {found})": "{message}（实为 {found}）",
        "input should be less than {bound}": "应小于 {bound}",
        "read {name}: {rows} rows{skipped}{more}": "读取 {name}：{rows} 行{skipped}{more}",
        ", {n} skipped (first: {reason})": "，略过 {n} 行（第一处：{reason}）",
        ", token rows from the cache": "，取自缓存",
        "no {name}": "没有 {name}",
        "an object with {fields}": "含有 {fields} 的对象",
        "{path}: an object with several lists: {lists}": "{path}：对象里有多个列表：{lists}",
        "python {path}/a.py {path} to join": "用 python {path}/a.py {path} 合并",
        "{quantize} weights cannot be trained": "{quantize} 权重不能训练",
        "check the path": "请检查路径",
        "found": "发现",
    }.items()
)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("the row has no prompt", "这一行没有提示"),
        ("a b.json: no such file or folder", "a b.json：没有这个文件或目录"),
        # The entry with the most fixed text, not the first that fits.
        ("x: no such file; its folder y does not exist either", "x：目录 y 里没有它"),
        ("x: an object with several lists: a, b", "x：对象里有多个列表：a, b"),
        # What stands in a place is translated where it is a message.
        (
            "read a: 5 rows, 2 skipped (first: a:1: the row has no prompt)",
            "读取 a：5 行，略过 2 行（第一处：a:1：这一行没有提示）",
        ),
        # Two endings in two places beside each other.
        (
            "read a: 5 rows, 2 skipped (first: b), token rows from the cache",
            "读取 a：5 行，略过 2 行（第一处：b），取自缓存",
        ),
        ("read a: 5 rows", "读取 a：5 行"),
        # No entry of its own: where, colon, message.
        ("rows.jsonl:3: the row has no prompt", "rows.jsonl:3：这一行没有提示"),
        ("check the path; the row has no prompt", "请检查路径；这一行没有提示"),
        ("model.quantize: 4bit weights cannot be trained", "model.quantize：4bit 权重不能训练"),
        # Each line for itself.
        (
            "2 faults in the configuration:\n  a: input should be less than 1 (found 2)\n  b: x (found 'y')",
            "配置中有 2 处错误：\n  a：应小于 1（实为 2）\n  b：x（实为 'y'）",
        ),
        # The same place twice holds the same text.
        ("python a b/a.py a b to join", "用 python a b/a.py a b 合并"),
        # Little fixed text: one word in its place, so that other people's sentences stay whole.
        ("no tokenizer.json", "没有 tokenizer.json"),
        ("no module named x", "no module named x"),
        ("  the row has no prompt", "  这一行没有提示"),
        ("found", "发现"),
        # A single word inside a message is a name.
        ("found: no such file or folder", "found：没有这个文件或目录"),
        ("check the path, found", "请检查路径，found"),
        ("something of torch's: nobody knows", "something of torch's: nobody knows"),
        ("12 %", "12 %"),
        ("", ""),
    ],
)
def test_texts(english: str, chinese: str) -> None:
    assert CATALOGUE.translate(english) == chinese


def test_a_translated_text_stays() -> None:
    for english in ("the row has no prompt", "x: no such file or folder", "rows.jsonl:3: the row has no prompt"):
        chinese = CATALOGUE.translate(english)
        assert CATALOGUE.translate(chinese) == chinese


def test_lines_of_a_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put together of parts that are translated one by one: what stands in the middle is free text."""
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 10)).__next__)
    with speaking("zh"):
        screen = Screen()
        with screen.counting("tokenising training rows of a b.jsonl", 0) as count:
            count(1234)
        with screen.steps("sft", 10, 0):
            screen.step(5, 10, {"loss": 0.5, "lr": 1e-3}, ("loss", "lr"), speak=True)
        screen.line("a b.json: no such file or folder")
    assert capsys.readouterr().err.splitlines() == [
        "把 a b.jsonl 的training行变成 token：1,234，用时 20.0 s",
        "第 5/10 步  loss 0.5  lr 0.001  剩余 10 s",
        "a b.json：没有这个文件或目录",
    ]
