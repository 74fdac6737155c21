"""Is a repaired folder whole? Checked on what is on disk, without running any code of either folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from rlhfkit.errors import first_line
from rlhfkit.repair.auto_map import code_files
from rlhfkit.repair.files import imported_files, is_vocabulary
from rlhfkit.repair.fit import is_tied, source_tensors, stray_tensors
from rlhfkit.repair.folder import INDEX_FILE, KINDS, Folder, embedding_name, head_name, highest_token
from rlhfkit.repair.rules import (
    CONFIG,
    FAST_TOKENIZER,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    TOKENS_MAP,
    own_vocabulary,
    plan_repair,
    same_bytes,
)
from rlhfkit.repair.weights import WeightWork

# Scripts, digits, white space and code: what tokenizers disagree on.
PROBE = "Hello, 世界! 1 + 12 = 13\n\tdef f(x):  return x  # naïve"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the verification. ``warning`` is for what may be meant so."""

    name: str
    state: Literal["ok", "warning", "failed"]
    detail: str


def verify(src: Folder, dst: Folder, work: WeightWork | None = None) -> tuple[Check, ...]:
    """All checks of a folder that should be whole by now.

    Args:
        src: the original model folder.
        dst: the repaired one, read anew after the repair.
        work: what was asked to be done to its weights.
    """
    return (
        _json_files(src, dst),
        _config_loads(dst),
        _vocabulary(dst),
        _tensors(src, dst),
        _indexes(dst),
        _code(src, dst),
        _tokenizer_files(src, dst),
        _probe_ids(src, dst),
        _nothing_left(src, dst, work),
    )


def _check(name: str, problem: str, fine: str) -> Check:
    return Check(name, "failed" if problem else "ok", problem or fine)


def _json_files(src: Folder, dst: Folder) -> Check:
    names = [
        CONFIG,
        *sorted((src.files | dst.files) & {TOKENIZER_CONFIG, TOKENS_MAP, GENERATION_CONFIG, FAST_TOKENIZER}),
    ]
    names = [name for name in names if name in dst.files or name in (CONFIG, TOKENIZER_CONFIG)]
    broken = [name for name in names if dst.json(name) is None]
    return _check("JSON files", f"no JSON object in {', '.join(broken)}" if broken else "", f"{', '.join(names)} parse")


def _vocabulary(dst: Folder) -> Check:
    tensors = dst.weights.tensors
    embedding, head = embedding_name(tensors), head_name(tensors)
    rows = tensors[embedding].shape[0] if embedding else -1
    stated = (dst.json(CONFIG) or {}).get("vocab_size")
    if stated != rows or (head and tensors[head].shape[0] != rows):
        return Check("vocabulary", "failed", f"config.json says {stated}, the embedding has {rows} rows")
    highest, token = highest_token(dst)
    if highest >= rows:
        detail = f"the token {token!r} has id {highest}, but the embedding ends at row {rows - 1}"
        return Check("vocabulary", "warning", f"{detail}: resize the model before that token is used")
    return Check("vocabulary", "ok", f"vocab_size {rows} = rows of {embedding}{f' and {head}' if head else ''}")


def _tensors(src: Folder, dst: Folder) -> Check:
    theirs, remark = source_tensors(src)
    count = len(dst.weights.tensors)
    if not theirs:
        return Check("tensors", "warning", f"{count} in DST; {remark}")
    missing, unexpected = stray_tensors(theirs, dst.weights.tensors, tied=is_tied(src, dst))
    problem = f"{len(missing)} missing, {len(unexpected)} not known to SRC" if missing or unexpected else ""
    return _check("tensors", problem, f"{count}, none missing and none unexpected{f' ({remark})' if remark else ''}")


def _indexes(dst: Folder) -> Check:
    weights = dst.weights
    stale = [INDEX_FILE[kind] for kind in KINDS if dst.index_is_stale(INDEX_FILE[kind])]
    if weights.index and dst.index_map(weights.index) != weights.weight_map:
        stale.append(weights.index)
    fine = f"{weights.index} names every tensor in its file" if weights.index else f"{weights.files[0]} needs no index"
    return _check("weight index", f"{', '.join(stale)} does not fit the weights" if stale else "", fine)


def _code(src: Folder, dst: Folder) -> Check:
    needed: set[str] = set()
    for name in (CONFIG, TOKENIZER_CONFIG):
        needed |= code_files((dst.json(name) or {}).get("auto_map"))
    for name in sorted(name for name in dst.files if name.endswith(".py")):
        needed |= imported_files(dst.path / name)
    absent = sorted(needed - dst.files)
    if absent and src.path.resolve() == dst.path.resolve():
        return _check(
            "code files", "", f"{', '.join(absent)} is absent as before: there is no other SRC to take it from"
        )
    problem = f"{', '.join(absent)} is needed by auto_map or by an import, and absent" if absent else ""
    return _check("code files", problem, f"{len(needed)} needed, all there" if needed else "none needed")


def _tokenizer_files(src: Folder, dst: Folder) -> Check:
    own = own_vocabulary(src, dst)
    absent = sorted(name for name in src.files - dst.files if is_vocabulary(name))
    if absent and not own:
        return Check("tokenizer files", "failed", f"{', '.join(absent)} of SRC is absent")
    equal = sorted(name for name in dst.files if is_vocabulary(name) and same_bytes(src, dst, name))
    parts = [f"{', '.join(equal)} equal to SRC's"] if equal else []
    parts += [f"{', '.join(own)} DST's own"] if own else []
    return Check("tokenizer files", "ok", "; ".join(parts) or "neither folder has any")


def _probe_ids(src: Folder, dst: Folder) -> Check:
    """Ids of one text by both tokenizers, where transformers can build them from data alone."""
    name = "probe text"
    if not any(map(is_vocabulary, src.files)):
        return Check(name, "ok", "not encoded: SRC has no tokenizer")
    if any(is_remote(folder, "AutoTokenizer") for folder in (src, dst)):
        return _same_by_construction(src, dst)
    theirs = _encode(src)
    if isinstance(theirs, str):
        return Check(name, "warning", f"not encoded: transformers cannot load SRC's tokenizer ({theirs})")
    ours = _encode(dst)
    if isinstance(ours, str):
        return Check(name, "failed", f"transformers cannot load the tokenizer: {ours}")
    if ours == theirs:
        return Check(name, "ok", f"{len(ours)} ids, equal to SRC's")
    # Every lost file and flag is back by now, so a difference comes from something that DST sets itself.
    own = own_vocabulary(src, dst) or _own_settings(src, dst)
    detail = f"the ids differ from SRC's: {_shown(ours)} against {_shown(theirs)}"
    if not own:
        return Check(name, "failed", detail)
    return Check(name, "warning", f"{detail}. DST has its own {', '.join(own)}: right only if that is meant")


def is_remote(folder: Folder, auto_class: str) -> bool:
    """Whether code of the folder stands for an auto class."""
    return any(auto_class in ((folder.json(file) or {}).get("auto_map") or {}) for file in (CONFIG, TOKENIZER_CONFIG))


def _same_by_construction(src: Folder, dst: Folder) -> Check:
    """A tokenizer that is code of the folder is not run: equal vocabulary, code and settings give equal ids."""
    code = {
        file
        for folder in (src, dst)
        for name in (CONFIG, TOKENIZER_CONFIG)
        for file in code_files(((folder.json(name) or {}).get("auto_map") or {}).get("AutoTokenizer"))
    }
    vocabulary = {name for name in src.files | dst.files if is_vocabulary(name)}
    other = sorted(name for name in code | vocabulary if not same_bytes(src, dst, name)) + _own_settings(src, dst)
    not_run = "the tokenizer is code of the folder, which is not run"
    if other:
        return Check("probe text", "warning", f"{not_run}; DST has its own {', '.join(other)}, so ids may differ")
    return Check("probe text", "ok", f"{not_run}; its vocabulary, code, class and flags equal SRC's, hence its ids")


def _config_loads(dst: Folder) -> Check:
    """transformers reads config.json, where the class is its own and not code of the folder."""
    name = "config"
    config = dst.json(CONFIG) or {}
    if is_remote(dst, "AutoConfig"):
        return Check(name, "ok", "not built: its class is code of the folder, which is not run")
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(str(dst.path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a class does with values that are out of its range
        return Check(name, "failed", f"transformers cannot load config.json: {first_line(error)}")
    return Check(name, "ok", f"loads as {type(loaded).__name__} (model_type {config.get('model_type')})")


def _encode(folder: Folder) -> list[int] | str:
    """Ids of the probe text, or why there are none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder.path), trust_remote_code=False, local_files_only=True)
        return [int(i) for i in tokenizer(PROBE)["input_ids"]]
    # The reason may come from any of several libraries; it is shown, never swallowed.
    except Exception as error:
        return first_line(error)


def _own_settings(src: Folder, dst: Folder) -> list[str]:
    theirs, ours = src.json(TOKENIZER_CONFIG) or {}, dst.json(TOKENIZER_CONFIG) or {}
    keys = ("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
    return [key for key in keys if ours.get(key) != theirs.get(key)]


def _shown(ids: list[int]) -> str:
    return json.dumps(ids[:8])[:-1] + (", …]" if len(ids) > 8 else "]")


def _nothing_left(src: Folder, dst: Folder, work: WeightWork | None) -> Check:
    left: Any = plan_repair(src, dst, work).actions
    problem = f"a second run would still change {', '.join(sorted({a.file for a in left}))}" if left else ""
    return _check("second run", problem, "would change nothing")
