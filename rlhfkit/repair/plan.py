"""A repair as data: actions that can be shown before anything is written, and the one function that writes.

Several actions may concern one file: a plan folds them into a single write. Everything new is written beside the
folder and renamed into it, and what it replaces is kept in ``.rlhfkit-backup/<time>/`` of the repaired folder.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhfkit.errors import CheckpointError
from rlhfkit.repair.tensors import NewTensor, write_safetensors

BACKUP_FOLDER = ".rlhfkit-backup"
_STAGING = ".rlhfkit-repair"
_JOURNAL = "journal.json"


@dataclass(frozen=True, slots=True)
class CopyFile:
    """The file becomes a copy of ``source``, byte for byte unless a later action edits it."""

    source: Path


@dataclass(frozen=True, slots=True)
class WriteJson:
    """The file becomes this JSON object."""

    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WriteText:
    """The file becomes this text."""

    content: str


@dataclass(frozen=True, slots=True)
class EditJson:
    """Keys of a JSON file are set or dropped; every other key stays."""

    values: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """The file goes (into the backup)."""


@dataclass(frozen=True, slots=True)
class WriteWeights:
    """The file becomes a safetensors file of these tensors."""

    tensors: Mapping[str, NewTensor]


Change = CopyFile | WriteJson | WriteText | EditJson | RemoveFile | WriteWeights


@dataclass(frozen=True, slots=True)
class Action:
    """One line of the plan.

    Args:
        file: name inside the folder that is repaired.
        what: what changes, for the table.
        why: what is wrong without it, for the table.
        change: how ``apply`` does it.
    """

    file: str
    what: str
    why: str
    change: Change


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a repair would do to ``dst``, in order. ``notes`` are findings that need no change."""

    dst: Path
    actions: tuple[Action, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.actions

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights the plan writes."""
        return sum(
            tensor.nbytes
            for action in self.actions
            if isinstance(action.change, WriteWeights)
            for tensor in action.change.tensors.values()
        )

    @property
    def files(self) -> tuple[str, ...]:
        """Files the plan touches, each once."""
        return tuple(dict.fromkeys(action.file for action in self.actions))


def apply(plan: Plan, tick: Callable[[int], None] = lambda count: None) -> Path | None:
    """Carry a plan out.

    All new contents are on disk, beside the folder, before the first file is replaced: a full disk, Ctrl-C or a kill
    until then leaves the folder as it was, to the byte. Stopped between two renames, what is replaced comes back: at
    once where Python still runs, otherwise at the next call of `recover`, since a journal says what it was.

    Args:
        plan: what to do.
        tick: called with the number of bytes of weights that were written.

    Returns:
        The backup folder, or None when no existing file was replaced or removed.
    """
    recover(plan.dst)
    staging = _staging_folder(plan.dst)
    new, old = staging / "new", staging / "old"
    try:
        for folder in (staging, new, old):
            folder.mkdir()
        removed = [name for name in plan.files if not _stage(plan, name, new, tick)]
        replaced = [name for name in plan.files if (plan.dst / name).is_file()]
        for name in replaced:
            _keep(plan.dst / name, old / name)
        _write_durably(staging / _JOURNAL, json.dumps({"replaced": replaced, "files": plan.files}).encode())
        for folder in (new, old, staging):
            _sync_folder(folder)
        for name in plan.files:
            if name in removed:
                (plan.dst / name).unlink(missing_ok=True)
            else:
                os.replace(new / name, plan.dst / name)
        _sync_folder(plan.dst)
        return _put_away(old, plan.dst) if replaced else None
    except BaseException:
        recover(plan.dst)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def alone(dst: Path) -> Iterator[None]:
    """Keep a second repair away from a folder while one is at work.

    Raises:
        CheckpointError: there is one.
    """
    descriptor = os.open(dst, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another repair of {dst} is running", hint="wait until it is through") from error
        yield
    finally:
        os.close(descriptor)


def recover(dst: Path) -> bool:
    """Undo what an interrupted `apply` had begun, and clear away what it had prepared.

    Returns:
        Whether files of the folder were put back.
    """
    undone = False
    for staging in _staging_folders(dst):
        if _is_half_done(staging):
            journal = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
            for name in journal["files"]:
                if name in journal["replaced"]:
                    # A second name first: stopped here again, there is still something to put back.
                    _keep(staging / "old" / name, staging / f"back-{name}")
                    os.replace(staging / f"back-{name}", dst / name)
                else:
                    (dst / name).unlink(missing_ok=True)
            _sync_folder(dst)
            (staging / _JOURNAL).unlink()
            undone = True
        if staging.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
    return undone


def is_interrupted(dst: Path) -> bool:
    """Whether an `apply` was stopped between two renames, so that old and new files stand side by side."""
    return any(_is_half_done(staging) for staging in _staging_folders(dst))


def _is_half_done(staging: Path) -> bool:
    # What was replaced moves into the backup as the last act: without it there, everything was done.
    return (staging / _JOURNAL).is_file() and (staging / "old").is_dir()


def _staging_folders(dst: Path) -> tuple[Path, Path]:
    """Beside the folder, or inside where the folder above cannot be written or is another file system."""
    resolved = dst.resolve()
    return resolved.with_name(f".{resolved.name}{_STAGING}"), resolved / _STAGING


def _staging_folder(dst: Path) -> Path:
    beside, inside = _staging_folders(dst)
    same_disk = beside.parent.stat().st_dev == inside.parent.stat().st_dev
    return beside if same_disk and os.access(beside.parent, os.W_OK | os.X_OK) else inside


def _stage(plan: Plan, name: str, new: Path, tick: Callable[[int], None]) -> bool:
    """Write what a file is going to hold; False when it is going to be removed."""
    last = next(action.change for action in reversed(plan.actions) if action.file == name)
    if isinstance(last, WriteWeights):
        write_safetensors(new / name, dict(last.tensors), tick)
    else:
        content = _final_content(plan, name)
        if content is None:
            return False
        _write_durably(new / name, content)
    if (plan.dst / name).is_file():
        shutil.copymode(plan.dst / name, new / name)
    return True


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file, which costs no room; a copy where the file system gives no second names."""
    if path.is_symlink():  # a snapshot of the hub's cache: the file behind the link stays where it is
        copy.symlink_to(path.resolve())
        return
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _put_away(old: Path, dst: Path) -> Path:
    """Move what was replaced to where the user finds it."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = dst / BACKUP_FOLDER / stamp
    folder.parent.mkdir(exist_ok=True)
    os.replace(old, folder)
    return folder


def _final_content(plan: Plan, name: str) -> bytes | None:
    """What the file will hold after all of its actions; None when it is removed."""
    path = plan.dst / name
    content: bytes | None = None
    # Bytes are parsed only when an edit needs it: a file that is merely copied keeps its formatting.
    value: dict[str, Any] | None = None
    for action in plan.actions:
        if action.file != name:
            continue
        change = action.change
        if isinstance(change, RemoveFile):
            content, value = None, None
        elif isinstance(change, CopyFile):
            content, value = change.source.read_bytes(), None
        elif isinstance(change, WriteText):
            content, value = change.content.encode(), None
        elif isinstance(change, WriteJson):
            content, value = None, copy.deepcopy(dict(change.content))
        elif isinstance(change, EditJson):
            if value is None:
                value = json.loads((path.read_bytes() if content is None else content).decode("utf-8-sig"))
            value.update(copy.deepcopy(dict(change.values)))
            for key in change.drop:
                value.pop(key, None)
    if value is not None:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return content


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
