"""A repair as data: actions that can be shown before anything is written, and the one function that writes.

Several actions may concern one file: a plan folds them into a single write. Each new content is written beside its
target and renamed, and what it replaces is kept in ``.rlhfkit-backup/<time>/`` of the repaired folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

BACKUP_FOLDER = ".rlhfkit-backup"


@dataclass(frozen=True, slots=True)
class CopyFile:
    """The file becomes a copy of ``source``, byte for byte unless a later action edits it."""

    source: Path


@dataclass(frozen=True, slots=True)
class WriteJson:
    """The file becomes this JSON object."""

    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EditJson:
    """Keys of a JSON file are set or dropped; every other key stays."""

    values: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """The file goes (into the backup)."""


Change = CopyFile | WriteJson | EditJson | RemoveFile


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
    def files(self) -> tuple[str, ...]:
        """Files the plan touches, each once."""
        return tuple(dict.fromkeys(action.file for action in self.actions))


def apply(plan: Plan) -> Path | None:
    """Carry a plan out.

    All new contents are on disk before the first file is replaced, so that a full disk changes nothing. Stopped
    half-way between two renames, every file is whole, either old or new, and a second run does the rest.

    Returns:
        The backup folder, or None when no existing file was replaced or removed.
    """
    contents = {name: _final_content(plan, name) for name in plan.files}
    staged: dict[str, Path] = {}
    try:
        for name, content in contents.items():
            if content is not None:
                staged[name] = (plan.dst / name).with_name(f".{name}.rlhfkit-new")
                _write_durably(staged[name], content, like=plan.dst / name)
        backup = _back_up(plan.dst, [name for name in contents if (plan.dst / name).is_file()])
        for name in contents:
            if name in staged:
                os.replace(staged[name], plan.dst / name)
            else:
                (plan.dst / name).unlink(missing_ok=True)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    _sync_folder(plan.dst)
    return backup


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
        elif isinstance(change, WriteJson):
            content, value = None, copy.deepcopy(dict(change.content))
        else:
            if value is None:
                value = json.loads((path.read_bytes() if content is None else content).decode("utf-8-sig"))
            value.update(copy.deepcopy(dict(change.values)))
            for key in change.drop:
                value.pop(key, None)
    if value is not None:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return content


def _write_durably(path: Path, content: bytes, *, like: Path) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if like.is_file():
        shutil.copymode(like, path)


def _back_up(dst: Path, names: list[str]) -> Path | None:
    if not names:
        return None
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = dst / BACKUP_FOLDER / stamp
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy2(dst / name, folder / name)
    return folder


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
