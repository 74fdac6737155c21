"""``auto_map``: which class in which code file stands for AutoConfig, AutoModel or AutoTokenizer.

A value is ``module.Class``, or a list of them with None for a tokenizer that does not exist. When a model was loaded by
hub id, old transformers save ``Owner/Name--module.Class``: the folder then loads only where that repository is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def without_owner(value: Any) -> Any:
    """The same value with every ``Owner/Name--`` removed; None entries stay None."""
    if isinstance(value, str):
        plain = value.split("--")[-1]
        # Some releases put the prefix in front of None, too.
        return None if plain == "None" else plain
    if isinstance(value, list):
        return [without_owner(item) for item in value]
    if isinstance(value, dict):
        return {key: without_owner(item) for key, item in value.items()}
    return value


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _references(item)


def owners(value: Any) -> list[str]:
    """The ``Owner/Name`` parts in an auto_map, each once."""
    return sorted({reference.split("--")[0] for reference in _references(value) if "--" in reference})


def code_files(value: Any) -> set[str]:
    """Names of the .py files that an auto_map (or one value of it) needs in the folder."""
    return {f"{reference.split('.')[0]}.py" for reference in _references(without_owner(value)) if "." in reference}


def class_names(auto_map: Any) -> dict[str, tuple[str, ...]]:
    """Auto class -> names of the classes it stands for, without module and owner."""
    if not isinstance(auto_map, dict):
        return {}
    return {
        key: tuple(item.split(".")[-1] for item in _references(without_owner(value))) for key, value in auto_map.items()
    }


def restored(src_map: Any, dst_map: Any, available: frozenset[str]) -> Any:
    """The auto_map DST should have: SRC's, without owner, plus what DST has beyond it.

    An entry of DST that SRC does not know loses its owner only when its code file is in one of the folders
    (``available``): without it, the hub is the only place it can come from.
    """
    plain = without_owner(src_map)
    if not isinstance(dst_map, dict) or not isinstance(plain, dict | None):
        return dst_map if plain is None else plain
    result = dict(plain or {})
    for key, value in dst_map.items():
        if key not in result:
            result[key] = without_owner(value) if code_files(value) <= available else value
    return result
