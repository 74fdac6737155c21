"""Actions fold into one write a file; writing is atomic and keeps what it replaces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from legacy_folders import read_json, write_json

from rlhfkit.repair.plan import Action, Change, CopyFile, EditJson, Plan, RemoveFile, WriteJson, apply


def plan(dst: Path, *changes: tuple[str, Change]) -> Plan:
    return Plan(dst, tuple(Action(name, "what", "why", change) for name, change in changes))


def test_edits_of_one_file_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "config.json", {"kept": "ü", "old": 1, "gone": True})
    replaced: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        replaced.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    backup = apply(
        plan(
            tmp_path,
            ("config.json", EditJson({"old": 2})),
            ("config.json", EditJson({"new": [None]}, drop=("gone",))),
        )
    )
    assert replaced[:-1] == ["config.json"]  # the last one is the backup
    assert list(read_json(tmp_path / "config.json").items()) == [("kept", "ü"), ("old", 2), ("new", [None])]
    assert "ü" in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert backup is not None
    assert read_json(backup / "config.json") == {"kept": "ü", "old": 1, "gone": True}


def test_copy_keeps_bytes_unless_it_is_edited(tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    source.write_text('{"a":1,\r\n "b":2}')
    dst = tmp_path / "dst"
    dst.mkdir()
    apply(
        plan(
            dst,
            ("plain.json", CopyFile(source)),
            ("edited.json", CopyFile(source)),
            ("edited.json", EditJson({"b": 3})),
        )
    )
    assert (dst / "plain.json").read_bytes() == source.read_bytes()
    assert read_json(dst / "edited.json") == {"a": 1, "b": 3}
    assert read_json(source) == {"a": 1, "b": 2}


def test_written_and_removed_files(tmp_path: Path) -> None:
    write_json(tmp_path / "stale.json", {"old": True})
    backup = apply(plan(tmp_path, ("new.json", WriteJson({"weight_map": {}})), ("stale.json", RemoveFile())))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rlhfkit-backup", "new.json"]
    assert backup is not None
    assert [path.name for path in backup.iterdir()] == ["stale.json"]


def test_failure_while_staging_changes_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(FileNotFoundError):
        apply(plan(tmp_path, ("a.json", EditJson({"a": 2})), ("b.py", CopyFile(tmp_path / "absent.py"))))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_failure_while_renaming_puts_back_what_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "b.json"):
        write_json(tmp_path / name, {"value": 1})
    replace = os.replace

    def fail_on_b(source: Path, target: Path) -> None:
        if target.name == "b.json" and source.parent.name == "new":
            raise OSError("gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_b)
    with pytest.raises(OSError, match="gone"):
        apply(plan(tmp_path, ("a.json", EditJson({"value": 2})), ("b.json", EditJson({"value": 2}))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert [read_json(tmp_path / name)["value"] for name in ("a.json", "b.json")] == [1, 1]


def test_mode_of_a_replaced_file_is_kept_and_a_new_one_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "old.json", {})
    (tmp_path / "old.json").chmod(0o640)
    umask = os.umask(0o022)
    try:
        apply(plan(tmp_path, ("old.json", EditJson({"a": 1})), ("new.json", WriteJson({}))))
    finally:
        os.umask(umask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("old.json", "new.json")] == [0o640, 0o644]


def test_two_repairs_have_two_backups(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    first = apply(plan(tmp_path, ("a.json", EditJson({"a": 2}))))
    second = apply(plan(tmp_path, ("a.json", EditJson({"a": 3}))))
    assert first is not None
    assert second is not None
    assert [read_json(folder / "a.json")["a"] for folder in (first, second)] == [1, 2]
