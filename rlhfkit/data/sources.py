"""What ``--data`` takes becomes lists of records: paths, names of datasets.yaml and hub data sets, with weights."""

from __future__ import annotations

import difflib
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rlhfkit.data.parse import Stage, parse_row
from rlhfkit.data.read import OnBadRow, RawRow, has_data_suffix, missing_path, read_rows
from rlhfkit.data.records import Record
from rlhfkit.errors import ConfigError, DataError

T = TypeVar("T")

NAMES_FILE = "datasets.yaml"
DEFAULT_ENDPOINT = "https://huggingface.co"
REASONS_KEPT = 5

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>.+))?")


@dataclass(frozen=True)
class DataSource:
    """One data source as the user named it; ``weight`` is how often its rows are used, 1 being once each."""

    name: str
    weight: float = 1.0


@dataclass
class SourceReport:
    """What became of the rows of one source. ``reasons`` holds the first skipped rows, as ``where: reason``."""

    name: str
    rows_kept: int = 0
    rows_skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def rows_read(self) -> int:
        return self.rows_kept + self.rows_skipped

    def skip(self, reason: str) -> None:
        self.rows_skipped += 1
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(reason)


@dataclass
class LoadReport:
    """One report per source, in the order given."""

    sources: list[SourceReport] = field(default_factory=list)


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


def load_records(
    specs: Sequence[str],
    stage: Stage,
    *,
    on_bad_row: Literal["error", "skip"],
    names_file: Path | None = None,
) -> tuple[list[list[Record]], LoadReport]:
    """The records of each source, one list per source, and the counts.

    Args:
        specs: what ``--data`` was given; weights are read by ``parse_source`` and applied by ``mix``.
        stage: which records to make.
        on_bad_row: raise at the first row that cannot be used, or leave such rows out and count them.
        names_file: the file of names; ``datasets.yaml`` of the working directory when not given.

    Raises:
        DataError: a source that does not exist, cannot be read, has a bad row or no usable row.
        ConfigError: a weight that is not a number above 0.
    """
    records = []
    report = LoadReport()
    for spec in specs:
        source = parse_source(spec)
        source_report = SourceReport(source.name)
        records.append(_load_source(source, stage, on_bad_row, names_file, source_report))
        report.sources.append(source_report)
    return records, report


def mix(records: list[list[T]], weights: list[float], seed: int) -> list[T]:
    """All sources one after the other, source i repeated ``weights[i]`` times; nothing is shuffled.

    A source of n rows gives round(weight · n) of them: whole copies, then a sample without replacement drawn with
    ``seed``, in the order of the source. The draw of one source does not depend on the others.
    """
    mixed: list[T] = []
    for index, (rows, weight) in enumerate(zip(records, weights, strict=True)):
        copies, rest = divmod(round(weight * len(rows)), len(rows)) if rows else (0, 0)
        drawn = sorted(random.Random(f"{seed}/{index}").sample(range(len(rows)), rest))
        mixed += rows * copies
        mixed += [rows[i] for i in drawn]
    return mixed


def _load_source(
    source: DataSource,
    stage: Stage,
    on_bad_row: Literal["error", "skip"],
    names_file: Path | None,
    report: SourceReport,
) -> list[Record]:
    def on_bad(error: DataError) -> None:
        if on_bad_row == "error":
            hint = f"{error.hint}; or leave such rows out with --on-bad-row skip"
            raise DataError(error.message, hint=hint) from None
        report.skip(error.message)

    records: list[Record] = []
    for row in _rows_of(source.name, names_file, on_bad):
        try:
            record = parse_row(row, stage)
        except DataError as error:
            on_bad(error)
        else:
            records.append(record)
    report.rows_kept = len(records)
    if not records:
        reason = f"; the first: {report.reasons[0]}" if report.reasons else ""
        raise DataError(
            f"{source.name}: none of its {report.rows_read} rows can be used for {stage}{reason}",
            hint=f"check that this is {stage} data; without --on-bad-row skip the first fault is shown in full",
        )
    return records


# --- where a source is ------------------------------------------------------------------------------------------------


def _rows_of(name: str, names_file: Path | None, on_bad: OnBadRow) -> Iterator[RawRow]:
    """The rows of a path, else of a name in datasets.yaml, else of a hub data set."""
    path = Path(name).expanduser()
    if path.exists():
        return read_rows(path, on_bad)
    entries, listed_in = _named_sources(names_file)
    if name in entries:
        return _rows_of_entry(name, entries[name], listed_in, on_bad)
    if _looks_like_path(name):
        raise missing_path(path)
    hub = _HUB_ID.fullmatch(name)
    if hub is None:
        raise _unknown_source(name, entries, listed_in)
    return _hub_rows(hub["id"], hub["split"])


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or has_data_suffix(name)


def _unknown_source(name: str, entries: dict[str, Any], listed_in: Path) -> DataError:
    near = difflib.get_close_matches(name, entries, n=3)
    if near:
        hint = f"near it in {listed_in}: {', '.join(near)}"
    elif entries:
        hint = f"{listed_in} has {', '.join(list(entries)[:10])}"
    else:
        hint = f"give a file, a folder, a hub id like owner/name, or list the name in {listed_in}"
    return DataError(f'"{name}" is no file, no name in {listed_in} and no hub id (owner/name)', hint=hint)


def _named_sources(names_file: Path | None) -> tuple[dict[str, Any], Path]:
    """The entries of datasets.yaml and where it is; no entries when there is no such file and none was asked for."""
    path = names_file or Path(NAMES_FILE)
    if names_file is None and not path.exists():
        return {}, path
    if not path.is_file():
        raise missing_path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise DataError(f"{where}: not valid YAML: {problem}", hint=_ENTRY_HINT) from None
    if entries is None:
        return {}, path
    if not isinstance(entries, dict):
        raise DataError(f"{path}: not a mapping of names to data sets", hint=_ENTRY_HINT)
    return {str(name): entry for name, entry in entries.items()}, path


_ENTRY_HINT = "each entry is `name: path` or `name: {path: ..., split: ...}`"


def _rows_of_entry(name: str, entry: Any, listed_in: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    """The rows of one entry; a relative path counts from the folder of the file that lists it."""
    where = f'{listed_in}: entry "{name}"'
    keys = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(keys, dict) or not isinstance(keys.get("path"), str):
        raise DataError(f"{where} has no path", hint=_ENTRY_HINT)
    unknown = [str(key) for key in keys if key not in ("path", "split")]
    if unknown:
        raise DataError(f'{where} has the unknown key "{unknown[0]}"', hint=_ENTRY_HINT)
    split = keys.get("split")
    if split is not None and not isinstance(split, str):
        raise DataError(f"{where} has a split that is no text", hint=_ENTRY_HINT)
    target: str = keys["path"]
    path = listed_in.parent / Path(target).expanduser()
    hub = _HUB_ID.fullmatch(target)
    if path.exists():
        if split is not None:
            raise DataError(f"{where} has a split, but {path} is local and has none", hint="remove the split")
        return read_rows(path, on_bad)
    if _looks_like_path(target) or hub is None:
        error = missing_path(path)
        raise DataError(f"{where}: {error.message}", hint=error.hint)
    if split is not None and hub["split"] is not None:
        raise DataError(f"{where} names two splits, {hub['split']} and {split}", hint="keep one of them")
    return _hub_rows(hub["id"], split or hub["split"])


def _hub_rows(hub_id: str, split: str | None) -> Iterator[RawRow]:
    endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    # Imported here: it is slow, reads HF_ENDPOINT when imported, and local files do without it.
    import datasets

    try:
        rows = datasets.load_dataset(hub_id, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types, some of them of its HTTP library
        reason = (str(error).strip() or "no reason given").partition("\n")[0]
        raise DataError(
            f'"{hub_id}" (split "{split or "train"}") is no local path, and loading it from {endpoint} failed: '
            f"{type(error).__name__}: {reason}",
            hint="give a local file or folder, or ask another hub with --hf-endpoint URL",
        ) from error
    name = f"{hub_id}:{split}" if split else hub_id
    return (RawRow(f"{name}: row {index}", dict(row)) for index, row in enumerate(rows, start=1))
