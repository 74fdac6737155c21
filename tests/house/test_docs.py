"""What people are told to type can be typed: commands in the READMEs, the docs, the help and the hints of errors."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rlhfkit.cli import app
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import STAGES

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = sorted([*READMES, *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")])
SOURCES = sorted([*ROOT.glob("rlhfkit/**/*.py"), *ROOT.glob("adapters/*.py"), *ROOT.glob("templates/*.py")])
SHELL = ("", "sh", "bash", "shell", "console")

GROUP: Any = typer.main.get_command(app)
HELP = {"-h", "--help"}
OPTIONS = {
    name: {option: p for p in command.params for option in [*p.opts, *p.secondary_opts] if option.startswith("-")}
    for name, command in GROUP.commands.items()
}
EVERY_OPTION = HELP.union(*OPTIONS.values()) | {option for p in GROUP.params for option in p.opts}


# -- finding what is shown --------------------------------------------------------------------------------------------


def fenced(text: str, *languages: str) -> Iterator[str]:
    """The insides of fenced blocks of some languages."""
    for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        if (match[2].split() or [""])[0] in languages:
            yield match[3]


def typed_lines(block: str) -> list[str]:
    """Lines of a shell block, continued ones joined, without prompts and comments."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    without = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [line for line in without if line]


def rlhfkit_calls(line: str) -> Iterator[list[str]]:
    """The words after each `rlhfkit` that a shell line runs, launched by accelerate or not."""
    if "rlhfkit" not in line:
        return
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    words.whitespace_split = True
    part: list[str] = []
    for word in [*words, ";"]:
        if word[0] not in "&|;<>":
            part.append(word)
            continue
        while part and re.match(r"[A-Z_]+=", part[0]):  # HF_ENDPOINT=... in front
            part.pop(0)
        if part[:1] == ["rlhfkit"]:
            yield part[1:]
        elif "rlhfkit" in part and part[part.index("rlhfkit") - 1] == "-m":
            yield part[part.index("rlhfkit") + 1 :]
        part = []


def faults_of(call: list[str]) -> list[str]:
    """What is wrong with the words after `rlhfkit`: an unknown command or option, a missing value, a word too many."""
    if not call or call[0] in {"--version", "--install-completion", "--show-completion", *HELP}:
        return []
    name, *rest = call
    if name not in OPTIONS:
        return [f"no command '{name}'"]
    faults, positional = [], 0
    words = [word.strip("[]") for word in rest if word not in ("...", "[...]", "…")]
    while words:
        word = words.pop(0)
        option, equals, _ = word.partition("=")
        if not word.startswith("-"):
            positional += 1
        elif option not in OPTIONS[name] and option not in HELP:
            faults.append(f"'{name}' has no option {option}")
        elif option not in HELP and not OPTIONS[name][option].is_flag and not equals:
            if not words or words[0].startswith("--"):
                faults.append(f"{option} needs a value")
            else:
                words.pop(0)
    arguments = [p for p in GROUP.commands[name].params if p.param_type_name == "argument"]
    most = len(arguments)
    if positional > most and not any(p.nargs == -1 for p in arguments):
        faults.append(f"'{name}' takes at most {most} words, {positional} are given")
    return faults


# -- tests ------------------------------------------------------------------------------------------------------------


def test_both_readmes_show_the_same_commands() -> None:
    shown = [
        [line for block in fenced(path.read_text(encoding="utf-8"), *SHELL) for line in typed_lines(block)]
        for path in READMES
    ]
    assert shown[0] == shown[1]
    assert [call for line in shown[0] for call in rlhfkit_calls(line)]


def test_the_gate_runs_what_the_readmes_say() -> None:
    install, run = "pip install -c constraints.txt -e '.[test]'", "pytest"
    for readme in READMES:
        assert f"{install} && {run}\n" in readme.read_text(encoding="utf-8")
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert install in gate
    assert [line for line in gate if re.fullmatch(rf"PYTEST_ADDOPTS=\S+ {run}", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fenced(text, *SHELL) for line in typed_lines(block)]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith(("rlhfkit ", "accelerate "))]
    faults = {line: found for line in lines for call in rlhfkit_calls(line) if (found := faults_of(call))}
    assert not faults
    # Options named by themselves in the prose; those of other tools have underscores or stand with their command.
    alone = re.findall(r"`(--[a-z][a-z-]*)[`= ]", prose)
    assert not [option for option in alone if option not in EVERY_OPTION]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_of_a_page_load(page: Path, tmp_path: Path) -> None:
    for i, block in enumerate(fenced(page.read_text(encoding="utf-8"), "yaml", "yml")):
        raw = yaml.safe_load(block)
        if isinstance(raw, dict) and raw.get("stage") in STAGES:
            recipe = tmp_path / f"{i}.yaml"
            recipe.write_text(block, encoding="utf-8")
            load_config(STAGES[raw["stage"]], recipe=str(recipe))  # type: ignore[type-var]


def test_commands_of_the_help_parse() -> None:
    texts = [GROUP.help, *(command.help for command in GROUP.commands.values())]
    shown = [line[line.index("rlhfkit ") :] for text in texts for line in text.splitlines() if "rlhfkit " in line]
    assert {call[0] for line in shown for call in rlhfkit_calls(line)} >= {"sft", "rm", "ppo", "generate", "demo"}
    assert not {line: found for line in shown for call in rlhfkit_calls(line) if (found := faults_of(call))}


def test_commands_and_options_in_messages_exist() -> None:
    """Hints of errors name the next command; one that does not exist leaves people stuck."""
    unknown = []
    for path in SOURCES:
        if path.name == "launch.py":  # reads the options of accelerate's command
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            unknown += [
                f"{where}: rlhfkit {c}" for c in re.findall(r"\brlhfkit ([a-z][\w-]*)", node.value) if c not in OPTIONS
            ]
            flags = re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", node.value)
            unknown += [f"{where}: {flag}" for flag in flags if flag not in EVERY_OPTION]
    assert not unknown


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("rlhfkit sft --modle M --data D", "'sft' has no option --modle"),
        ("rlhfkit train --model M", "no command 'train'"),
        ("pip install x && rlhfkit rm --model", "--model needs a value"),
        ("HF_ENDPOINT=x rlhfkit sft a.yaml --resume runs/sft", "'sft' takes at most 1 words, 2 are given"),
        ("accelerate launch --num_processes 2 -m rlhfkit ppo --no-plan --kl 1", "'ppo' has no option --kl"),
    ],
)
def test_faults_are_found(line: str, fault: str) -> None:
    assert [found for call in rlhfkit_calls(line) for found in faults_of(call)] == [fault]
