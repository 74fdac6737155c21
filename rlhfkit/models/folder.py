"""What a model path names: a folder, a hub id, or a LoRA folder with its base."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhfkit.errors import ModelError, first_line
from rlhfkit.families.legacy import LegacyLayout

RECORD = "rlhfkit.json"  # what a run of ours writes beside its weights
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "qwen.tiktoken")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the parts of a model are.

    Args:
        path: what the user named.
        base: folder or hub id of the weights.
        adapter: LoRA folder on top of it, or None.
        config: the base's config.json.
        record: `rlhfkit.json` of the folder the user named, empty if there is none.
        legacy: the folder that ``base`` is converted from, empty where it is no copy.
        layout: of a legacy checkpoint that is not converted, but read and written as it is; None for all others.
    """

    path: str
    base: str
    adapter: str | None
    config: dict[str, Any]
    record: dict[str, Any]
    legacy: str = ""
    layout: LegacyLayout | None = None

    @property
    def tokenizer_path(self) -> str:
        """The adapter's own tokenizer if it has one: it may hold tokens that the base does not know."""
        if self.adapter is not None and has_tokenizer(self.adapter):
            return self.adapter
        return self.base

    @property
    def positions(self) -> int:
        """Most tokens that the model was made for; 0 if its config.json names no limit."""
        kept = self.config.get("model_max_length") if self.layout is not None else None
        return int(self.config.get("max_position_embeddings") or kept or 0)

    @property
    def is_reward_model(self) -> bool:
        return self.record.get("stage") == "rm" or any(
            "SequenceClassification" in name for name in self.config.get("architectures") or ()
        )


def has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def open_model(path: str, *, adapter: str = "") -> ModelSource:
    """Find out what ``path`` is, reading no weights.

    Args:
        path: folder or hub id; may be empty when ``adapter`` names its base itself.
        adapter: a LoRA folder to put on top.

    Raises:
        ModelError: nothing there, no config, no tokenizer, or a LoRA folder whose base cannot be found.
    """
    named = path or adapter
    folder = Path(named).expanduser()
    if not folder.is_dir() and _looks_local(named):
        near = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())[:8] if folder.parent.is_dir() else []
        raise ModelError(
            f"no model folder at {named}",
            hint=f"near it in {folder.parent}: {', '.join(near)}"
            if near
            else "check the path, or give a hub id such as owner/name",
        )
    record = read_json_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    if folder.is_dir() and (folder / "adapter_config.json").is_file():
        if adapter and path:
            raise ModelError(f"{path} is a LoRA folder itself", hint="give the base as --model, or leave --adapter out")
        base = str(read_json_object(folder / "adapter_config.json").get("base_model_name_or_path") or "")
        return _with_adapter(named, base, str(folder), record)
    if adapter:
        adapter_folder = Path(adapter).expanduser()
        if not (adapter_folder / "adapter_config.json").is_file():
            raise ModelError(f"{adapter} is no LoRA folder: it has no adapter_config.json")
        record = read_json_object(adapter_folder / RECORD) if (adapter_folder / RECORD).is_file() else {}
        return _with_adapter(adapter, path, str(adapter_folder), record)
    # Absolute, since it is written into adapters, which are used from other working directories.
    base = str(folder.resolve()) if folder.is_dir() else named
    return _native(ModelSource(named, base, None, _read_config(named), record))


def _with_adapter(named: str, base: str, adapter: str, record: dict[str, Any]) -> ModelSource:
    if not base or (_looks_local(base) and not Path(base).is_dir()):
        raise ModelError(
            f"{named} is a LoRA folder whose base '{base}' is not there",
            hint="move the base back, or mend base_model_name_or_path in adapter_config.json",
        )
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    return _native(ModelSource(named, base, adapter, _read_config(base), record))


def _native(source: ModelSource) -> ModelSource:
    """The same, or with the converted copy of a legacy checkpoint as its base."""
    from rlhfkit.models.converted import folder_of, is_legacy, open_legacy, own_layout

    if not is_legacy(source.config):
        return source
    if (layout := own_layout(source.config)) is not None:
        return replace(source, base=str(folder_of(source.base)), layout=layout)
    copy, legacy = open_legacy(source.base)
    return replace(
        source,
        base=str(copy),
        legacy=legacy,
        config=read_json_object(copy / "config.json"),
        record=source.record or read_json_object(copy / RECORD),
    )


def _read_config(path: str) -> dict[str, Any]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            if (folder / "final").is_dir():
                hint = f"this is the folder of a run; its model is {folder / 'final'}"
            else:
                hint = "a broken model folder is mended by: rlhfkit fix-checkpoint SRC DST"
            raise ModelError(f"{path} is no model folder: it has no config.json (found: {found})", hint=hint)
        return read_json_object(folder / "config.json")
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(path)
    except OSError as error:
        import os

        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise ModelError(
                f"'{path}' is no folder here and not in the cache, and HF_HUB_OFFLINE forbids downloads",
                hint="check the name, give a folder, or unset HF_HUB_OFFLINE",
            ) from error
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise ModelError(
            f"'{path}' is no folder here, and {endpoint} did not give it: {first_line(error)}",
            hint="check the name; try a mirror with --hf-endpoint, or download the model and give its folder",
        ) from error
    return dict(config)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: it holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is no valid JSON: {error}", hint="restore it from the original model folder"
        ) from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()
