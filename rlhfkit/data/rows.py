"""A row as its file has it, before anything is read into its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhfkit.errors import DataError

OnBadRow = Callable[[DataError], None]
"""Takes the fault of one row. Returning leaves the row out; raising stops the reading."""


OnRemark = Callable[["Remark"], None]
"""Takes a remark about a row; the reading goes on."""


@dataclass(frozen=True, slots=True)
class Remark:
    """Something about a row that is no fault, but is counted and told: ``what`` is the same for all rows of a kind."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file has it.

    ``where`` is ``file:line`` for JSON lines and CSV, ``file:line (row N)`` for JSON arrays, and ``file: row N`` for
    Parquet and hub data sets.
    """

    where: str
    fields: dict[str, Any]
