"""Do two folders belong together? Every reason to refuse a repair, checked before anything is planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhfkit.errors import RepairRefusedError
from rlhfkit.repair.auto_map import class_names, code_files
from rlhfkit.repair.files import is_vocabulary, reason_to_copy
from rlhfkit.repair.folder import INDEX_FILE, KINDS, Folder, TensorInfo, embedding_name, head_name, layer_count

# Each row: one size under the names that different releases give it in config.json.
SIZE_KEYS = (
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("num_key_value_heads",),
    ("intermediate_size", "ffn_hidden_size"),
    ("kv_channels",),
    ("head_dim",),
)
# Tables that model code computes anew; whether a save wrote them says nothing about the model.
_RECOMPUTED = (
    ".inv_freq",
    ".cos_cached",
    ".sin_cached",
    ".masked_bias",
    ".attn.bias",
    ".logn_tensor",
    ".attn.causal_mask",
)
# Wrappers that were still around the model when its state dict was saved.
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_forward_module.": "DeepSpeed or Fabric",
    "base_model.model.": "PEFT",
    "pretrained_model.": "a value-head wrapper",
}
# Modules that score a text instead of continuing it.
SCORING_HEADS = frozenset({"score", "classifier", "v_head", "value_head", "reward_head"})
# Padding and a few new special tokens move the row count by hundreds; two vocabularies differ by tens of thousands.
_FAR_APART = 4096


def refuse_unless_fitting(src: Folder, dst: Folder, *, one_folder: bool = False) -> None:
    """Raise the first reason for which DST cannot be repaired from SRC.

    Args:
        src: the original.
        dst: the folder to repair.
        one_folder: whether both may be the same folder: its weights can be rewritten without an original.

    Raises:
        RepairRefusedError: with what was found in which file, and what to do instead.
    """
    if not one_folder:
        _refuse_same_folder(src, dst)
    for check in _CHECKS:
        check(src, dst)


def size_of(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The first of several keys that a config.json has."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def source_tensors(src: Folder) -> tuple[Mapping[str, TensorInfo | None], str]:
    """SRC's tensors, and a remark on what is not known of them.

    SRC need not hold weights. Its index still tells the names (shapes are then None); without one nothing is known.
    """
    try:
        return dict(src.weights.tensors), ""
    except RepairRefusedError as error:
        for kind in KINDS:
            names = src.index_map(INDEX_FILE[kind])
            if names:
                return dict.fromkeys(
                    names
                ), "SRC's weights are not there: tensor names were compared with its index only"
        return {}, f"tensor names were not compared with SRC: {error.message}"


def is_recomputed(name: str) -> bool:
    """Whether a tensor is a table that model code computes anew."""
    return name.endswith(_RECOMPUTED)


def stray_tensors(src_names: Iterable[str], dst_names: Iterable[str], *, tied: bool) -> tuple[list[str], list[str]]:
    """Tensors of SRC that DST lacks, and tensors of DST that SRC lacks; recomputed tables and a tied head aside."""
    src_set, dst_set = set(src_names), set(dst_names)
    ignored = {name for name in src_set | dst_set if is_recomputed(name)}
    if tied:
        ignored |= {name for name in (head_name(dict.fromkeys(src_set)), head_name(dict.fromkeys(dst_set))) if name}
    return sorted(src_set - dst_set - ignored), sorted(dst_set - src_set - ignored)


def is_tied(src: Folder, dst: Folder) -> bool:
    """Whether config.json says that the head is the embedding; only an explicit word counts."""
    own = (dst.json("config.json") or {}).get("tie_word_embeddings")
    return (own if own is not None else (src.json("config.json") or {}).get("tie_word_embeddings")) is True


def _refuse_same_folder(src: Folder, dst: Folder) -> None:
    if src.path.samefile(dst.path):
        raise RepairRefusedError(
            f"SRC and DST are the same folder: {dst.path}",
            hint="SRC is the original model folder, DST the one that training saved; --safetensors and --pad-vocab "
            "alone need no original",
        )


def _refuse_adapter(src: Folder, dst: Folder) -> None:
    for folder in (src, dst):
        found = sorted(folder.files & {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"})
        if found:
            base = (folder.json("adapter_config.json") or {}).get("base_model_name_or_path") or "an unnamed base"
            raise RepairRefusedError(
                f"{folder.role} is a LoRA adapter folder, not a model: {folder.path} holds {found[0]} "
                f"(trained on {base})",
                hint=f"it needs no repair: rlhfkit generate --model {folder.path} loads it with its base, and "
                f"rlhfkit merge {folder.path} DST makes a model of both",
            )


def _refuse_unreadable_source(src: Folder, dst: Folder) -> None:
    if src.json("config.json") is None:
        found = "a config.json that does not parse" if "config.json" in src.files else "no config.json"
        raise RepairRefusedError(
            f"SRC is not a model folder: {src.path} holds {found}",
            hint="name the original model folder, as it was downloaded",
        )
    for name in sorted(src.files):
        needed = reason_to_copy(name) and (name not in dst.files or dst.is_broken(name))
        if needed and _leads_away(src.path / name):
            raise RepairRefusedError(
                f"{src.path / name} is a link to {(src.path / name).resolve()}, outside of SRC: that file would be "
                "copied into a model folder, and published with it",
                hint="put the file itself into SRC if it belongs there",
            )
        if needed and src.is_lfs_pointer(name):
            raise RepairRefusedError(
                f"{src.path / name} is a Git LFS pointer, not the file itself", hint=f"run: git -C {src.path} lfs pull"
            )
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if src.is_broken(name):
            raise RepairRefusedError(f"{src.path / name} does not hold a JSON object", hint="download SRC again")


def _leads_away(path: Path) -> bool:
    """Whether a link leaves its folder. A snapshot in the hub's cache is made of links to the blobs beside it."""
    target, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return path.is_symlink() and not (target.is_relative_to(folder) or target.is_relative_to(blobs))


def _refuse_other_family(src: Folder, dst: Folder) -> None:
    src_type = (src.json("config.json") or {}).get("model_type")
    dst_type = (dst.json("config.json") or {}).get("model_type")
    if src_type and dst_type and src_type != dst_type:
        raise RepairRefusedError(
            f"the folders hold different model families: {dst.path}/config.json has model_type '{dst_type}', "
            f"{src.path}/config.json has '{src_type}'",
            hint="SRC must be the folder that this very model was fine-tuned from",
        )


def _refuse_other_code(src: Folder, dst: Folder) -> None:
    """One model_type may stand for several releases (Baichuan and Baichuan2); their classes have other names."""
    for name in ("config.json", "tokenizer_config.json"):
        theirs = class_names((src.json(name) or {}).get("auto_map"))
        ours = class_names((dst.json(name) or {}).get("auto_map"))
        for key in sorted(theirs.keys() & ours.keys()):
            if theirs[key] != ours[key]:
                raise RepairRefusedError(
                    f"the folders name different model code: auto_map.{key} is {' / '.join(ours[key])} in "
                    f"{dst.path / name} and {' / '.join(theirs[key])} in {src.path / name}",
                    hint="SRC must be the folder that this very model was fine-tuned from",
                )


def _refuse_missing_code(src: Folder, dst: Folder) -> None:
    if src.path.resolve() == dst.path.resolve():
        return  # no original to take it from, and neither rows nor formats need it
    for name in ("config.json", "tokenizer_config.json"):
        absent = sorted(code_files((src.json(name) or {}).get("auto_map")) - src.files - dst.files)
        if absent:
            raise RepairRefusedError(
                f"{src.path / name} names code in {absent[0]}, which neither SRC nor DST holds",
                hint="SRC is itself incomplete: download the original model folder with its code files",
            )


def _refuse_other_sizes(src: Folder, dst: Folder) -> None:
    theirs, ours = src.json("config.json") or {}, dst.json("config.json") or {}
    for names in SIZE_KEYS:
        here, there = size_of(ours, names), size_of(theirs, names)
        if here is not None and there is not None and here != there:
            raise RepairRefusedError(
                f"the folders hold models of different shape: {names[0]} is {here} in {dst.path}/config.json and "
                f"{there} in {src.path}/config.json",
                hint="SRC must be the folder that this very model was fine-tuned from",
            )


def _refuse_adapter_tensors(src: Folder, dst: Folder) -> None:
    lora = next((name for name in dst.weights.tensors if ".lora_A." in name or ".lora_B." in name), None)
    if lora:
        raise RepairRefusedError(
            f"{dst.path} holds LoRA matrices that were never merged ({lora})",
            hint="save the adapter alone with save_pretrained, and merge it: rlhfkit merge ADAPTER DST",
        )
    hollow = next((name for name, tensor in dst.weights.tensors.items() if 0 in tensor.shape), None)
    if hollow:
        raise RepairRefusedError(
            f"{dst.path} holds empty tensors ({hollow} has shape {list(dst.weights.tensors[hollow].shape)}), as "
            "DeepSpeed ZeRO-3 leaves them when weights are not gathered on save",
            hint="join the partitions with zero_to_fp32.py of the checkpoint folder",
        )


def _refuse_wrapped_names(src: Folder, dst: Folder) -> None:
    names, reference = dst.weights.tensors, source_tensors(src)[0]
    for prefix, wrapper in WRAPPERS.items():
        if all(name.startswith(prefix) for name in names) and not any(name.startswith(prefix) for name in reference):
            raise RepairRefusedError(
                f"every tensor name in {dst.path} starts with '{prefix}': the weights were saved with {wrapper} around "
                "the model, and no loader finds them",
                hint="save the inner model again; names of tensors are never changed here",
            )


def _refuse_scoring_head(src: Folder, dst: Folder) -> None:
    """With SRC's architectures a reward model would load as a language model and lose its head."""
    reference = source_tensors(src)[0]
    head = next((name for name in dst.weights.tensors if name.split(".")[0] in SCORING_HEADS), None)
    if head and head not in reference:
        raise RepairRefusedError(
            f"{dst.path} holds a reward or classification model ({head}), SRC a language model",
            hint="only a model with the same head can serve as SRC",
        )


def _refuse_other_tensors(src: Folder, dst: Folder) -> None:
    ours = dst.weights.tensors
    theirs, _ = source_tensors(src)
    stated = size_of(src.json("config.json") or {}, ("num_hidden_layers", "n_layer"))
    layers = layer_count(theirs) if theirs else stated
    if layers is not None and layer_count(ours) != layers:
        raise RepairRefusedError(
            f"the weights in {dst.path} have {layer_count(ours)} layers, those of {src.path} have {layers}",
            hint="SRC must be the folder that this very model was fine-tuned from",
        )
    if not theirs:
        return
    missing, unexpected = stray_tensors(theirs, ours, tied=is_tied(src, dst))
    if missing or unexpected:
        raise RepairRefusedError(
            f"the weights in {dst.path} are not those of SRC's architecture: "
            + "; ".join(
                _some(word, names) for word, names in (("missing", missing), ("not known to SRC", unexpected)) if names
            ),
            hint="SRC must be the folder that this very model was fine-tuned from",
        )
    vocabulary = {embedding_name(ours), head_name(ours)}
    for name, tensor in ours.items():
        reference = theirs.get(name)
        if reference is None:
            continue
        skip = 1 if name in vocabulary else 0
        if tensor.shape[skip:] != reference.shape[skip:] or len(tensor.shape) != len(reference.shape):
            raise RepairRefusedError(
                f"{name} has shape {list(tensor.shape)} in {dst.path} and {list(reference.shape)} in {src.path}",
                hint="SRC must be the folder that this very model was fine-tuned from",
            )


def _refuse_other_vocabulary(src: Folder, dst: Folder) -> None:
    tensors, config = dst.weights.tensors, src.json("config.json") or {}
    embedding, head = embedding_name(tensors), head_name(tensors)
    if embedding is None:
        raise RepairRefusedError(
            f"the weights in {dst.path} hold no input embedding that is known here", hint="is it a language model?"
        )
    rows, width = tensors[embedding].shape[0], tensors[embedding].shape[-1]
    hidden = size_of(config, ("hidden_size", "n_embd"))
    if hidden is not None and width != hidden and source_tensors(src)[0].get(embedding) is None:
        raise RepairRefusedError(
            f"{embedding} in {dst.path} has width {width}, {src.path}/config.json says hidden_size {hidden}",
            hint="SRC must be the folder that this very model was fine-tuned from",
        )
    if head is None and not is_tied(src, dst) and not source_tensors(src)[0]:
        raise RepairRefusedError(
            f"the weights in {dst.path} have no output head, and config.json does not tie it to the embedding",
            hint="save the whole model, not its body",
        )
    if head is not None and tensors[head].shape[0] != rows:
        raise RepairRefusedError(
            f"{dst.path}: {embedding} has {rows} rows, {head} has {tensors[head].shape[0]}: no vocab_size fits both",
            hint="the embedding was resized without its head; save the model again after resizing both",
        )
    expected = size_of(config, ("vocab_size",))
    if expected is not None and abs(rows - expected) > _FAR_APART and not any(map(is_vocabulary, dst.files)):
        raise RepairRefusedError(
            f"the embedding in {dst.path} has {rows} rows, SRC's vocabulary {expected}, and DST brings no tokenizer "
            "of its own: they are different vocabularies",
            hint="choose the right SRC, or put the model's own tokenizer files into DST first",
        )


def _some(word: str, names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{word}: {', '.join(names[:shown])}{more}"


_CHECKS: tuple[Callable[[Folder, Folder], None], ...] = (
    _refuse_adapter,
    _refuse_unreadable_source,
    _refuse_other_family,
    _refuse_other_code,
    _refuse_missing_code,
    _refuse_other_sizes,
    _refuse_adapter_tensors,
    _refuse_wrapped_names,
    _refuse_scoring_head,
    _refuse_other_tensors,
    _refuse_other_vocabulary,
)
