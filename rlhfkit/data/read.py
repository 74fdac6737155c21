"""Data files become rows: plain dictionaries, each with the place it came from.

The format is found from the content, not from the suffix, because a JSON array called ``.jsonl`` and JSON lines called
``.json`` are both common. A file is opened twice, once to look and once to read, so it must be a regular file.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rlhfkit.data.json_rows import array_rows, object_rows
from rlhfkit.data.rows import OnBadRow, OnRemark, RawRow
from rlhfkit.data.table_rows import csv_rows, parquet_rows
from rlhfkit.data.text import SAMPLE_BYTES, data_suffix, encoding_error, looks_like_utf16, opened, plain, snippet
from rlhfkit.errors import DataError

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Suffixes of files that a folder contributes; each may be followed by ``.gz``."""


def read_rows(path: Path, on_bad: OnBadRow | None = None, on_remark: OnRemark | None = None) -> Iterator[RawRow]:
    """Rows of a data file, or of all data files of a folder and the folders in it, in sorted order.

    Args:
        path: a file (JSON array, JSON lines, CSV, TSV or Parquet, each possibly gzipped) or a folder of such files.
        on_bad: takes the fault of a row that can be left out while the rest of its file stays readable (a broken JSON
            line, a CSV row with a missing cell). Without it such a fault is raised. Faults of a whole file always are.
        on_remark: takes what is to be told of rows that have no fault.

    Raises:
        DataError: at once for a missing path, during iteration for everything found in the content.
    """
    files = _data_files(path) if path.is_dir() else [_existing_file(path)]
    return (row for file in files for row in _read_file(file, on_bad or _raise, on_remark or (lambda _: None)))


@dataclass(frozen=True, slots=True)
class Content:
    """What rows are made from: a digest of it, None if there is none, and about how many rows, 0 if unknown."""

    digest: str | None
    rows: int


def content_of(path: Path) -> Content:
    """The content that `read_rows` reads. The rows are counted as lines; arrays, packed and Parquet files have none.

    Raises:
        DataError: as `read_rows` does.
    """
    digest, rows = hashlib.sha256(), 0
    by_lines = True
    for file in _data_files(path) if path.is_dir() else [_existing_file(path)]:
        # The format of a file may go by its name, and what is told of its rows names its place.
        name = file.relative_to(path) if file != path else file.name
        digest.update(f"{name} {file.stat().st_size} ".encode(errors="surrogateescape"))
        with plain(file) as stream:
            block = stream.read(SAMPLE_BYTES)
            by_lines = by_lines and not block.startswith((b"\x1f\x8b", b"PAR1", b"["))
            while block:
                digest.update(block)
                rows += block.count(b"\n")
                block = stream.read(SAMPLE_BYTES)
    return Content(digest.hexdigest(), rows if by_lines else 0)


def has_data_suffix(name: str) -> bool:
    """Whether a name ends like a data file, ``.gz`` aside."""
    return data_suffix(name) in DATA_SUFFIXES


def missing_path(path: Path) -> DataError:
    """The error for a path that does not exist, with the names near it that do."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"{path}: no such file; its folder {folder} does not exist either", hint="check the path")
    names = [entry.name for entry in _visible(folder)]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    hint = f"near it in {folder}: {', '.join(near)}" if near else f"check the path; {folder} holds nothing of that name"
    return DataError(f"{path}: no such file or folder", hint=hint)


def _raise(error: DataError) -> NoReturn:
    raise error


def _existing_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.exists():
        raise DataError(f"{path}: neither a regular file nor a folder", hint="save the rows to a file first")
    raise missing_path(path)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}", hint="check its permissions") from error


def _data_files(folder: Path) -> list[Path]:
    """
    Raises:
        DataError: there is none.
    """
    files = list(_files_below(folder, ()))
    if files:
        return files
    there = ", ".join(entry.name for entry in _visible(folder)[:5]) or "nothing"
    raise DataError(
        f"{folder}: no data file in this folder or below; it holds {there}",
        hint=f"data files end in {', '.join(DATA_SUFFIXES)}, or one of these with .gz",
    )


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Data files of a folder and the folders in it; ``above`` are those it is in, to which a link may lead back."""
    above = (*above, folder.resolve())
    visible = _visible(folder)
    if any(entry.suffix == ".arrow" for entry in visible):
        raise DataError(
            f"{folder}: a folder of Arrow files, as Dataset.save_to_disk writes it",
            hint=f"export it once: datasets.load_from_disk({str(folder)!r}).to_parquet('rows.parquet')",
        )
    for entry in visible:
        if entry.is_dir():
            if entry.resolve() not in above:
                yield from _files_below(entry, above)
        elif entry.is_file() and has_data_suffix(entry.name):
            yield entry


# --- one file: look at the first bytes, then read ---------------------------------------------------------------------


def _read_file(path: Path, on_bad: OnBadRow, on_remark: OnRemark) -> Iterator[RawRow]:
    rows = 0
    bad = 0

    def count_bad(error: DataError) -> None:
        nonlocal bad
        bad += 1
        on_bad(error)

    for row in _rows_by_content(path, count_bad, on_remark):
        rows += 1
        yield row
    if not rows and not bad:
        raise DataError(f"{path}: the file holds no rows", hint="check how it was written, or leave it out")


def _rows_by_content(path: Path, on_bad: OnBadRow, on_remark: OnRemark) -> Iterator[RawRow]:
    head = _first_bytes(path)
    if not head:
        raise DataError(f"{path}: the file is empty", hint="check how it was written, or leave it out")
    if head.startswith(b"PAR1"):
        return parquet_rows(path)
    _refuse_other_formats(path, head)
    if looks_like_utf16(head):
        raise encoding_error(path)
    if head.startswith(b"["):
        return array_rows(path, on_bad)
    if head.startswith(b"{"):
        return object_rows(path, on_bad)
    if data_suffix(path.name) in (".csv", ".tsv"):
        return csv_rows(path, on_bad, on_remark)
    raise DataError(
        f"{path}: unknown format; the file begins with {snippet(head.decode('utf-8', 'replace'))}",
        hint="rows are read from a JSON array, JSON lines, CSV, TSV or Parquet; name CSV files .csv and TSV files .tsv",
    )


def _first_bytes(path: Path) -> bytes:
    """The first bytes of the unpacked content, leading blank space and BOM aside; empty when there is nothing else."""
    with opened(path) as stream:
        while chunk := stream.read(4096):
            chunk = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
            if chunk:
                return chunk
    return b""


_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or export the sheet as CSV UTF-8"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it with `zstd -d`"),
    (b"BZh", "bzip2 data", "unpack it with `bunzip2`"),
    (b"\xfd7zXZ\x00", "xz data", "unpack it with `unxz`"),
    (b"ARROW1", "an Arrow file", "convert it to Parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch the data with `git lfs pull`"),
    (b"<", "an HTML or XML page, perhaps of a download that failed", "download the file again"),
)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for magic, what, hint in _OTHER_FORMATS:
        if head.startswith(magic):
            raise DataError(f"{path}: {what}", hint=hint)
