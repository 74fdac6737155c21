"""What ``--data`` takes becomes lists of records: paths, names of datasets.yaml and hub data sets, with weights."""

from __future__ import annotations

import difflib
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import yaml
from numpy.typing import NDArray

from rlhfkit.config.load import OnceLoader
from rlhfkit.config.sources import parse_source
from rlhfkit.data.parse import Stage, fault_kind, fault_place, likely_stage, parse_row
from rlhfkit.data.read import Content, content_of, has_data_suffix, missing_path, read_rows
from rlhfkit.data.records import REASONS_KEPT, Record, Tally
from rlhfkit.data.rows import OnBadRow, OnRemark, RawRow, Remark
from rlhfkit.errors import DataError

T = TypeVar("T")
OnBad = Literal["error", "skip"]
Item = RawRow | DataError | Remark
"""What comes of reading: a row, the fault of one that cannot be read, or a remark."""

NAMES_FILE = "datasets.yaml"
DEFAULT_ENDPOINT = "https://huggingface.co"
ROWS_LOOKED_AT = 100  # to find out what a source is for

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[^/:]+))?(:(?P<split>.+))?")


@dataclass
class SourceReport:
    """What became of the rows of one source. ``reasons`` holds the first skipped rows, as ``where: reason``.

    ``empty_answers`` and ``equal_answers`` are among the skipped rows. ``remarks`` are about rows without a fault, by
    what they say.
    """

    name: str
    rows_kept: int = 0
    rows_skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    empty_answers: Tally = field(default_factory=Tally)
    equal_answers: Tally = field(default_factory=Tally)
    remarks: dict[str, Tally] = field(default_factory=dict)

    @property
    def rows_read(self) -> int:
        return self.rows_kept + self.rows_skipped

    def skip(self, reason: str) -> None:
        self.rows_skipped += 1
        if len(self.reasons) < REASONS_KEPT:
            self.reasons.append(reason)
        if (kind := fault_kind(reason)) != "other":
            (self.empty_answers if kind == "empty answer" else self.equal_answers).add(fault_place(reason))

    def refuse(self, reason: str) -> None:
        """Count the row kept last as skipped after all."""
        self.rows_kept -= 1
        self.skip(reason)

    def remark(self, remark: Remark) -> None:
        self.remarks.setdefault(remark.what, Tally()).add(remark.where)

    def sentences(self) -> list[str]:
        """What there is to tell of rows that have no fault."""
        return [f"{tally.count:,} rows: {what} (first: {tally.first[0]})" for what, tally in self.remarks.items()]

    def extend(self, other: SourceReport) -> None:
        """Count the rows of another report, which come after these."""
        self.rows_kept += other.rows_kept
        self.rows_skipped += other.rows_skipped
        self.reasons = [*self.reasons, *other.reasons][:REASONS_KEPT]
        self.empty_answers.extend(other.empty_answers)
        self.equal_answers.extend(other.equal_answers)
        for what, tally in other.remarks.items():
            self.remarks.setdefault(what, Tally()).extend(tally)


@dataclass
class LoadReport:
    """One report per source, in the order given."""

    sources: list[SourceReport] = field(default_factory=list)


def load_records(
    specs: Sequence[str],
    stage: Stage,
    *,
    on_bad_row: OnBad,
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
        name = parse_source(spec).name
        source = SourceReport(name)
        records.append(list(parse_items(locate(name, names_file).items(), stage, on_bad_row, source)))
        refuse_unusable(source, stage)
        report.sources.append(source)
    return records, report


def parse_items(items: Iterable[Item], stage: Stage, on_bad_row: OnBad, report: SourceReport) -> Iterator[Any]:
    """The records of what was read, of the stage's kind, counted in ``report``.

    Raises:
        DataError: a bad row, unless such rows are skipped.
    """
    for item in items:
        if isinstance(item, Remark):
            report.remark(item)
            continue
        try:
            if isinstance(item, DataError):
                raise item
            record = parse_row(item, stage, report.remark)
        except DataError as error:
            if on_bad_row == "error":
                hint = f"{error.hint}; or leave such rows out with --on-bad-row skip"
                raise DataError(error.message, hint=hint) from None
            report.skip(error.message)
        else:
            report.rows_kept += 1
            yield record


def refuse_unusable(report: SourceReport, stage: Stage) -> None:
    """
    Raises:
        DataError: none of a source's rows is of use.
    """
    if not report.rows_kept:
        reason = f"; the first: {report.reasons[0]}" if report.reasons else ""
        raise DataError(
            f"{report.name}: none of its {report.rows_read} rows can be used for {stage}{reason}",
            hint=f"check that this is {stage} data; without --on-bad-row skip the first fault is shown in full",
        )


class Mixed(Sequence[T]):
    """Sources one after the other, each as often as its weight says; rows are looked up, never copied."""

    def __init__(self, sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> None:
        self._parts: list[tuple[Sequence[T], NDArray[np.int64]]] = []
        ends = [0]
        for index, (rows, weight) in enumerate(zip(sources, weights, strict=True)):
            wanted = round(weight * len(rows))
            rest = wanted % len(rows) if rows else 0
            draw = np.random.default_rng((seed, index))
            drawn = draw.choice(len(rows), rest, replace=False) if rest else np.zeros(0, np.int64)
            self._parts.append((rows, np.sort(drawn)))
            ends.append(ends[-1] + wanted)
        self._ends = ends

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index) - 1
        rows, drawn = self._parts[part]
        from_end = self._ends[part + 1] - index  # the drawn rows stand after the whole copies
        return rows[int(drawn[-from_end])] if from_end <= len(drawn) else rows[(index - self._ends[part]) % len(rows)]


def mix(sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> Mixed[T]:
    """All sources one after the other, source i repeated ``weights[i]`` times; nothing is shuffled.

    A source of n rows gives round(weight · n) of them: whole copies, then a sample without replacement drawn with
    ``seed``, in the order of the source. The draw of one source does not depend on the others.
    """
    return Mixed(sources, weights, seed)


def detect_stage(spec: str, *, names_file: Path | None = None) -> Stage:
    """The stage that most of the first rows of a source seem made for.

    Raises:
        DataError: a source that does not exist or cannot be read, or whose first rows fit no stage.
    """
    name = parse_source(spec).name
    rows = list(islice(locate(name, names_file).rows(lambda _: None), ROWS_LOOKED_AT))
    votes = Counter(stage for row in rows if (stage := likely_stage(row.fields)) is not None)
    if not votes:
        fields = ", ".join(rows[0].fields) if rows else "none that can be read"
        raise DataError(
            f"{name}: its rows fit no stage; the fields of the first are {fields}",
            hint="say how they are to be used with --stage sft, --stage rm or --stage ppo",
        )
    return votes.most_common(1)[0][0]


# --- where a source is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a source's rows are: a file or folder, else a data set of the hub as the ``datasets`` library gave it."""

    path: Path | None = None
    hub: Any = None
    name: str = ""  # of the data set, for messages

    def rows(self, on_bad: OnBadRow, on_remark: OnRemark | None = None) -> Iterator[RawRow]:
        if self.path is not None:
            return read_rows(self.path, on_bad, on_remark)
        return (RawRow(f"{self.name}: row {index}", dict(row)) for index, row in enumerate(self.hub, start=1))

    def items(self) -> Iterator[Item]:
        """Rows, the faults of rows that cannot be read, and remarks, in their order.

        Raises:
            DataError: a fault of the whole file, once all before it was given.
        """
        others: list[DataError | Remark] = []
        rows = self.rows(others.append, others.append)
        while True:
            fatal: DataError | None = None
            row = None
            try:
                row = next(rows, None)
            except DataError as error:
                fatal = error
            yield from others
            others.clear()
            if fatal is not None:
                raise fatal
            if row is None:
                return
            yield row

    def content(self) -> Content:
        """What the rows are made from. A hub data set's digest is the library's, None if it has none."""
        if self.path is not None:
            return content_of(self.path)
        return Content(getattr(self.hub, "_fingerprint", None), len(self.hub))


def locate(name: str, names_file: Path | None = None) -> Place:
    """A path, else a name in datasets.yaml, else a hub data set, which is loaded.

    Raises:
        DataError: there is no such source.
    """
    path = Path(name).expanduser()
    if path.exists():
        return Place(path)
    entries, listed_in = _named_sources(names_file)
    if name in entries:
        return _place_of_entry(name, entries[name], listed_in)
    if _looks_like_path(name):
        raise missing_path(path)
    hub = _HUB_ID.fullmatch(name)
    if hub is None:
        raise _unknown_source(name, entries, listed_in)
    return _hub_place(hub["id"], hub["config"], hub["split"])


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
        entries = yaml.load(path.read_text(encoding="utf-8-sig"), OnceLoader)
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


_ENTRY_HINT = "each entry is `name: path` or `name: {path: ..., config: ..., split: ...}`, and each name stands once"


def _place_of_entry(name: str, entry: Any, listed_in: Path) -> Place:
    """Where one entry's rows are; a relative path counts from the folder of the file that lists it."""
    where = f'{listed_in}: entry "{name}"'
    keys = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(keys, dict) or not isinstance(keys.get("path"), str):
        raise DataError(f"{where} has no path", hint=_ENTRY_HINT)
    unknown = [str(key) for key in keys if key not in ("path", "config", "split")]
    if unknown:
        raise DataError(f'{where} has the unknown key "{unknown[0]}"', hint=_ENTRY_HINT)
    given = {key: keys[key] for key in ("config", "split") if keys.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{where} has a {key} that is no text", hint=_ENTRY_HINT)
    target: str = keys["path"]
    path = listed_in.parent / Path(target).expanduser()
    hub = _HUB_ID.fullmatch(target)
    if path.exists():
        for key in given:
            raise DataError(f"{where} has a {key}, but {path} is local and has none", hint=f"remove the {key}")
        return Place(path)
    if _looks_like_path(target) or hub is None:
        error = missing_path(path)
        raise DataError(f"{where}: {error.message}", hint=error.hint)
    for key, value in given.items():
        if hub[key] is not None:
            raise DataError(f"{where} names two {key}s, {hub[key]} and {value}", hint="keep one of them")
    return _hub_place(hub["id"], given.get("config", hub["config"]), given.get("split", hub["split"]))


def _hub_place(hub_id: str, config: str | None, split: str | None) -> Place:
    endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    # Imported here: it is slow, reads HF_ENDPOINT when imported, and local files do without it.
    import datasets

    name = f"{hub_id}/{config}" if config else hub_id
    try:
        rows = datasets.load_dataset(hub_id, config, split=split or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types, some of them of its HTTP library
        lines = (str(error).strip() or "no reason given").split("\n")
        # The names to choose from are in the second line.
        missing = config is None and lines[0].startswith("Config name is missing")
        reason = " ".join(lines[: 2 if missing else 1])
        hint = "give a local file or folder, or ask another hub with --hf-endpoint URL"
        raise DataError(
            f'"{name}" (split "{split or "train"}") is no local path, and loading it from {endpoint} failed: '
            f"{type(error).__name__}: {reason}",
            hint=f"name one of its configurations: {hub_id}/CONFIGURATION" if missing else hint,
        ) from error
    return Place(hub=rows, name=f"{name}:{split}" if split else name)
