"""Code and paths that come with a model: what may run, and what may be read.

Nothing of a model folder runs unless ``--trust-remote-code`` is given. Then the code files are shown with their hashes
and pinned: code that changes afterwards is asked about again, or refused where nobody can be asked.
"""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhfkit.errors import ModelError, first_line
from rlhfkit.models.folder import read_json_object
from rlhfkit.repair.auto_map import code_files, owners
from rlhfkit.repair.folder import INDEX_FILE, Folder
from rlhfkit.words import tr

_FILES_WITH_CODE = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def pins_file() -> Path:
    """Where the hashes of trusted code are kept."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "rlhfkit" / "trust.yaml"


def code_options(path: str, trust: bool) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``: whether code of a model may run and, for a hub id, which revision.

    Args:
        path: model folder or hub id.
        trust: whether ``--trust-remote-code`` was given.

    Raises:
        ModelError: code that differs from what was trusted before, or code in somebody else's repository.
    """
    if not trust:
        return {"trust_remote_code": False}
    return dict(_trusted(path))


@cache  # asked about once, however many parts of a model are loaded
def _trusted(path: str) -> dict[str, Any]:
    folder = Path(path)
    options: dict[str, Any] = {"trust_remote_code": True}
    name = str(folder.resolve())
    if not folder.is_dir():
        folder, name = _fetch_code(path), path
        options["code_revision"] = folder.name  # what was hashed is what runs
    found = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.py"))
    }
    _refuse_code_elsewhere(folder, found)
    if not found:
        return {"trust_remote_code": False}
    _compare(name, found)
    return options


def _fetch_code(name: str) -> Path:
    """The code and settings of a hub repository; the folder's name is the commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.py", "*.json"], ignore_patterns=["*.index.json"]))
    except Exception as error:  # each layer of the hub client has its own errors
        raise ModelError(f"the code of {name} could not be fetched: {first_line(error)}") from error


def _refuse_code_elsewhere(folder: Path, found: dict[str, str]) -> None:
    """All that may run is among the files that were found, and hashed."""
    hint = "bring the code into the folder: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + str(folder)
    for name in _FILES_WITH_CODE:
        auto_map = read_json_object(folder / name).get("auto_map") if (folder / name).is_file() else None
        if others := owners(auto_map):
            raise ModelError(
                f"{folder / name} takes its code from {', '.join(others)}, not from its own folder: it can change "
                "there at any time",
                hint=hint,
            )
        if unseen := sorted(code_files(auto_map) - found.keys()):
            raise ModelError(
                f"{folder / name} names code in {unseen[0]}, which is no file of the folder that could be pinned",
                hint=hint,
            )
    # Loaders follow them when code imports from below; what lies behind them is not seen here.
    if link := next((entry for entry in sorted(folder.rglob("*")) if entry.is_symlink() and entry.is_dir()), None):
        raise ModelError(f"{link} leads out of the model's folder, and code behind it cannot be pinned", hint=hint)


def _compare(name: str, found: dict[str, str]) -> None:
    """Show the code and compare it with what was pinned; pin it if it may run."""
    pins = _read_pins()
    before = (pins.get(name) or {}).get("files")
    if before == found:
        return
    first = os.environ.get("RANK", "0") == "0"
    if first:
        _show(name, found, before or {})
    if before is not None and not _agreed(name):
        raise ModelError(
            f"the code of {name} is not the code that was trusted on {pins[name].get('since', 'an earlier day')}",
            hint=f"read what changed; then say yes on a terminal, or take its entry out of {pins_file()}",
        )
    if first:
        pins[name] = {"since": date.today().isoformat(), "files": found}
        _write_pins(pins)
        print(tr(f"pinned in {pins_file()}; if a file changes, it will not run unasked"), file=sys.stderr)


def _show(name: str, found: dict[str, str], before: dict[str, str]) -> None:
    print(tr(f"code of {name}, which --trust-remote-code lets run (sha256):"), file=sys.stderr)
    for file in sorted(found.keys() | before.keys()):
        state = ""
        if before and file not in before:
            state = tr("  NEW")
        elif file not in found:
            state = tr("  GONE")
        elif before and before[file] != found[file]:
            state = tr(f"  CHANGED, was {before[file]}")
        print(f"  {found.get(file, '-' * 64)}  {file}{state}", file=sys.stderr)


def _agreed(name: str) -> bool:
    """Ask, where there is somebody to ask: one process on a terminal."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(tr(f"Run the changed code of {name}? [y/N] "), end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _read_pins() -> dict[str, Any]:
    path = pins_file()
    if not path.is_file():
        return {}
    try:
        pins = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no valid YAML: {error}", hint="mend it, or move it away to pin anew") from error
    if not isinstance(pins, dict) or not all(isinstance(entry, dict) for entry in pins.values()):
        raise ModelError(f"{path} holds something else than pinned code", hint="mend it, or move it away to pin anew")
    return pins


def _write_pins(pins: dict[str, Any]) -> None:
    path = pins_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(yaml.safe_dump(pins, sort_keys=True, allow_unicode=True), encoding="utf-8")
    os.replace(partial, path)


def refuse_outside_paths(path: str) -> None:
    """A weight index may only name files of its own folder.

    Raises:
        RepairRefusedError: it names a path that leads elsewhere.
    """
    if Path(path).is_dir():
        folder = Folder(Path(path), "the model")
        for index in INDEX_FILE.values():
            folder.index_map(index)
