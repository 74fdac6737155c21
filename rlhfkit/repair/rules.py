"""What is wrong with a fine-tuned folder: one function a rule, each ``(src, dst) -> actions``, none of which writes.

A rule on a JSON file starts from the content the file is going to have: DST's own or, where DST has none, the copy of
SRC's that ``missing_files`` and ``config_missing`` plan. So a repaired folder gives no action.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable, Mapping
from typing import Any

from rlhfkit.repair.auto_map import owners, restored
from rlhfkit.repair.files import imported_files, is_vocabulary, reason_to_copy
from rlhfkit.repair.fit import SIZE_KEYS, refuse_unless_fitting, size_of, source_tensors
from rlhfkit.repair.folder import INDEX_FILE, KINDS, SINGLE_FILE, Folder, embedding_name
from rlhfkit.repair.plan import Action, CopyFile, EditJson, Plan, RemoveFile, WriteJson, WriteText
from rlhfkit.repair.weights import WeightWork, plan_weights

Rule = Callable[[Folder, Folder], list[Action]]

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
FAST_TOKENIZER = "tokenizer.json"
_TEMPLATE_FILES = frozenset({"chat_template.jinja", "chat_template.json"})


def plan_repair(src: Folder, dst: Folder, work: WeightWork | None = None) -> Plan:
    """Everything that is to be done to DST.

    Args:
        src: the original model folder; with ``work`` it may be DST itself.
        dst: the folder to repair.
        work: what is to be done to weight files; nothing if not given.

    Raises:
        RepairRefusedError: the folders do not belong together, or DST's weights cannot be read or rewritten.
    """
    refuse_unless_fitting(src, dst, one_folder=bool(work))
    actions: list[Action] = []
    notes = _notes(src, dst)
    if work:
        weights, actions, remarks = plan_weights(src, dst, work)
        dst, notes = dst.with_weights(weights), notes + remarks
    actions += [action for rule in RULES for action in rule(src, dst)]
    return Plan(dst.path, tuple(actions), tuple(notes))


def same_bytes(src: Folder, dst: Folder, name: str) -> bool:
    """Whether both folders hold a file, with the same content."""
    return name in src.files & dst.files and filecmp.cmp(src.path / name, dst.path / name, shallow=False)


def own_vocabulary(src: Folder, dst: Folder) -> list[str]:
    """Vocabulary files of DST that are not SRC's: training saved or extended a tokenizer of its own."""
    return sorted(
        name for name in dst.files if is_vocabulary(name) and not dst.is_broken(name) and not same_bytes(src, dst, name)
    )


def has_converted_tokenizer(src: Folder, dst: Folder) -> bool:
    """Whether DST replaced SRC's tokenizer class by another one that reads a tokenizer.json SRC never had."""
    ours = (dst.json(TOKENIZER_CONFIG) or {}).get("tokenizer_class")
    theirs = (src.json(TOKENIZER_CONFIG) or {}).get("tokenizer_class")
    return FAST_TOKENIZER in dst.files - src.files and bool(ours) and ours != theirs


def _base(src: Folder, dst: Folder, name: str) -> Mapping[str, Any]:
    """The JSON object that an edit of ``name`` starts from; empty when neither folder has the file."""
    own = dst.json(name)
    return own if own is not None else src.json(name) or {}


def _lost(value: Any) -> bool:
    return value is None or value == ""


def _edit(name: str, base: Mapping[str, Any], values: Mapping[str, Any], why: str) -> list[Action]:
    """One action for every key whose value changes."""
    return [
        Action(name, f"{key}: {_shown(base.get(key))} → {_shown(value)}", why, EditJson({key: value}))
        for key, value in values.items()
        if key not in base or base[key] != value
    ]


def _auto_map(name: str, src: Folder, dst: Folder, base: Mapping[str, Any]) -> list[Action]:
    """auto_map points into the folder, not into somebody's hub repository."""
    own = base.get("auto_map")
    wanted = restored((src.json(name) or {}).get("auto_map"), own, src.files | dst.files)
    if not wanted or wanted == own:
        return []
    hub = ", ".join(owners(own))
    what = f"auto_map: '{hub}--' removed" if hub else "auto_map: restored"
    why = f"code would be fetched from {hub}, not from this folder" if hub else "the code in the folder is found by it"
    return [Action(name, what, why, EditJson({"auto_map": wanted}))]


def _shown(value: Any, limit: int = 60) -> str:
    text = "(absent)" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# ---------------------------------------------------------------- files


def missing_files(src: Folder, dst: Folder) -> list[Action]:
    """Copy what DST lacks of the original's code, tokenizer, generation settings and licence."""
    actions = []
    for name in sorted(src.files):
        why = reason_to_copy(name)
        broken = dst.is_broken(name) and not src.is_broken(name)
        if why and (name not in dst.files or broken) and not _would_shadow(src, dst, name):
            what = "replaced by SRC's: the file is empty or damaged" if broken else "copied from SRC"
            actions.append(Action(name, what, why, CopyFile(src.path / name)))
    return actions


def package_marker(src: Folder, dst: Folder) -> list[Action]:
    """``from . import name`` reads the folder as a package; SRC's own ``__init__.py`` came with the missing files."""
    if "__init__.py" in src.files | dst.files:
        return []
    for name in sorted(name for name in src.files | dst.files if name.endswith(".py")):
        folder = dst if name in dst.files else src
        if "__init__.py" in imported_files(folder.path / name):
            why = f"{name} imports from its own folder, which must be a package for that"
            return [Action("__init__.py", "created, empty", why, WriteText(""))]
    return []


def _would_shadow(src: Folder, dst: Folder, name: str) -> bool:
    """Whether a copy would take the place of something that DST has under another name."""
    if name in _TEMPLATE_FILES:
        return bool(dst.files & _TEMPLATE_FILES - {name}) or bool(
            (dst.json(TOKENIZER_CONFIG) or {}).get("chat_template")
        )
    if is_vocabulary(name):
        # An extended tokenizer.model next to SRC's tokenizer.json would never be read again. The other way round is
        # harmless: a tokenizer.json always wins.
        harmless = {name, FAST_TOKENIZER} if name == FAST_TOKENIZER else {name, FAST_TOKENIZER, "added_tokens.json"}
        return bool(set(own_vocabulary(src, dst)) - harmless)
    return False


# ---------------------------------------------------------------- config.json


def config_missing(src: Folder, dst: Folder) -> list[Action]:
    """A folder with weights only gets SRC's config.json as a start."""
    if dst.json(CONFIG) is not None:
        return []
    what = "replaced by SRC's: it does not parse" if CONFIG in dst.files else "created from SRC's"
    return [Action(CONFIG, what, "no loader knows the model without it", CopyFile(src.path / CONFIG))]


def config_auto_map(src: Folder, dst: Folder) -> list[Action]:
    """Where the model's code is found."""
    return _auto_map(CONFIG, src, dst, _base(src, dst, CONFIG))


def config_identity(src: Folder, dst: Folder) -> list[Action]:
    """What kind of model this is."""
    theirs, base = src.json(CONFIG) or {}, _base(src, dst, CONFIG)
    keys = ("architectures", "model_type", "tokenizer_class")
    return _edit(
        CONFIG, base, {k: theirs[k] for k in keys if not _lost(theirs.get(k))}, "loaders choose the class by it"
    )


def config_precision_flags(src: Folder, dst: Folder) -> list[Action]:
    """A load on a CPU pins ``fp32: true`` and ``use_flash_attn: false``, which later loads obey or refuse."""
    theirs, base = src.json(CONFIG) or {}, _base(src, dst, CONFIG)
    why = "the machine that trained pinned it; asking for another precision later raises an assertion"
    return _edit(CONFIG, base, {k: theirs[k] for k in ("bf16", "fp16", "fp32", "use_flash_attn") if k in theirs}, why)


def config_lost_sizes(src: Folder, dst: Folder) -> list[Action]:
    """A size that DST's config.json does not say at all; one that differs was refused before."""
    theirs, base = src.json(CONFIG) or {}, _base(src, dst, CONFIG)
    values = {
        name: theirs[name]
        for names in SIZE_KEYS
        for name in names
        if theirs.get(name) is not None and size_of(base, names) is None
    }
    return _edit(CONFIG, base, values, "without it the class's default size is built, which fits no weight")


def config_vocab_size(src: Folder, dst: Folder) -> list[Action]:
    """The embedding decides how many rows the model has: not SRC, which may be smaller, nor a config left behind."""
    base, tensors = _base(src, dst, CONFIG), dst.weights.tensors
    rows = tensors[embedding_name(tensors) or ""].shape[0]
    keys = [key for key in ("vocab_size", "padded_vocab_size") if key == "vocab_size" or key in base]
    why = "the embedding in the weights has as many rows; any other number stops loading or draws a new embedding"
    return _edit(CONFIG, base, dict.fromkeys(keys, rows), why)


# ---------------------------------------------------------------- tokenizer_config.json


def tokenizer_class(src: Folder, dst: Folder) -> list[Action]:
    """auto_map and class of the tokenizer; a tokenizer that DST converted keeps its own."""
    base, theirs = _base(src, dst, TOKENIZER_CONFIG), src.json(TOKENIZER_CONFIG) or {}
    if not base or has_converted_tokenizer(src, dst):
        return []
    actions = _auto_map(TOKENIZER_CONFIG, src, dst, base)
    # With a tokenizer.json of its own a save may have chosen the class that reads it; without, the class must be SRC's.
    name = theirs.get("tokenizer_class")
    if not _lost(name) and (_lost(base.get("tokenizer_class")) or FAST_TOKENIZER not in dst.files):
        actions += _edit(TOKENIZER_CONFIG, base, {"tokenizer_class": name}, "loaders choose the tokenizer by it")
    return actions


def tokenizer_flags(src: Folder, dst: Folder) -> list[Action]:
    """Flags whose loss changes ids without a word: transformers 5 drops the first two on every save."""
    base, theirs = _base(src, dst, TOKENIZER_CONFIG), src.json(TOKENIZER_CONFIG) or {}
    if not base or has_converted_tokenizer(src, dst):
        return []
    keys = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
    values = {key: theirs[key] for key in keys if theirs.get(key) is not None and base.get(key) is None}
    return _edit(TOKENIZER_CONFIG, base, values, "without it the class's default holds, and ids change silently")


def tokenizer_special_tokens(src: Folder, dst: Folder) -> list[Action]:
    """Special tokens that a save lost. Tokens that DST added or replaced stay."""
    base, theirs = _base(src, dst, TOKENIZER_CONFIG), src.json(TOKENIZER_CONFIG) or {}
    if not base:
        return []
    values = {key: value for key, value in theirs.items() if _is_token(key, value) and _lost(base.get(key))}
    key, tokens = _all_additional(theirs, base)
    if key:
        values[key] = tokens
    decoder = _all_added(theirs, base, _fast_tokens(dst))
    if decoder:
        values["added_tokens_decoder"] = decoder
    return _edit(TOKENIZER_CONFIG, base, values, "a special token that SRC has and the save lost")


def _is_token(key: str, value: Any) -> bool:
    """``eos_token`` and its like; ``add_eos_token`` is a flag."""
    return key.endswith("_token") and isinstance(value, str | dict) and bool(value)


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _additional(config: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Key and value of the further special tokens; transformers 5 gave the key a new name."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), list):
            return key, config[key]
    return "", []


def _all_additional(theirs: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """SRC's further tokens and then DST's; an empty key when none of SRC's is lost."""
    (src_key, src_tokens), (dst_key, dst_tokens) = _additional(theirs), _additional(base)
    own = {_content(token): token for token in dst_tokens}
    if all(_content(token) in own for token in src_tokens):
        return "", []
    first = [own.pop(_content(token), token) for token in src_tokens]
    return dst_key or src_key, first + list(own.values())


def _all_added(theirs: Mapping[str, Any], base: Mapping[str, Any], known: set[str]) -> dict[str, Any] | None:
    """Added tokens by id, where SRC's entry is lost; an id or a string that DST uses otherwise is DST's."""
    src_added, dst_added = theirs.get("added_tokens_decoder"), base.get("added_tokens_decoder") or {}
    if not isinstance(src_added, dict) or not isinstance(dst_added, dict):
        return None
    known = known | {_content(token) for token in dst_added.values()}
    lost = {i: token for i, token in src_added.items() if i not in dst_added and _content(token) not in known}
    merged = {**dst_added, **lost}
    return dict(sorted(merged.items(), key=lambda item: int(item[0]))) if lost else None


def _fast_tokens(dst: Folder) -> set[str]:
    """Strings of the added tokens in DST's tokenizer.json."""
    added = (dst.json(FAST_TOKENIZER) or {}).get("added_tokens") or []
    return {_content(token) for token in added}


def tokenizer_chat_template(src: Folder, dst: Folder) -> list[Action]:
    """A template that SRC keeps in tokenizer_config.json, when DST has none anywhere."""
    base, theirs = _base(src, dst, TOKENIZER_CONFIG), src.json(TOKENIZER_CONFIG) or {}
    template = theirs.get("chat_template")
    if not base or not template or base.get("chat_template") or (src.files | dst.files) & _TEMPLATE_FILES:
        return []
    return _edit(TOKENIZER_CONFIG, base, {"chat_template": template}, "the format of a conversation was lost")


def special_tokens_map(src: Folder, dst: Folder) -> list[Action]:
    """The map transformers 4 reads last: complete, and never against the tokens in DST's tokenizer_config.json."""
    theirs = src.json(TOKENS_MAP)
    if theirs is None:
        return []
    own, settings = dst.json(TOKENS_MAP), dst.json(TOKENIZER_CONFIG) or {}
    values: dict[str, Any] = {}
    for key, value in theirs.items():
        chosen = settings.get(key)
        if own is None and _is_token(key, chosen) and _content(chosen) != _content(value):
            values[key] = chosen
        elif own is not None and _is_token(key, value) and _lost(own.get(key)):
            values[key] = chosen if _is_token(key, chosen) else value
    key, tokens = _all_additional(_merged_additional(theirs, settings, own), own if own is not None else theirs)
    if key:
        values[key] = tokens
    base = own if own is not None else theirs
    return _edit(TOKENS_MAP, base, {key: _plain_token(value) for key, value in values.items()}, "a lost or other token")


def _merged_additional(
    theirs: Mapping[str, Any], settings: Mapping[str, Any], own: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Further tokens that the map must name: SRC's and, in a map that is copied, those DST's settings add."""
    key, tokens = _additional(theirs)
    if not key:
        return {}
    added = [] if own is not None else _additional(settings)[1]
    known = {_content(token) for token in tokens}
    return {key: [*tokens, *(_plain_token(token) for token in added if _content(token) not in known)]}


def _plain_token(value: Any) -> Any:
    """tokenizer_config.json marks tokens with their type; special_tokens_map.json does not."""
    return {key: item for key, item in value.items() if key != "__type"} if isinstance(value, dict) else value


# ---------------------------------------------------------------- generation_config.json

# What decides when and how an answer ends, and what transformers itself never writes (chat_format, stop_words_ids,
# user_token_id ...), is restored one by one. These are settings a user may have reset on purpose: saving drops a
# default, so absence alone proves nothing.
_CHOICES = frozenset(
    {
        "do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "no_repeat_ngram_size", "max_new_tokens", "max_length", "min_length", "min_new_tokens",
        "num_beams", "num_return_sequences", "length_penalty", "early_stopping", "use_cache", "output_attentions",
        "output_hidden_states", "output_scores", "return_dict_in_generate", "renormalize_logits",
    }
)  # fmt: skip
_BOOKKEEPING = frozenset({"_from_model_config", "transformers_version", "_commit_hash"})
# Value at which each setting has no effect.
SAMPLING_OFF = {
    "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "top_k": 50, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "min_p": None, "top_h": None,
}  # fmt: skip
BEAMS_OFF = {"length_penalty": 1.0, "early_stopping": False}


def generation_config(src: Folder, dst: Folder) -> list[Action]:
    """Keys that a save lost, stop ids, and values that make the next save fail."""
    base, theirs = _base(src, dst, GENERATION_CONFIG), src.json(GENERATION_CONFIG) or {}
    if not base:
        return []
    lost = {key: value for key, value in theirs.items() if value is not None and base.get(key) is None}
    rewritten = bool(lost.keys() - _CHOICES - _BOOKKEEPING) or _made_from_model_config(theirs, base)
    values = {k: v for k, v in lost.items() if k not in _BOOKKEEPING and (rewritten or k not in _CHOICES)}
    actions = _edit(GENERATION_CONFIG, base, values, "the save lost it; the original chats or stops by it")
    actions += _edit(
        GENERATION_CONFIG, base, _all_stop_ids(theirs, base), "every id that ends an answer in the original"
    )
    if _made_from_model_config(theirs, base):
        why = "the file would count as derived from config.json and be overruled by it"
        actions.append(
            Action(GENERATION_CONFIG, "_from_model_config removed", why, EditJson(drop=("_from_model_config",)))
        )
    return actions + _valid_generation({**base, **values}, base)


def _made_from_model_config(theirs: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return base.get("_from_model_config") is True and bool(theirs) and "_from_model_config" not in theirs


def _all_stop_ids(theirs: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """DST's stop ids and then those of SRC's list that DST lost. A single id of SRC is no list to lose from."""
    wanted, own = theirs.get("eos_token_id"), base.get("eos_token_id")
    if not isinstance(wanted, list) or own is None:
        return {}
    ids = own if isinstance(own, list) else [own]
    if set(wanted) <= set(ids):
        return {}
    # Nothing of DST's own: SRC's order. Otherwise DST's ids lead, as training put them there.
    return {"eos_token_id": wanted if set(ids) <= set(wanted) else ids + [i for i in wanted if i not in ids]}


def _valid_generation(current: Mapping[str, Any], base: Mapping[str, Any]) -> list[Action]:
    """Settings that transformers refuses to save once anything has touched them."""
    why = "transformers refuses to save the model with such values"
    actions = []
    idle = [k for k, off in SAMPLING_OFF.items() if current.get(k) is not None and current[k] != off]
    if idle and current.get("do_sample") is None:
        actions += _edit(GENERATION_CONFIG, base, {"do_sample": True}, f"{', '.join(idle)} without do_sample: {why}")
    elif idle and current["do_sample"] is not True:
        actions.append(_dropped(idle, f"do_sample is false: {why}"))
    beams = [k for k, off in BEAMS_OFF.items() if current.get(k) is not None and current[k] != off]
    if beams and current.get("num_beams") in (None, 1):
        actions.append(_dropped(beams, f"no beam search: {why}"))
    pad = current.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:
        actions.append(_dropped(["pad_token_id"], f"{pad} is no id: {why}"))
    return actions


def _dropped(keys: list[str], why: str) -> Action:
    return Action(GENERATION_CONFIG, f"{', '.join(keys)} removed", why, EditJson(drop=tuple(keys)))


# ---------------------------------------------------------------- weight index


def weight_index(src: Folder, dst: Folder) -> list[Action]:
    """An index goes when it names absent shards, and is written anew when shards need one. Weights stay as they are."""
    weights, actions = dst.weights, []
    for kind in KINDS:
        name = INDEX_FILE[kind]
        if name == weights.index:
            if dst.index_map(name) != weights.weight_map:
                stale = (
                    "it does not say where the tensors are" if name in dst.files else "loaders find no shard without it"
                )
                actions.append(
                    Action(name, f"written from {len(weights.files)} shards", stale, WriteJson(weights.index_content))
                )
        elif dst.index_is_stale(name):
            actions.append(Action(name, "removed", "it names weight files that are absent", RemoveFile()))
    return actions


def _notes(src: Folder, dst: Folder) -> list[str]:
    notes = [source_tensors(src)[1]]
    if SINGLE_FILE["safetensors"] in dst.files and len([n for n in dst.files if n.endswith(".safetensors")]) > 1:
        notes.append(f"{SINGLE_FILE['safetensors']} is what loaders read; the other .safetensors files are ignored")
    if dst.weights.kind == "safetensors" and any(
        n.startswith("pytorch_model") and n.endswith(".bin") for n in dst.files
    ):
        notes.append("safetensors and .bin weights are both there; loaders read the safetensors and ignore the .bin")
    if has_converted_tokenizer(src, dst):
        notes.append("DST's tokenizer was converted to tokenizer.json: its class and flags are left as they are")
    return [note for note in notes if note]


RULES: tuple[Rule, ...] = (
    missing_files,
    package_marker,
    config_missing,
    config_auto_map,
    config_identity,
    config_precision_flags,
    config_lost_sizes,
    config_vocab_size,
    tokenizer_class,
    tokenizer_flags,
    tokenizer_special_tokens,
    tokenizer_chat_template,
    special_tokens_map,
    generation_config,
    weight_index,
)
