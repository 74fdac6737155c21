"""A row as its file has it, before anything is read into its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhfkit.errors import DataError

OnBadRow = Callable[[DataError], None]
"""Takes the fault of one row. Returning leaves the row out; raising stops the reading."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file has it.

    ``where`` is ``file:line`` for JSON lines and CSV, ``file: row N`` for arrays, Parquet and hub data sets.
    """

    where: str
    fields: dict[str, Any]
