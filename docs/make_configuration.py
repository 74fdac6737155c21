"""Writes the tables of configuration.md, in docs/ and docs/zh/, from the configuration classes.

    python docs/make_configuration.py

Everything outside the two markers is written by hand and stays.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfkit.config.load import FieldPath, iterate_fields
from rlhfkit.config.stages import STAGES
from rlhfkit.words import catalogue

BEGIN = "<!-- tables: written by docs/make_configuration.py -->"
END = "<!-- end of tables -->"
BLOCKS = ("model", "lora", "data", "optim", "run", "sft", "rm", "ppo", "dpo", "kto", "grpo", "rloo")
WITHOUT_BLOCKS = ("generate", "score")  # stages whose keys stand in no block


@dataclass(frozen=True)
class Language:
    """The page of a language, and the words of its tables."""

    page: Path
    columns: str
    only: str  # behind the name of a block that one stage has
    bare: str  # behind the name of a stage without blocks
    kinds: dict[type, str]
    texts: str
    translate: Callable[[str], str] = str


ENGLISH = Language(
    page=Path(__file__).with_name("configuration.md"),
    columns="| key | flag | default | values | meaning |",
    only=" (stage `{}` only)",
    bare=" (keys without a block)",
    kinds={int: "whole number", float: "number", bool: "true, false", str: "text"},
    texts="list of texts",
)
CHINESE = Language(
    page=Path(__file__).parent / "zh" / "configuration.md",
    columns="| 键 | 命令行选项 | 默认值 | 取值 | 含义 |",
    only="（仅 `{}` 阶段）",
    bare="（键不分块）",
    kinds={int: "整数", float: "数", bool: "true、false", str: "文本"},
    texts="文本列表",
    translate=catalogue("zh").translate,
)
LANGUAGES = (ENGLISH, CHINESE)
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def tables(language: Language = ENGLISH) -> str:
    """One table for each block: its keys in the order of their definition."""
    rows: dict[str, dict[str, dict[str, FieldPath]]] = {block: {} for block in (*BLOCKS, *WITHOUT_BLOCKS)}
    for stage, cls in STAGES.items():
        for field in iterate_fields(cls):
            if field.path != "stage":
                rows[field.block or stage].setdefault(field.path, {})[stage] = field
    parts = []
    for block, keys in rows.items():
        note = language.bare if block in WITHOUT_BLOCKS else language.only.format(block) if block in STAGES else ""
        lines = [f"### {block}{note}", "", language.columns, "|---|---|---|---|---|"]
        lines += [_row(path, by_stage, language) for path, by_stage in keys.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page_with_tables(page: str, language: Language = ENGLISH) -> str:
    """The page with what stands between the markers made anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{language.page} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables(language)}\n\n{END}{after}"


def _row(path: str, by_stage: dict[str, FieldPath], language: Language) -> str:
    first = next(iter(by_stage.values()))
    default = _shown(_default(first))
    # PPO and what runs on TRL have learning rates of their own; all else is the same wherever a key exists.
    for stage, field in by_stage.items():
        if _default(field) != _default(first):
            default += f"; {stage}: {_shown(_default(field))}"
    flag = f"`{first.flag}`" if first.flag else f"`--set {path}=…`"
    meaning = language.translate(str(first.info.description))
    cells = (f"`{path}`", flag, default, ", ".join(_values(first, language)), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldPath) -> Any:
    return field.info.get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    if value in ("", None, []):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(value)}]`" if isinstance(value, list) else f"`{value}`"


def _values(field: FieldPath, language: Language) -> Iterator[str]:
    """What a key may hold: its choices, or its kind with the bounds."""
    annotation = field.info.annotation
    if typing.get_origin(annotation) is typing.Literal:
        yield from (f"`{choice}`" for choice in typing.get_args(annotation))
        return
    yield _kind(annotation, language)
    bounds = {name: getattr(rule, name) for rule in field.info.metadata for name, _ in BOUNDS if hasattr(rule, name)}
    yield from (f"{sign} {bounds[name]}" for name, sign in BOUNDS if name in bounds)


def _kind(annotation: Any, language: Language) -> str:
    arguments: Iterable[Any] = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return language.texts
    return language.kinds[next((a for a in arguments if a is not type(None)), annotation)]


if __name__ == "__main__":
    for language in LANGUAGES:
        page = language.page.read_text(encoding="utf-8")
        language.page.write_text(page_with_tables(page, language), encoding="utf-8")
