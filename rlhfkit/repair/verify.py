"""Is a repaired folder whole? Checked on what is on disk, without running any code of either folder."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import Any, Literal

from rlhfkit.repair.auto_map import code_files
from rlhfkit.repair.files import is_vocabulary
from rlhfkit.repair.fit import is_tied, source_tensors, stray_tensors
from rlhfkit.repair.folder import INDEX_FILE, KINDS, Folder, embedding_name, head_name
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

# Scripts, digits, white space and code: what tokenizers disagree on.
PROBE = "Hello, 世界! 1 + 12 = 13\n\tdef f(x):  return x  # naïve"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the verification. ``warning`` is for what may be meant so."""

    name: str
    state: Literal["ok", "warning", "failed"]
    detail: str


def verify(src: Folder, dst: Folder) -> tuple[Check, ...]:
    """All checks of a folder that should be whole by now.

    Args:
        src: the original model folder.
        dst: the repaired one, read anew after the repair.
    """
    return (
        _json_files(src, dst),
        _vocabulary(dst),
        _tensors(src, dst),
        _indexes(dst),
        _code(src, dst),
        _tokenizer_files(src, dst),
        _probe_ids(src, dst),
        _nothing_left(src, dst),
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
    highest, token = _highest_added(dst)
    if highest >= rows:
        detail = f"the added token {token!r} has id {highest}, but the embedding ends at row {rows - 1}"
        return Check("vocabulary", "warning", f"{detail}: resize the model before that token is used")
    return Check("vocabulary", "ok", f"vocab_size {rows} = rows of {embedding}{f' and {head}' if head else ''}")


def _highest_added(dst: Folder) -> tuple[int, str]:
    """Highest id of an added token that the tokenizer files speak of."""
    found: list[tuple[int, str]] = [(-1, "")]
    for token in (dst.json(FAST_TOKENIZER) or {}).get("added_tokens") or []:
        found.append((int(token["id"]), str(token["content"])))
    for index, token in ((dst.json(TOKENIZER_CONFIG) or {}).get("added_tokens_decoder") or {}).items():
        found.append((int(index), str(token["content"])))
    return max(found)


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
        needed |= _relative_imports(dst, name)
    absent = sorted(needed - dst.files)
    problem = f"{', '.join(absent)} is needed by auto_map or by an import, and absent" if absent else ""
    return _check("code files", problem, f"{len(needed)} needed, all there" if needed else "none needed")


def _relative_imports(folder: Folder, name: str) -> set[str]:
    """Files that a code file imports from its own folder, by reading its text."""
    try:
        tree = ast.parse((folder.path / name).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return set()
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules |= {node.module} if node.module else {alias.name for alias in node.names}
    return {f"{module.split('.')[0]}.py" for module in modules}


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
    for folder in (src, dst):
        for file in (CONFIG, TOKENIZER_CONFIG):
            if "AutoTokenizer" in ((folder.json(file) or {}).get("auto_map") or {}):
                return Check(name, "ok", "not encoded: the tokenizer is code of the folder, and no code is run")
    if not any(map(is_vocabulary, src.files)):
        return Check(name, "ok", "not encoded: SRC has no tokenizer")
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


def _encode(folder: Folder) -> list[int] | str:
    """Ids of the probe text, or why there are none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder.path), trust_remote_code=False, local_files_only=True)
        return [int(i) for i in tokenizer(PROBE)["input_ids"]]
    # The reason may come from any of several libraries; it is shown, never swallowed.
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]


def _own_settings(src: Folder, dst: Folder) -> list[str]:
    theirs, ours = src.json(TOKENIZER_CONFIG) or {}, dst.json(TOKENIZER_CONFIG) or {}
    keys = ("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
    return [key for key in keys if ours.get(key) != theirs.get(key)]


def _shown(ids: list[int]) -> str:
    return json.dumps(ids[:8])[:-1] + (", …]" if len(ids) > 8 else "]")


def _nothing_left(src: Folder, dst: Folder) -> Check:
    left: Any = plan_repair(src, dst).actions
    problem = f"a second run would still change {', '.join(sorted({a.file for a in left}))}" if left else ""
    return _check("second run", problem, "would change nothing")
