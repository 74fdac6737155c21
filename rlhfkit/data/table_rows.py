"""Rows of CSV, TSV and Parquet files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhfkit.data.rows import OnBadRow, RawRow
from rlhfkit.data.text import data_suffix, is_gzip, opened, snippet, text_lines
from rlhfkit.errors import DataError

_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LONGEST_COLUMN_NAME = 100
_NO_CELL_LIMIT = 2**31 - 1


def csv_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    # The default limit of 128 KiB a cell is less than some conversations have; the module knows only a global one.
    csv.field_size_limit(_NO_CELL_LIMIT)
    reader = csv.reader(text_lines(path), delimiter=_delimiter(path), strict=True)
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
    header = next(text for text in text_lines(path) if not text.isspace())
    bare = _QUOTED.sub("", header)
    default = "\t" if data_suffix(path.name) == ".tsv" else ","
    return max((default, ",", "\t", ";", "|"), key=bare.count)


def _header(where: str, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if names[0].lower().startswith("sep="):
        raise DataError(f"{where}: a line that tells Excel the separator, and no header", hint="delete this line")
    # pandas writes its index as a first column without a name; it is left out of the rows.
    if "" in names[1:]:
        raise DataError(f"{where}: column {names.index('', 1) + 1} of the header has no name", hint="name every column")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f'{where}: the header names the column "{repeated}" twice', hint="rename one of them")
    long = next((name for name in names if len(name) > _LONGEST_COLUMN_NAME or "\n" in name), None)
    if long is not None:
        raise DataError(
            f"{where}: the first row is no header: a column would be called {snippet(long)}",
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
    if reason.startswith("new-line character"):
        return DataError(
            f"{where}: a carriage return without a line feed, outside double quotes",
            hint="if lines end so, convert them with `tr '\\r' '\\n'`; if texts hold it, put them in double quotes",
        )
    return DataError(
        f"{where}: not valid CSV: {reason}",
        hint='inside a quoted text a double quote is written twice: "she said ""yes"""',
    )


# --- Parquet ----------------------------------------------------------------------------------------------------------


def parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    with path.open("rb") as file, opened(path) as stream:
        # Parquet is read back and forth, and every step back in a gzip stream unpacks it again from its start.
        source = io.BytesIO(stream.read()) if is_gzip(file) else stream
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
