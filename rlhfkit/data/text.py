"""A data file's bytes as text: unpacked, decoded from UTF-8 and nothing else, in lines or in pieces of bounded size."""

from __future__ import annotations

import codecs
import gzip
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rlhfkit.errors import DataError

HALF_CHARACTER = "\ufffd"  # stands for a character of which a file has the first bytes alone
CUT_SHORT = "unexpected end of data"  # the decoder's word for that; inside a file the next byte is a wrong one
SAMPLE_BYTES = 1 << 24
_CHUNK_BYTES = 1 << 20


def data_suffix(name: str) -> str:
    """The last suffix of a name in small letters, ``.gz`` aside."""
    return Path(name.lower().removesuffix(".gz")).suffix


def is_gzip(file: BinaryIO) -> bool:
    magic = file.read(2)
    file.seek(0)
    return magic == b"\x1f\x8b"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of a file; faults of the disk and of the gzip layer become DataError."""
    try:
        with plain(path) as file:
            if is_gzip(file):
                with gzip.open(file, "rb") as unpacked:
                    yield unpacked  # type: ignore[misc]  # a GzipFile reads like any binary file
            else:
                yield file
    except EOFError:
        raise DataError(f"{path}: the gzip data ends too early", hint="copy or download the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data: {error}", hint="copy or download the file again") from None


@contextmanager
def plain(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file as they are."""
    try:
        with path.open("rb") as file:
            yield file
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", hint="check its permissions") from error


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends, one at a time; only ``\\n`` ends a line, so texts may hold U+2028.

    A file that was cut inside a character ends with `HALF_CHARACTER`.
    """
    offset = 0
    with opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason != CUT_SHORT:
                    raise encoding_error(path, offset=offset + error.start, line=number) from None
                text = raw.decode("utf-8", errors="replace")
            offset += len(raw)
            yield text.removeprefix("\ufeff") if number == 1 else text


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of a bounded size, whatever its lines are like."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, begun = 0, 1, False
    with opened(path) as stream:
        while True:
            raw = stream.read(_CHUNK_BYTES)
            held = len(decoder.getstate()[0])  # of a character that the last piece cut in two
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                if error.reason == CUT_SHORT:
                    yield HALF_CHARACTER
                    return
                line += raw.count(b"\n", 0, max(0, error.start - held))
                raise encoding_error(path, offset=offset - held + error.start, line=line) from None
            offset += len(raw)
            line += raw.count(b"\n")
            if text:
                yield text if begun else text.removeprefix("\ufeff")
                begun = True
            if not raw:
                return


def whole_text(path: Path) -> str:
    return "".join(text_chunks(path))


def encoding_error(path: Path, *, offset: int | None = None, line: int = 1) -> DataError:
    """The error for a file that is not UTF-8; without ``offset``, for one whose first bytes say so."""
    with opened(path) as stream:
        sample = stream.read(SAMPLE_BYTES)
    if offset is None:
        offset = sample.index(b"\x00") if 0 in sample[:2] else 0
    byte = f"byte 0x{sample[offset]:02x}" if offset < len(sample) else "a byte"
    message = f"{path}:{line}: not UTF-8: {byte} at offset {offset}"
    encoding = _likely_encoding(sample)
    if encoding is None:
        return DataError(message, hint="save the file as UTF-8; `file -i` may tell what it is now")
    command = shell_filter(f"iconv -f {encoding} -t UTF-8", path, f"utf8-{path.name.removesuffix('.gz')}")
    return DataError(f"{message}; the file decodes as {encoding}", hint=f"convert it: {command}")


def shell_filter(tool: str, path: Path, target: str) -> str:
    """The command that sends a file through a tool into another file of the same folder."""
    source = shlex.quote(str(path))
    output = shlex.quote(str(path.with_name(target)))
    with path.open("rb") as file:
        return f"gunzip -c {source} | {tool} > {output}" if is_gzip(file) else f"{tool} {source} > {output}"


def looks_like_utf16(head: bytes) -> bool:
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


def snippet(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return repr(line[:40] + ("…" if len(line) > 40 else ""))
