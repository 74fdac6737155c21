"""Files of a run folder, written so that a killed run keeps them and read as they were written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """One JSON object as one line, at once, so that a killed run keeps its records. JSON has no infinity: null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record as JSON can hold it: no NaN, no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def json_lines(path: Path) -> list[str]:
    """The lines of a JSON-lines file. (``splitlines`` would also cut at separators that texts may hold, as U+2028.)"""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def replace_text(path: Path, text: str) -> None:
    """Write a file beside and rename it, so that it is never half there."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
