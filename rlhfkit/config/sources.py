"""What ``--data`` takes: the name of a source, optionally ``=weight``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rlhfkit.errors import ConfigError


@dataclass(frozen=True)
class DataSource:
    """One data source as the user named it; ``weight`` is how often its rows are used, 1 being once each."""

    name: str
    weight: float = 1.0


def parse_source(spec: str) -> DataSource:
    """A source from ``name`` or ``name=weight``; an existing path that holds a ``=`` is taken whole.

    Raises:
        ConfigError: the weight is not a number above 0, or the name is missing.
    """
    name, equals, weight = spec.rpartition("=")
    if not equals or Path(spec).expanduser().exists():
        name, weight = spec, "1"
    if not name:
        raise ConfigError(f'the data source "{spec}" has no name', hint="write path, or path=weight")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f'the data source "{spec}": its weight "{weight}" is not a number above 0, '
            "and there is no file of the whole name",
            hint="write path=weight, like rows.jsonl=0.5",
        )
    return DataSource(name, value)
