"""Data files become rows: plain dictionaries, each with the place it came from.

The format is found from the content, not from the suffix, because a JSON array called ``.jsonl`` and JSON lines called
``.json`` are both common. A file is opened twice, once to look and once to read, so it must be a regular file.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rlhfkit.errors import DataError

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Suffixes of files that a folder contributes; each may be followed by ``.gz``."""

OnBadRow = Callable[[DataError], None]
"""Takes the fault of one row. Returning leaves the row out; raising stops the reading."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file has it.

    ``where`` is ``file:line`` for JSON lines and CSV, ``file: row N`` for arrays, Parquet and hub data sets.
    """

    where: str
    fields: dict[str, Any]


def read_rows(path: Path, on_bad: OnBadRow | None = None) -> Iterator[RawRow]:
    """Rows of a data file, or of all data files of a folder in sorted order.

    Args:
        path: a file (JSON array, JSON lines, CSV, TSV or Parquet, each possibly gzipped) or a folder of such files.
        on_bad: takes the fault of a row that can be left out while the rest of its file stays readable (a broken JSON
            line, a CSV row with a missing cell). Without it such a fault is raised. Faults of a whole file always are.

    Raises:
        DataError: at once for a missing path, during iteration for everything found in the content.
    """
    files = _data_files(path) if path.is_dir() else [_existing_file(path)]
    return (row for file in files for row in _read_file(file, on_bad or _raise))


def has_data_suffix(name: str) -> bool:
    """Whether a name ends like a data file, ``.gz`` aside."""
    return _suffix(name) in DATA_SUFFIXES


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


def _suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


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
    visible = _visible(folder)
    if any(entry.suffix == ".arrow" for entry in visible):
        raise DataError(
            f"{folder}: a folder of Arrow files, as Dataset.save_to_disk writes it",
            hint=f"export it once: datasets.load_from_disk({str(folder)!r}).to_parquet('rows.parquet')",
        )
    files = [entry for entry in visible if entry.is_file() and has_data_suffix(entry.name)]
    if files:
        return files
    there = ", ".join(entry.name for entry in visible[:5]) or "nothing"
    raise DataError(
        f"{folder}: no data file in this folder; it holds {there}",
        hint=f"data files end in {', '.join(DATA_SUFFIXES)}, or one of these with .gz; subfolders are not entered",
    )


# --- one file: look at the first bytes, then read ---------------------------------------------------------------------


def _read_file(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    rows = 0
    bad = 0

    def count_bad(error: DataError) -> None:
        nonlocal bad
        bad += 1
        on_bad(error)

    for row in _rows_by_content(path, count_bad):
        rows += 1
        yield row
    if not rows and not bad:
        raise DataError(f"{path}: the file holds no rows", hint="check how it was written, or leave it out")


def _rows_by_content(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    head = _first_bytes(path)
    if not head:
        raise DataError(f"{path}: the file is empty", hint="check how it was written, or leave it out")
    if head.startswith(b"PAR1"):
        return _parquet_rows(path)
    _refuse_other_formats(path, head)
    if _looks_like_utf16(head):
        raise _encoding_error(path)
    if head.startswith(b"["):
        return _array_rows(path, on_bad)
    if head.startswith(b"{"):
        return _object_rows(path, on_bad)
    if _suffix(path.name) in (".csv", ".tsv"):
        return _csv_rows(path, on_bad)
    raise DataError(
        f"{path}: unknown format; the file begins with {_snippet(head.decode('utf-8', 'replace'))}",
        hint="rows are read from a JSON array, JSON lines, CSV, TSV or Parquet; name CSV files .csv and TSV files .tsv",
    )


def _first_bytes(path: Path) -> bytes:
    """The first bytes of the unpacked content, leading blank space and BOM aside; empty when there is nothing else."""
    with _opened(path) as stream:
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


def _is_gzip(file: BinaryIO) -> bool:
    magic = file.read(2)
    file.seek(0)
    return magic == b"\x1f\x8b"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of a file; faults of the disk and of the gzip layer become DataError."""
    try:
        with path.open("rb") as file:
            if _is_gzip(file):
                with gzip.open(file, "rb") as unpacked:
                    yield unpacked  # type: ignore[misc]  # a GzipFile reads like any binary file
            else:
                yield file
    except EOFError:
        raise DataError(f"{path}: the gzip data ends too early", hint="copy or download the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data: {error}", hint="copy or download the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", hint="check its permissions") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends, one at a time; only ``\\n`` ends a line, so texts may hold U+2028."""
    offset = 0
    with _opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _encoding_error(path, offset=offset + error.start, line=number) from None
            offset += len(raw)
            yield text.removeprefix("\ufeff") if number == 1 else text


def _whole_text(path: Path) -> str:
    return "".join(_lines(path))


# --- encodings --------------------------------------------------------------------------------------------------------


_SAMPLE_BYTES = 1 << 24


def _encoding_error(path: Path, *, offset: int | None = None, line: int = 1) -> DataError:
    """The error for a file that is not UTF-8; without ``offset``, for one whose first bytes say so."""
    with _opened(path) as stream:
        sample = stream.read(_SAMPLE_BYTES)
    if offset is None:
        offset = sample.index(b"\x00") if 0 in sample[:2] else 0
    byte = f"byte 0x{sample[offset]:02x}" if offset < len(sample) else "a byte"
    message = f"{path}:{line}: not UTF-8: {byte} at offset {offset}"
    encoding = _likely_encoding(sample)
    if encoding is None:
        return DataError(message, hint="save the file as UTF-8; `file -i` may tell what it is now")
    command = _shell_filter(f"iconv -f {encoding} -t UTF-8", path, f"utf8-{path.name.removesuffix('.gz')}")
    return DataError(f"{message}; the file decodes as {encoding}", hint=f"convert it: {command}")


def _shell_filter(tool: str, path: Path, target: str) -> str:
    """The command that sends a file through a tool into another file of the same folder."""
    source = shlex.quote(str(path))
    output = shlex.quote(str(path.with_name(target)))
    with path.open("rb") as file:
        return f"gunzip -c {source} | {tool} > {output}" if _is_gzip(file) else f"{tool} {source} > {output}"


def _looks_like_utf16(head: bytes) -> bool:
    # Data files begin with an ASCII character, of which UTF-16 makes one zero byte.
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in head[:2]


def _likely_encoding(sample: bytes) -> str | None:
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16" if _decodes(sample, "utf-16") else None
    if 0 in sample[:2]:
        encoding = "UTF-16LE" if sample[1] == 0 else "UTF-16BE"
        return encoding if _decodes(sample, encoding) else None
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        # Chinese text in GB18030 is not valid UTF-8 for long; many good characters mean a damaged UTF-8 file.
        good = sum(ord(character) > 127 for character in sample[: error.start].decode("utf-8"))
        if good > 8:
            return None
    return "GB18030" if _decodes(sample, "gb18030") else None


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        # Not final: the sample may end inside a character.
        codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


# --- JSON -------------------------------------------------------------------------------------------------------------


class _RowDecoder:
    """A JSON decoder that notes what JSON readers usually let pass: repeated keys, NaN and infinities.

    They are noted rather than raised, so that the position after the value stays known and the next row can be read.
    """

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        self._fault = ""

    def decode(self, text: str) -> Any:
        self._fault = ""
        return self._decoder.decode(text)

    def decode_at(self, text: str, position: int) -> tuple[Any, int]:
        self._fault = ""
        return self._decoder.raw_decode(text, position)

    def row(self, value: Any, where: str) -> RawRow:
        """The row made of the value just decoded.

        Raises:
            DataError: not an object, or one with a noted fault.
        """
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: the row is {_json_type(value)}, not an object",
                hint='each row is an object of named fields, like {"prompt": "...", "response": "..."}',
            )
        if self._fault:
            raise DataError(f"{where}: {self._fault}", hint="correct the row")
        return RawRow(where, value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            self._fault = self._fault or f'field "{repeated}" stands twice in one object'
        return made

    def _constant(self, name: str) -> float:
        self._fault = self._fault or f"{name} is not a JSON value"
        return float(name)


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), type(value).__name__)


def _json_error(where: str, error: Exception) -> DataError:
    hint = "correct the line, or write the file again with a JSON library"
    if isinstance(error, json.JSONDecodeError):
        seen = error.doc[error.pos : error.pos + 40]
        saw = f"the parser saw {_snippet(seen)}" if seen.strip() else "the text ends there"
        return DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}; {saw}", hint=hint)
    if isinstance(error, RecursionError):
        return DataError(f"{where}: the JSON is nested too deeply", hint=hint)
    return DataError(f"{where}: not valid JSON: {error}", hint=hint)


def _snippet(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return repr(line[:40] + ("…" if len(line) > 40 else ""))


def _ends_early(error: Exception) -> bool:
    """Whether the parser ran out of text, as it does in a value that was cut short or goes on in the next line."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")


def _truncated(where: str, what: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: {what}: {_json_error(where, error).message.removeprefix(where + ': ')}",
        hint="the copy or download may have stopped early: fetch the file again, or remove the unfinished row",
    )


def _object_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    """Rows of a file that begins with an object: JSON lines, or one object that holds the rows in a list."""
    lines = _numbered(path)
    number, first = next(lines)
    decoder = _RowDecoder()
    several_lines = next(lines, None) is not None
    try:
        value = decoder.decode(first)
    except (ValueError, RecursionError) as error:
        if several_lines and _ends_early(error) and "Unterminated" not in str(error):
            return _document_rows(path, number, on_bad)
    else:
        if not several_lines and _wrapped(path, value) is not None:
            return _document_rows(path, number, on_bad)
    return _line_rows(path, on_bad)


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, text) for number, text in enumerate(_lines(path), start=1) if not text.isspace())


def _line_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    decoder = _RowDecoder()
    lines = _numbered(path)
    coming = next(lines, None)
    while coming is not None:
        number, text = coming
        coming = next(lines, None)
        where = f"{path}:{number}"
        try:
            row = decoder.row(decoder.decode(text), where)
        except DataError as error:
            on_bad(error)
        except (ValueError, RecursionError) as error:
            on_bad(_line_error(where, text, error, last=coming is None))
        else:
            yield row


def _line_error(where: str, text: str, error: Exception, *, last: bool) -> DataError:
    if last and (_ends_early(error) or not text.rstrip().endswith("}")):
        return _truncated(where, "the last line is cut short", error)
    if _ends_early(error):
        return DataError(
            f"{where}: the object does not end on this line; JSON lines hold one whole object on each line",
            hint="write one object on each line, or all objects in one JSON array",
        )
    return _json_error(where, error)


def _document_rows(path: Path, first_line: int, on_bad: OnBadRow) -> Iterator[RawRow]:
    """Rows of one object over the whole file, like ``{"data": [...]}``."""
    text = _whole_text(path)
    decoder = _RowDecoder()
    start = len(text) - len(text.lstrip())
    try:
        value, end = decoder.decode_at(text, start)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", first_line)
        if _ends_early(error):
            raise _truncated(f"{path}:{line}", "the file ends inside an object", error) from None
        raise _json_error(f"{path}:{line}", error) from None
    rows = None if text[end:].strip() else _wrapped(path, value)
    if rows is None:
        command = _shell_filter("jq -c .", path, f"lines-{path.name.removesuffix('.gz')}")
        raise DataError(
            f"{path}:{first_line}: an object spans several lines (to line {_line_at(text, end)}); "
            "JSON lines hold one whole object on each line",
            hint=f"rewrite it: {command}",
        )
    decoder.row(value, str(path))
    for index, fields in enumerate(rows, start=1):
        try:
            row = decoder.row(fields, f"{path}: row {index}")
        except DataError as error:
            on_bad(error)
        else:
            yield row


# A lone object with one of these is itself a row: {"messages": [...]} holds turns, not rows.
_ROW_FIELDS = {"prompt", "instruction", "query", "question", "messages", "conversations", "text", "turns", "chosen"}


def _wrapped(path: Path, value: Any) -> list[Any] | None:
    """The rows inside an object that wraps them; None when the object is itself a row."""
    if not isinstance(value, dict) or _ROW_FIELDS & value.keys():
        return None
    lists = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
    if len(lists) > 1:
        raise DataError(
            f"{path}: an object with several lists of rows: {', '.join(lists)}",
            hint="save the list to train on as a file of its own",
        )
    return value[lists[0]] if lists else None


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _array_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    """Rows of a JSON array. The text is held whole, the rows are made one at a time."""
    text = _whole_text(path)
    decoder = _RowDecoder()
    position = _skip_space(text, text.index("[") + 1)
    if text.startswith("]", position):
        _refuse_rest(path, text, position + 1)
        return
    index = 0
    while True:
        index += 1
        where = f"{path}: row {index}"
        value, position = _array_item(path, text, position, index, decoder)
        try:
            row = decoder.row(value, where)
        except DataError as error:
            on_bad(error)
        else:
            yield row
        position = _skip_space(text, position)
        if text.startswith("]", position):
            _refuse_rest(path, text, position + 1)
            return
        if not text.startswith(",", position):
            _refuse_array(path, text, index, json.JSONDecodeError("Expecting ',' or ']'", text, position))
        position = _skip_space(text, position + 1)


def _array_item(path: Path, text: str, position: int, index: int, decoder: _RowDecoder) -> tuple[Any, int]:
    try:
        return decoder.decode_at(text, position)
    except json.JSONDecodeError as error:
        _refuse_array(path, text, index, error)
    except (ValueError, RecursionError) as error:
        raise _json_error(f"{path}:{_line_at(text, position)}", error) from None


def _refuse_array(path: Path, text: str, index: int, error: json.JSONDecodeError) -> NoReturn:
    where = f"{path}:{error.lineno}"
    if _ends_early(error):
        raise _truncated(where, f"the file ends inside the array, at row {index}", error) from None
    raise _json_error(where, error) from None


def _refuse_rest(path: Path, text: str, position: int) -> None:
    position = _skip_space(text, position)
    if position < len(text):
        raise DataError(
            f"{path}:{_line_at(text, position)}: more text after the end of the array: "
            f"{_snippet(text[position : position + 41])}",
            hint="a file holds one JSON array of objects, or one object on each line",
        )


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LONGEST_COLUMN_NAME = 100
_NO_CELL_LIMIT = 2**31 - 1


def _csv_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    # The default limit of 128 KiB a cell is less than some conversations have; the module knows only a global one.
    csv.field_size_limit(_NO_CELL_LIMIT)
    reader = csv.reader(_lines(path), delimiter=_delimiter(path), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"{path}:{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _csv_error(where, str(error)) from None
        if cells is None:
            return
        if not any(cells):  # a blank line, or the empty rows that spreadsheets leave at the end
            continue
        if header is None:
            header = _header(where, cells)
        elif len(cells) != len(header):
            on_bad(_ragged(where, cells, header))
        else:
            yield RawRow(where, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def _delimiter(path: Path) -> str:
    """The separator that the header line uses most, outside quotes."""
    header = next(text for text in _lines(path) if not text.isspace())
    bare = _QUOTED.sub("", header)
    default = "\t" if _suffix(path.name) == ".tsv" else ","
    return max((default, ",", "\t", ";"), key=bare.count)


def _header(where: str, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    # pandas writes its index as a first column without a name; it is left out of the rows.
    if "" in names[1:]:
        raise DataError(f"{where}: column {names.index('', 1) + 1} of the header has no name", hint="name every column")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f'{where}: the header names the column "{repeated}" twice', hint="rename one of them")
    long = next((name for name in names if len(name) > _LONGEST_COLUMN_NAME or "\n" in name), None)
    if long is not None:
        raise DataError(
            f"{where}: the first row is no header: a column would be called {_snippet(long)}",
            hint='CSV and TSV files start with a row of column names, like "prompt,response"',
        )
    return names


def _ragged(where: str, cells: Sequence[str], header: Sequence[str]) -> DataError:
    return DataError(
        f"{where}: the row has {len(cells)} cells, the header {len(header)} ({', '.join(header)})",
        hint="put texts that hold the separator or a line break in double quotes",
    )


def _csv_error(where: str, reason: str) -> DataError:
    if reason == "unexpected end of data":
        reason = "a double quote opened in this row is never closed"
    return DataError(
        f"{where}: not valid CSV: {reason}",
        hint='inside a quoted text a double quote is written twice: "she said ""yes"""',
    )


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    with path.open("rb") as file, _opened(path) as stream:
        # Parquet is read back and forth, and every step back in a gzip stream unpacks it again from its start.
        source = io.BytesIO(stream.read()) if _is_gzip(file) else stream
        try:
            table = parquet.ParquetFile(source)
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=1024, row_groups=[group]):
                    for fields in batch.to_pylist():
                        index += 1
                        yield RawRow(f"{path}: row {index}", fields)
        except pyarrow.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}: damaged Parquet file: {reason}", hint="copy or download it again") from None
