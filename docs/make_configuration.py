"""Writes the tables of docs/configuration.md from the configuration classes: python docs/make_configuration.py

Everything outside the two markers is written by hand and stays.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhfkit.config.load import FieldPath, iterate_fields
from rlhfkit.config.stages import STAGES

PAGE = Path(__file__).with_name("configuration.md")
BEGIN = "<!-- tables: written by docs/make_configuration.py -->"
END = "<!-- end of tables -->"

HEADINGS = {
    "model": "model",
    "lora": "lora",
    "data": "data",
    "optim": "optim",
    "run": "run",
    "rm": "rm (stage `rm` only)",
    "ppo": "ppo (stage `ppo` only)",
    "": "generate (keys without a block)",
}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def tables() -> str:
    """One table for each block: its keys in the order of their definition."""
    rows: dict[str, dict[str, dict[str, FieldPath]]] = {block: {} for block in HEADINGS}
    for stage, cls in STAGES.items():
        for field in iterate_fields(cls):
            if field.path != "stage":
                rows[field.block].setdefault(field.path, {})[stage] = field
    parts = []
    for block, keys in rows.items():
        lines = [f"### {HEADINGS[block]}", "", "| key | flag | default | values | meaning |", "|---|---|---|---|---|"]
        lines += [_row(path, by_stage) for path, by_stage in keys.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page_with_tables(page: str) -> str:
    """The page with what stands between the markers made anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{PAGE} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _row(path: str, by_stage: dict[str, FieldPath]) -> str:
    first = next(iter(by_stage.values()))
    default = _shown(_default(first))
    # PPO has learning rates of its own; all else is the same wherever a key exists.
    for stage, field in by_stage.items():
        if _default(field) != _default(first):
            default += f"; {stage}: {_shown(_default(field))}"
    flag = f"`{first.flag}`" if first.flag else f"`--set {path}=…`"
    meaning = str(first.info.description)
    cells = (f"`{path}`", flag, default, ", ".join(_values(first)), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldPath) -> Any:
    return field.info.get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    if value in ("", None, []):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(value)}]`" if isinstance(value, list) else f"`{value}`"


def _values(field: FieldPath) -> Iterator[str]:
    """What a key may hold: its choices, or its kind with the bounds."""
    annotation = field.info.annotation
    if typing.get_origin(annotation) is typing.Literal:
        yield from (f"`{choice}`" for choice in typing.get_args(annotation))
        return
    yield _kind(annotation)
    bounds = {name: getattr(rule, name) for rule in field.info.metadata for name, _ in BOUNDS if hasattr(rule, name)}
    yield from (f"{sign} {bounds[name]}" for name, sign in BOUNDS if name in bounds)


def _kind(annotation: Any) -> str:
    arguments: Iterable[Any] = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return "list of texts"
    inner = next((a for a in arguments if a is not type(None)), annotation)
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}[inner]


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
