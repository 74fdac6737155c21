"""A model folder under examination: what several checks need of it, and what a check says."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlhfkit.errors import FamilyError, RepairRefusedError, first_line
from rlhfkit.families.base import Family
from rlhfkit.families.registry import find_family
from rlhfkit.repair.files import is_vocabulary
from rlhfkit.repair.folder import Folder, WeightSet
from rlhfkit.repair.rules import CONFIG
from rlhfkit.repair.verify import is_remote

ADAPTER_CONFIG = "adapter_config.json"
RECORD = "rlhfkit.json"
ORIGINAL = "ORIGINAL"  # stands in a command for a folder that only the user knows
State = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Args:
        check: what was looked at.
        state: ``pass``, ``warn`` (works, but mind it) or ``fail`` (does not work, or not as meant).
        detail: what was found.
        fix: the command that mends it, or what to do by hand; empty when there is nothing to mend.
    """

    check: str
    state: State
    detail: str
    fix: str = ""


class Patient:
    """A model folder and what several checks need of it, each read once.

    Args:
        path: the folder.

    Raises:
        RepairRefusedError: ``path`` is no folder.
    """

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path, "M")
        self.path = path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json; for a LoRA folder its base's, if that is a folder here."""
        base = Path(str((self.adapter or {}).get("base_model_name_or_path") or ""))
        folder = Folder(base, "the base") if self.adapter is not None and base.is_dir() else self.folder
        return folder.json(CONFIG) or {}

    @cached_property
    def adapter(self) -> Mapping[str, Any] | None:
        """adapter_config.json of a LoRA folder; None for any other."""
        if ADAPTER_CONFIG not in self.folder.files:
            return None
        return self.folder.json(ADAPTER_CONFIG) or {}

    @cached_property
    def weights(self) -> WeightSet | RepairRefusedError:
        """Names and shapes, or why there are none."""
        try:
            return self.folder.weights
        except RepairRefusedError as error:
            return error

    @cached_property
    def is_reward_model(self) -> bool:
        recorded = (self.folder.json(RECORD) or {}).get("stage") == "rm"
        return recorded or any("SequenceClassification" in str(n) for n in self.config.get("architectures") or ())

    @cached_property
    def original(self) -> str:
        """The folder it came from, if its files name one that is here."""
        record = self.folder.json(RECORD) or {}
        for name in (record.get("base"), self.config.get("_name_or_path")):
            if name and (Path(name) / CONFIG).is_file() and not Path(name).samefile(self.path):
                return str(name)
        return ORIGINAL

    @property
    def repair(self) -> str:
        """The command that brings back what the folder lost."""
        return f"rlhfkit fix-checkpoint {self.original} {self.path}"

    @cached_property
    def family(self) -> Family | FamilyError:
        try:
            return find_family(self.config, where=str(self.path))
        except FamilyError as error:
            return error

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers builds it from data; a string says why there is none."""
        if is_remote(self.folder, "AutoTokenizer"):
            return "its class is code of the folder, which is not run"
        if not any(map(is_vocabulary, self.folder.files)):
            return "the folder holds no vocabulary"
        from transformers import AutoTokenizer

        try:
            with quiet():
                return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a class does with damaged files
            return f"transformers cannot load it: {first_line(error)}"


def some(names: Iterable[str], shown: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return f"{', '.join(listed[:shown])}{more}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers says on the way what the table says better."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
