"""Rows of CSV, TSV and Parquet files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path

from rlhfkit.data.rows import OnBadRow, OnRemark, RawRow, Remark
from rlhfkit.data.text import HALF_CHARACTER, data_suffix, is_gzip, opened, snippet, text_lines
from rlhfkit.errors import DataError

_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_BEGINNING = 1 << 16  # characters of a file that are looked at to see how it is written
_LONGEST_COLUMN_NAME = 100
_NO_CELL_LIMIT = 2**31 - 1


EMPTY_ROW = "left out, since all cells are empty"
NO_LAST_BREAK = "the file ends without a line break; if it was cut short, the last cell is not whole"


def csv_rows(path: Path, on_bad: OnBadRow, on_remark: OnRemark) -> Iterator[RawRow]:
    # The default limit of 128 KiB a cell is less than some conversations have; the module knows only a global one.
    csv.field_size_limit(_NO_CELL_LIMIT)
    form = _Form(path)
    lines: list[str] = []  # of the row being read
    reader = csv.reader(_noted(text_lines(path), lines), delimiter=form.delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"{path}:{line}"
        lines.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _csv_error(where, str(error)) from None
        if cells is None:
            return
        if not any(cells):
            if cells and header is not None:  # not a blank line, but what spreadsheets leave at the end
                on_remark(Remark(where, EMPTY_ROW))
            continue
        text = "".join(lines)
        form.refuse_blank_before_quote(where, text, header)
        if header is None:
            form.refuse_single_quotes(where, text, header)
            header = _header(where, cells)
            continue
        whole = text.endswith("\n")  # only the last line of a file may have no end
        try:
            form.refuse_single_quotes(where, text, header)
            if len(cells) != len(header):
                raise _ragged(where, cells, header) if whole else _cut_short(where, _ragged(where, cells, header))
            if text.endswith(HALF_CHARACTER):
                raise _cut_short(where, DataError(f"{where}: it ends inside a character"))
            if [cell.strip().removeprefix("\ufeff") for cell in cells] == header:
                raise DataError(
                    f"{where}: the header stands here again",
                    hint="files were put together with their headers: remove this line",
                )
        except DataError as error:
            on_bad(error)
            continue
        if not whole and not text.endswith('"'):
            on_remark(Remark(where, NO_LAST_BREAK))
        yield RawRow(where, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def _noted(stream: Iterator[str], lines: list[str]) -> Iterator[str]:
    for line in stream:
        lines.append(line)
        yield line


class _Form:
    """How a file separates and quotes its cells, as far as its beginning shows; knows what csv would read wrongly."""

    def __init__(self, path: Path) -> None:
        beginning = _beginning(path)
        default = "\t" if data_suffix(path.name) == ".tsv" else ","
        bare = _QUOTED.sub("", beginning.partition("\n")[0])
        # The separator that the header line uses most, outside quotes.
        self.delimiter = max((default, ",", "\t", ";", "|"), key=bare.count)
        start = rf"(?:^|{re.escape(self.delimiter)})"
        self._quoted_cell = re.compile(rf'({start})"[^"]*(?:""[^"]*)*"(?={re.escape(self.delimiter)}|\r?\n?\Z)')
        self._blank_before_quote = re.compile(start + '[ \t]+"')
        self._single_quote = re.compile(start + "[ \t]*'")
        # Where double quotes are in use, single ones are part of the texts.
        self._double_quotes = re.search(start + '"', beginning, re.MULTILINE) is not None

    def refuse_blank_before_quote(self, where: str, text: str, header: Sequence[str] | None) -> None:
        """
        Raises:
            DataError: a cell is quoted after a blank. To csv the quotes are then text, and the separators and line
                breaks between them end cells and rows, so that nothing after it can be trusted.
        """
        if not self._blank_before_quote.search(text):
            return
        for index, cell in enumerate(self._bare_cells(text)):
            if cell[:1] in (" ", "\t") and cell.lstrip().startswith('"'):
                raise DataError(
                    f"{where}: {_cell_name(index, header)} has a blank before its opening double quote, "
                    "which makes the quotes part of the text",
                    hint='take the blank out: "a","b", not "a", "b"; or if it belongs to the text, put all of the text '
                    "in double quotes, those inside it written twice",
                )

    def refuse_single_quotes(self, where: str, text: str, header: Sequence[str] | None) -> None:
        """
        Raises:
            DataError: single quotes stand around a cell or around several, in a file that knows no double ones.
        """
        if self._double_quotes or not self._single_quote.search(text):
            return
        cells = [cell.strip() for cell in self._bare_cells(text)]
        for index, cell in enumerate(cells):
            ends = [other.endswith("'") for other in cells[index:]]
            if cell.startswith("'") and ((len(cell) > 1 and ends[0]) or any(ends[1:])):
                raise DataError(
                    f"{where}: {_cell_name(index, header)} is in single quotes, which CSV takes as part of the text",
                    hint="quote texts with double quotes; if these belong to the text, put double ones around them: "
                    "\"'so'\"",
                )

    def _bare_cells(self, text: str) -> list[str]:
        """A row's cells as they are written, with nothing between the quotes of those that are well quoted."""
        return self._quoted_cell.sub(r'\1""', text).rstrip("\r\n").split(self.delimiter)


def _beginning(path: Path) -> str:
    """The first lines of a file, from the first that is not blank."""
    found: list[str] = []
    size = 0
    for line in dropwhile(str.isspace, text_lines(path)):
        found.append(line)
        size += len(line)
        if size >= _BEGINNING:
            break
    return "".join(found)


def _cell_name(index: int, header: Sequence[str] | None) -> str:
    if header is None or index >= len(header) or not header[index]:
        return f"column {index + 1}"
    return f'column "{header[index]}"'


def _header(where: str, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if names[0].lower().startswith("sep="):
        raise DataError(f"{where}: a line that tells Excel the separator, and no header", hint="delete this line")
    # pandas writes its index as a first column without a name; it is left out of the rows.
    if "" in names[1:]:
        raise DataError(f"{where}: column {names.index('', 1) + 1} of the header has no name", hint="name every column")
    _refuse_repeated(where, names)
    long = next((name for name in names if len(name) > _LONGEST_COLUMN_NAME or "\n" in name), None)
    if long is not None:
        raise DataError(
            f"{where}: the first row is no header: a column would be called {snippet(long)}",
            hint='CSV and TSV files start with a row of column names, like "prompt,response"',
        )
    return names


def _refuse_repeated(where: str, names: Sequence[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f'{where}: the header names the column "{repeated}" twice', hint="rename one of them")


def _ragged(where: str, cells: Sequence[str], header: Sequence[str]) -> DataError:
    return DataError(
        f"{where}: the row has {len(cells)} cells, the header {len(header)} ({', '.join(header)})",
        hint="put texts that hold the separator or a line break in double quotes",
    )


def _cut_short(where: str, fault: DataError) -> DataError:
    return DataError(
        f"{where}: the last line is cut short: {fault.message.removeprefix(where + ': ')}",
        hint="the copy or download may have stopped early: fetch the file again, or remove the unfinished row",
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
            _refuse_repeated(str(path), table.schema_arrow.names)
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=1024, row_groups=[group]):
                    for fields in batch.to_pylist():
                        index += 1
                        yield RawRow(f"{path}: row {index}", fields)
        except pyarrow.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}: damaged Parquet file: {reason}", hint="copy or download it again") from None
