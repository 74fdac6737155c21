"""Rows of JSON lines, of a JSON array, and of one object that holds them in a list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from rlhfkit.data.rows import OnBadRow, RawRow
from rlhfkit.data.text import shell_filter, snippet, text_chunks, text_lines, whole_text
from rlhfkit.errors import DataError


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
        saw = f"the parser saw {snippet(seen)}" if seen.strip() else "the text ends there"
        return DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}; {saw}", hint=hint)
    if isinstance(error, RecursionError):
        return DataError(f"{where}: the JSON is nested too deeply", hint=hint)
    return DataError(f"{where}: not valid JSON: {error}", hint=hint)


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


def object_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
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
    return ((number, text) for number, text in enumerate(text_lines(path), start=1) if not text.isspace())


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
    if isinstance(error, json.JSONDecodeError) and error.lineno > 1:  # the parser looked behind the line's break
        error.colno = len(text.rstrip()) + 1
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
    text = whole_text(path)
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
        command = shell_filter("jq -c .", path, f"lines-{path.name.removesuffix('.gz')}")
        raise DataError(
            f"{path}:{first_line}: an object spans several lines (to line {_line_at(text, end)}); "
            "JSON lines hold one whole object on each line",
            hint=f"rewrite it: {command}",
        )
    decoder.row(value, str(path))
    key = next(key for key, held in value.items() if held is rows)
    line = _Lines(text)
    for index, (fields, place) in enumerate(zip(rows, _places(text, start, key), strict=False), start=1):
        try:
            row = decoder.row(fields, _item_where(path, line.at(place), index))
        except DataError as error:
            on_bad(error)
        else:
            yield row


# A lone object with one of these is itself a row: {"messages": [...]} holds turns, not rows.
_ROW_FIELDS = {"prompt", "instruction", "query", "question", "messages", "conversations", "text", "turns", "chosen"}


def _places(text: str, position: int, key: str) -> Iterator[int]:
    """Where the items of the list under a key of an object begin. The text is known to be valid JSON."""
    decode = json.JSONDecoder().raw_decode

    def space(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches anywhere

    name = None
    while name != key:
        name, position = decode(text, space(position + 1))  # after the brace or a comma
        position = space(space(position) + 1)  # after the colon
        if name != key:
            position = space(decode(text, position)[1])
    while True:
        position = space(position + 1)  # after the bracket or a comma
        yield position
        position = space(decode(text, position)[1])


def _item_where(path: Path, line: int, index: int) -> str:
    """The place of an array's item; many arrays stand on one line, so the line alone would not do."""
    return f"{path}:{line} (row {index})"


class _Lines:
    """Lines of places in a text that are asked for one after the other."""

    def __init__(self, text: str) -> None:
        self._text, self._line, self._counted = text, 1, 0

    def at(self, position: int) -> int:
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line


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


class _ArrayText:
    """The text of a JSON array, of which only a window is held: from the item that is being read to a little further.

    ``position`` is the place in the window; positions before it are given up when more is read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = text_chunks(path)
        self._text = ""
        self._line, self._column = 1, 1  # of the window's first character
        self._item_line, self._counted = 1, 0  # the line of a place in the window, up to which breaks were counted
        self.position = 0

    def at(self, character: str) -> bool:
        """Whether this character comes next, white space aside; if so it is passed."""
        self._skip_space()
        if not self._text.startswith(character, self.position):
            return False
        self.position += 1
        return True

    def line(self) -> int:
        """The line of what comes next, white space aside."""
        self._skip_space()
        self._count_breaks()
        return self._item_line

    def _count_breaks(self) -> None:
        self._item_line += self._text.count("\n", self._counted, self.position)
        self._counted = self.position

    def item(self, index: int, decoder: _RowDecoder) -> Any:
        self._skip_space()
        more = 1
        while True:
            try:
                value, end = decoder.decode_at(self._text, self.position)
            except json.JSONDecodeError as error:
                # A word or an escape may be cut in two where the window ends, a string or an object anywhere in it.
                cut = _ends_early(error) or len(self._text) - error.pos < _LOOK_AHEAD
                if not cut or not self._read_more(more):
                    self.refuse(index, error)
                more *= 2  # an item of any length is begun anew only a few times
            except (ValueError, RecursionError) as error:
                raise _json_error(f"{self._path}:{self._place(self.position)[0]}", error) from None
            else:
                whole = isinstance(value, (str, list, dict)) or end + _LOOK_AHEAD < len(self._text)  # a number goes on
                if whole or not self._read_more():
                    self.position = end
                    return value

    def refuse(self, index: int, error: json.JSONDecodeError) -> NoReturn:
        error.lineno, error.colno = self._place(error.pos)
        where = f"{self._path}:{error.lineno}"
        if _ends_early(error):
            raise _truncated(where, f"the file ends inside the array, at row {index}", error) from None
        raise _json_error(where, error) from None

    def missing(self, what: str) -> json.JSONDecodeError:
        """The fault that something else stands here."""
        return json.JSONDecodeError(f"Expecting {what}", self._text, self.position)

    def refuse_rest(self) -> None:
        """Nothing may follow the array."""
        self._skip_space()
        if self.position < len(self._text):
            raise DataError(
                f"{self._path}:{self._place(self.position)[0]}: more text after the end of the array: "
                f"{snippet(self._text[self.position : self.position + 41])}",
                hint="a file holds one JSON array of objects, or one object on each line",
            )

    def _skip_space(self) -> None:
        while True:
            match = _SPACE.match(self._text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self._text) or not self._read_more():
                return

    def _read_more(self, chunks: int = 1) -> bool:
        added = list(islice(self._chunks, chunks))
        if not added:
            return False
        self._line, self._column = self._place(self.position)
        self._count_breaks()
        self._text = self._text[self.position :] + "".join(added)
        self.position = self._counted = 0
        return True

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column in the file."""
        breaks = self._text.count("\n", 0, position)
        start = self._text.rfind("\n", 0, position)
        return self._line + breaks, position - start if breaks else self._column + position


_SPACE = re.compile(r"[ \t\r\n]*")
_LOOK_AHEAD = 64  # characters: more than the longest word or escape, and than errors show


def array_rows(path: Path, on_bad: OnBadRow) -> Iterator[RawRow]:
    """Rows of a JSON array, made one at a time from as much of its text as one of them needs."""
    text, decoder = _ArrayText(path), _RowDecoder()
    text.at("[")
    index = 0
    end = text.at("]")
    while not end:
        index += 1
        line = text.line()
        value = text.item(index, decoder)
        try:
            row = decoder.row(value, _item_where(path, line, index))
        except DataError as error:
            on_bad(error)
        else:
            yield row
        end = text.at("]")
        if not end and not text.at(","):
            text.refuse(index, text.missing("',' or ']'"))
    text.refuse_rest()


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
