"""``--lang``, RLHFKIT_LANG and the locale; help and errors in Chinese, by the real command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import write_jsonl

from rlhfkit import words
from rlhfkit.cli import app
from rlhfkit.errors import ConfigError

Cli = Callable[..., Any]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
# Three words beside each other that are no command line, no path and no list of names are an English sentence.
SENTENCE = re.compile(r"(?<![-/.\w])[A-Za-z][a-z']+(?: [a-z][a-z']*[a-z]){2,}(?![-/.\w])")


@pytest.fixture(autouse=True)
def english_again() -> Iterator[None]:
    from typer import rich_utils

    before = {name: value for name, value in vars(rich_utils).items() if name.isupper()} | {
        "highlighter": rich_utils.highlighter
    }
    yield
    words.choose("en")
    for name, value in before.items():
        setattr(rich_utils, name, value)


def english(text: str) -> list[str]:
    """What reads like an English sentence, command lines and the drawing aside."""
    lines = [re.sub(r"[│╭╮╰╯─┃┏┓┗┛┡┩┠┨━┳┻╇┷╈]", " ", line) for line in text.splitlines()]
    return [
        found for line in lines if "rlhfkit " not in line for found in SENTENCE.findall(re.sub(" {2,}", " | ", line))
    ]


@pytest.mark.parametrize(
    ("arguments", "environment", "language"),
    [
        ([], {}, "en"),
        ([], {"LANG": "zh_CN.UTF-8"}, "zh"),
        ([], {"LANG": "zh_TW"}, "zh"),
        ([], {"LC_MESSAGES": "zh_CN.UTF-8", "LANG": "en_US.UTF-8"}, "zh"),
        ([], {"LC_ALL": "C.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ([], {"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, "zh"),
        ([], {"LANG": "de_DE.UTF-8"}, "en"),
        ([], {"RLHFKIT_LANG": "zh", "LANG": "en_US.UTF-8"}, "zh"),
        ([], {"RLHFKIT_LANG": "zh-Hans"}, "zh"),
        (["sft", "--lang", "en"], {"RLHFKIT_LANG": "zh"}, "en"),
        (["--lang", "zh", "sft"], {}, "zh"),
        (["sft", "--model", "m", "--lang=zh_CN"], {}, "zh"),
        (["generate", "--", "--lang", "zh"], {}, "en"),
        (["sft", "--lang"], {"LANG": "zh_CN"}, "zh"),  # the value is missed when the line is parsed
    ],
)
def test_which_language(arguments: list[str], environment: Mapping[str, str], language: str) -> None:
    assert words.wanted(arguments, environment) == language


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [(["--lang", "fr"], {}, "--lang: .*'fr'"), ([], {"RLHFKIT_LANG": "klingon"}, "RLHFKIT_LANG: .*'klingon'")],
)
def test_an_unknown_language_is_refused(arguments: list[str], environment: Mapping[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refusal:
        words.wanted(arguments, environment)
    assert refusal.value.hint == "choose en or zh"


def test_an_unknown_language_ends_the_command(cli: Cli) -> None:
    outcome = cli("families", "--lang", "fr")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: --lang: there is no language 'fr'\n  → choose en or zh\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_chinese(cli: Cli, command: str) -> None:
    outcome = cli(*command.split(), "--lang", "zh", "--help")
    assert outcome.code == 0
    assert outcome.out.lstrip().startswith("用法：")
    assert english(outcome.out) == []
    assert "--lang" in outcome.out


@pytest.mark.parametrize("command", ["", "sft", "convert"])
def test_help_is_english_without_it(cli: Cli, command: str) -> None:
    outcome = cli(*command.split(), "--help")
    assert outcome.code == 0
    assert not re.search(r"[\u4e00-\u9fff]", outcome.out)
    assert "--lang" in outcome.out


def test_every_command_has_its_panel() -> None:
    group: Any = typer.main.get_command(app)
    assert [name for name, command in group.commands.items() if not command.rich_help_panel] == []


def test_before_the_command_and_after_it(cli: Cli) -> None:
    before = cli("--lang", "zh", "families")
    assert before == cli("families", "--lang", "zh")
    assert "模型家族" in before.out
    assert "家族" in before.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        # Typer's own
        (["sftt"], 2, ["没有这个命令：'sftt'。是不是想写 'sft'？", "错误"]),
        (["sft", "--modle", "m"], 2, ["没有这个选项：--modle（可能是：--model）"]),
        (["sft", "--max-length", "x"], 2, ["data.max_length：应为整数，无法把它解析为整数（实为 'x'）"]),
        (["demo", "--seed", "x"], 2, ["'--seed' 的值无效："]),
        (["sft", "--model"], 2, ["选项 '--model' 需要一个值。"]),
        (["sft", "a", "b"], 2, ["多出了参数（b）"]),
        (["fix-checkpoint", "a"], 2, ["缺少参数 'DST'。", "查看帮助"]),
        (["inspect", "a", "--rows", "-1"], 2, ["'--rows' 的值无效：应大于或等于 0"]),
        # ours
        (["sft"], 2, ["错误：配置中有 2 处错误：\n  model.path：没有给出模型", "\n  → 全部选项：rlhfkit sft --help"]),
        (
            ["sft", "--model", "tiny", "--data", "good.jsonl", "--lr", "9", "--set", "optim.lrr=3"],
            2,
            ["optim.lr：应小于或等于 1（实为 9.0）", "optim.lrr：没有这个键；是不是想写 optim.lr？"],
        ),
        (
            ["sft", "--model", "tiny", "--data", "god.jsonl", "--max-length", "64"],
            1,
            ["错误：god.jsonl：没有这个文件或目录\n  → . 里名字相近的有：good.jsonl"],
        ),
        (
            ["sft", "--model", "tiny", "--data", "bad.jsonl", "--max-length", "64"],
            1,
            ['bad.jsonl:2：字段 "response"：数 5，而这里需要一个回答', "或加上 --on-bad-row skip 略过这样的行"],
        ),
        (["sft", "nothere"], 2, ["没有名为“nothere”的配方"]),
        (["ppo", "--model", "tiny", "--data", "good.jsonl", "--reward", "r.py:f"], 1, ["没有文件 r.py"]),
        (["doctor", "nowhere"], 1, ["nowhere 处没有目录"]),
        (["merge", "tiny", "out"], 1, ["tiny 里是全部权重，不是适配器：没有什么可合并的"]),
        (["report", "tiny"], 2, ["tiny 不是训练目录：里面没有 metrics.jsonl"]),
        (["init", "generate"], 2, ["没有“generate”的配方", "请选 sft, rm, ppo"]),
        (["convert", "a", "b", "--json"], 2, ["--json 时无法询问是否继续", "请给出 --yes 或 --dry-run"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_errors_are_chinese(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: list[str]
) -> None:
    write_jsonl(Path("good.jsonl"), [{"prompt": "a film?", "response": "good"}])
    write_jsonl(Path("bad.jsonl"), [{"prompt": "a film?", "response": "good"}, {"prompt": "a film?", "response": 5}])
    monkeypatch.setenv("RLHFKIT_LANG", "zh")
    outcome = cli(*arguments)
    assert outcome.code == code, outcome.err
    for text in said:
        assert text in outcome.err
    assert english(outcome.err) == []


def test_a_table_and_a_recipe_are_chinese_and_json_is_not(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFKIT_LANG", "zh")
    shown = cli("doctor", "tiny")
    assert "分词器" in shown.out
    assert "通过" in shown.out
    checks = json.loads(cli("doctor", "tiny", "--json").out)["checks"]
    assert {check["check"] for check in checks} >= {"tokenizer", "chat template", "weights"}
    assert not re.search(r"[\u4e00-\u9fff]", json.dumps(checks, ensure_ascii=False))
    cli("init", "rm", "--out", "rm.yaml")
    comments = re.findall(r"^ *# [^-\n]+$", Path("rm.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sum(bool(re.search(r"[\u4e00-\u9fff]", line)) for line in comments) > 20
    assert "schema" not in cli("rm", "rm.yaml").err  # it loads: what is wrong is that there is no data


@pytest.mark.parametrize("width", [60, 80])
def test_tables_stay_aligned_and_whole(cli: Cli, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Wide characters are counted as two cells, and nothing is cut off where Rich finds no space to break at."""
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (["families"], ["doctor", "tiny"], ["sft", "--help"], ["--help"]):
        text = cli(*arguments, "--lang", "zh").out
        boxed = [line for line in text.splitlines() if line and line[0] in "│┃╭╰┏┡├└"]
        assert boxed
        assert len({cell_len(line) for line in boxed}) == 1, text
        assert not re.search(r"[\u4e00-\u9fff]…", text)


def test_the_locale_reaches_the_command(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "LANG": "zh_CN.UTF-8", "HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhfkit", "doctor", "nowhere"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("错误：nowhere 处没有目录\n  → doctor 读取的是目录")
