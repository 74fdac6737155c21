"""Token rows in an Arrow file that is mapped into memory, in a cache that later runs find.

A cache entry is a folder, ``rows.arrow`` and ``account.json`` in it, made beside and renamed. Its name is a digest of
everything that its rows depend on, so an entry is never out of date; it is read through and compared with its own
digest before it is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rlhfkit.data.batch import TokenRow
from rlhfkit.data.parse import Stage
from rlhfkit.data.records import Tally
from rlhfkit.data.sources import SourceReport
from rlhfkit.data.tokenize import LabelledRow, PairRow, TokenReport
from rlhfkit.errors import DataError

ROWS, ACCOUNT = "rows.arrow", "account.json"


def cache_folder() -> Path:
    """Where what can be made again is kept: RLHFKIT_CACHE, or ``rlhfkit`` in the user's cache folder."""
    if given := os.environ.get("RLHFKIT_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhfkit"


@dataclass(frozen=True, slots=True)
class Made:
    """Token rows of a stretch of a source as an Arrow record batch, and what became of the rows on the way."""

    batch: Any
    source: SourceReport
    tokens: TokenReport


# -- rows to Arrow and back --------------------------------------------------------------------------------------------


def to_arrow(stage: Stage, rows: Sequence[Any]) -> Any:
    """Rows of one stage as a record batch: ``ids``, and where in them what begins and ends."""
    import pyarrow

    if stage == "sft":
        marks = [_spans(row.supervised) for row in rows]
        columns = {"ids": _lists([row.ids for row in rows]), "spans": _lists(marks)}
    else:
        marks = [np.array([len(row.prompt), *map(len, row.answers)], np.int32) for row in rows]
        ids = [np.concatenate([row.prompt, *row.answers]) for row in rows]
        columns = {"ids": _lists(ids), "lengths": _lists(marks)}
        if stage == "kto":
            columns["labels"] = _lists([np.array(row.labels, np.int32) for row in rows])
        else:
            columns["margin"] = pyarrow.array([row.margin for row in rows], pyarrow.float64())
    return pyarrow.RecordBatch.from_pydict(columns)


def _lists(arrays: Sequence[NDArray[np.int32]]) -> Any:
    import pyarrow

    offsets = np.cumsum([0, *map(len, arrays)])
    values = np.concatenate([np.zeros(0, np.int32), *arrays])
    return pyarrow.LargeListArray.from_arrays(offsets, values)


def _spans(supervised: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Where the mask turns on, off, on, ..."""
    padded = np.concatenate([[False], supervised, [False]])
    return np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int32)


def _sft_row(columns: Sequence[Any], index: int) -> TokenRow:
    ids, spans = _list(columns[0], index), _list(columns[1], index)
    supervised = np.zeros(len(ids), np.bool_)
    for start, end in spans.reshape(-1, 2):
        supervised[start:end] = True
    return TokenRow(ids, supervised)


def _pair_row(columns: Sequence[Any], index: int) -> PairRow:
    prompt, *answers = np.split(_list(columns[0], index), np.cumsum(_list(columns[1], index))[:-1])
    return PairRow(prompt, tuple(answers), float(columns[2][index]))


def _labelled_row(columns: Sequence[Any], index: int) -> LabelledRow:
    prompt, *answers = np.split(_list(columns[0], index), np.cumsum(_list(columns[1], index))[:-1])
    return LabelledRow(prompt, tuple(answers), tuple(map(bool, _list(columns[2], index))))


_ROW_OF: dict[Stage, Callable[[Sequence[Any], int], Any]] = {"sft": _sft_row, "rm": _pair_row, "kto": _labelled_row}


def _list(column: tuple[NDArray[np.int64], NDArray[np.int32]], index: int) -> NDArray[np.int32]:
    offsets, values = column
    return values[offsets[index] : offsets[index + 1]].copy()  # the file's own memory cannot be written to


def _columns(batch: Any) -> list[Any]:
    """The columns of a record batch as arrays on the same memory: lists as offsets and values."""
    return [
        (column.offsets.to_numpy(), column.values.to_numpy()) if hasattr(column, "offsets") else column.to_numpy()
        for column in batch.columns
    ]


class Store(Sequence[Any]):
    """Rows of one source, read from their file when asked for. Nothing but their places is held.

    Args:
        stage: whose rows they are.
        folder: the cache entry.
        cached: whether an earlier run made it.

    Raises:
        ValueError, OSError: the entry is damaged. Everything in it is looked at once, without being held.
    """

    def __init__(self, stage: Stage, folder: Path, *, cached: bool) -> None:
        import pyarrow

        self.cached = cached
        self.folder = folder
        self._row = _ROW_OF[stage]
        account = json.loads((folder / ACCOUNT).read_text(encoding="utf-8"))
        self.digest: str = account["digest"]
        self.source = _source_report(account["source"])
        self.tokens = _token_report(account["tokens"])
        # Not mapped for this: pages that were looked at would count as the process's memory.
        with pyarrow.OSFile(str(folder / ROWS)) as file:
            found = Digest()
            reader = pyarrow.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                found.add(reader.get_batch(index))
        if found.hexdigest() != self.digest:
            raise ValueError("the rows are not those that were written")
        self._ends = np.cumsum(found.sizes, dtype=np.int64)
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / ROWS)))
        self._held: tuple[int, list[Any]] = (-1, [])  # the batch looked at last

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = int(np.searchsorted(self._ends, index, side="right"))
        if self._held[0] != batch:
            self._held = (batch, _columns(self._reader.get_batch(batch)))
        return self._row(self._held[1], int(index) - int(self._ends[batch - 1] if batch else 0))


class Digest:
    """A digest of rows in their order; ``sizes`` are the rows of each batch."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.sizes: list[int] = []

    def add(self, batch: Any) -> None:
        self.sizes.append(batch.num_rows)
        for column in _columns(batch):
            for array in column if isinstance(column, tuple) else [column]:
                self._hash.update(len(array).to_bytes(8, "little"))
                self._hash.update(np.ascontiguousarray(array).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _source_report(account: dict[str, Any]) -> SourceReport:
    tallies = {name: Tally(**account[name]) for name in ("empty_answers", "equal_answers")}
    remarks = {what: Tally(**tally) for what, tally in account["remarks"].items()}
    return SourceReport(**{**account, **tallies, "remarks": remarks})


def _token_report(account: dict[str, Any]) -> TokenReport:
    left_out = {reason: Tally(**tally) for reason, tally in account["left_out"].items()}
    return TokenReport(**{**account, "left_out": left_out})


# -- the cache ---------------------------------------------------------------------------------------------------------


def stored(stage: Stage, name: str, key: str, make: Callable[[], Iterable[Made]], say: Callable[[str], None]) -> Store:
    """The rows that ``key`` stands for, from the cache if they are there, else made and kept.

    Processes that want the same rows at one time make them once. Where the cache cannot be written to, the rows are in
    a temporary folder for as long as they are used.
    """
    parent = cache_folder() / "rows"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(parent / f".{key}.lock", say)
    except OSError as error:
        say(f"the cache {parent} cannot be used ({error.strerror}): token rows are kept for this run alone")
        return temporary(stage, name, make)
    with lock:
        folder = parent / key
        if folder.exists():
            try:
                return Store(stage, folder, cached=True)
            except (ValueError, KeyError, TypeError, OSError):  # pyarrow's own errors are among these
                say(f"{folder} is damaged and is made again")
                shutil.rmtree(folder)
        beside = parent / f".{key}.partial"
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        try:
            _write(beside, name, make())
            os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return Store(stage, folder, cached=False)


def temporary(stage: Stage, name: str, make: Callable[[], Iterable[Made]]) -> Store:
    """Rows that no later run will find; they go when the store does."""
    holder = tempfile.TemporaryDirectory(prefix="rlhfkit-rows-")
    folder = Path(holder.name) / "rows"
    _write(folder, name, make())
    store = Store(stage, folder, cached=False)
    store.holder = holder  # type: ignore[attr-defined]  # its end is the folder's
    return store


def _locked(path: Path, say: Callable[[str], None]) -> IO[str]:
    """A lock that ends when the file is closed, or the process is."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process makes token rows of the same data: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _write(folder: Path, name: str, stretches: Iterable[Made]) -> None:
    import pyarrow

    folder.mkdir(parents=True)
    digest, source, tokens = Digest(), SourceReport(name), TokenReport()
    writer = None
    try:
        with pyarrow.OSFile(str(folder / ROWS), "wb") as file:
            for made in stretches:
                source.extend(made.source)
                tokens.extend(made.tokens)
                if writer is None:
                    writer = pyarrow.ipc.new_file(file, made.batch.schema)
                if made.batch.num_rows:
                    digest.add(made.batch)
                    writer.write_batch(made.batch)
            if writer is not None:
                writer.close()
        account = {"digest": digest.hexdigest(), "source": asdict(source), "tokens": asdict(tokens)}
        (folder / ACCOUNT).write_text(json.dumps(account), encoding="utf-8")
    except OSError as error:
        if error.errno is None:
            raise
        raise DataError(
            f"{folder}: token rows cannot be written: {os.strerror(error.errno)}",
            hint="make room, or put the cache elsewhere: RLHFKIT_CACHE=FOLDER",
        ) from error
