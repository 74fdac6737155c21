"""The two repairs that write weights, and only when asked for: more rows for the vocabulary, and safetensors for .bin.

Both stream: a file is rewritten a few megabytes at a time, and what it replaces is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhfkit.errors import RepairRefusedError
from rlhfkit.repair.fit import is_tied
from rlhfkit.repair.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    Folder,
    WeightSet,
    embedding_name,
    head_name,
    highest_token,
)
from rlhfkit.repair.plan import Action, RemoveFile, WriteJson, WriteWeights
from rlhfkit.repair.tensors import NewTensor, TensorInfo, copied, grown

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class WeightWork:
    """What is asked for.

    Args:
        pad_vocab: the rows of embedding and head become a multiple of this; 0 leaves them.
        safetensors: .bin files become safetensors files.
    """

    pad_vocab: int = 0
    safetensors: bool = False

    def __bool__(self) -> bool:
        return bool(self.pad_vocab) or self.safetensors


def plan_weights(src: Folder, dst: Folder, work: WeightWork) -> tuple[WeightSet, list[Action], list[str]]:
    """The weights that DST is going to have, what is to be done for them, and remarks.

    Raises:
        RepairRefusedError: the weights cannot be rewritten so.
    """
    weights = dst.weights
    rows, notes = _rows_wanted(src, dst, work.pad_vocab)
    converts = work.safetensors and weights.kind == "bin"
    if work.safetensors and not converts:
        notes.append("--safetensors: the weights are safetensors already")
    if rows and weights.kind == "bin" and not converts:
        raise RepairRefusedError(
            f"--pad-vocab: the weights in {dst.path} are .bin files, which cannot be grown piece by piece",
            hint="give --safetensors as well: both are done in one pass",
        )
    if not rows and not converts:
        return weights, [], notes
    growing = _vocabulary_tensors(weights.tensors) if rows else {}
    dropped = _second_names(src, dst) if converts else {}
    target, actions = {}, []
    for file in weights.files:
        inside = {name: info for name, info in weights.tensors.items() if info.file == file and name not in dropped}
        new_file = _safetensors_name(file) if converts else file
        target.update(
            {name: replace(_with_rows(info, rows if name in growing else 0), file=new_file, offset=None, stride=None)
             for name, info in inside.items()}
        )  # fmt: skip
        here = [name for name in inside if name in growing]
        if not converts and not here:
            continue
        content = {
            name: grown(dst.path, name, info, rows) if name in growing else copied(dst.path, name, info)
            for name, info in inside.items()
        }
        actions.append(_write(new_file, file if converts else "", content, here, weights.tensors, rows))
        if converts:
            actions.append(Action(file, "removed", "a pickle, which may hold code; kept in the backup", RemoveFile()))
    if converts:
        if INDEX_FILE["bin"] in dst.files:
            why = "it names the .bin files; safetensors have an index of their own"
            actions.append(Action(INDEX_FILE["bin"], "removed", why, RemoveFile()))
        if dropped:
            notes.append(f"{', '.join(sorted(dropped))} is not written: it is tied to {', '.join(dropped.values())}")
        if any(info.offset is None for info in weights.tensors.values()):
            notes.append("the .bin was written before torch 1.6: each of its files is read whole, not piece by piece")
    index = INDEX_FILE["safetensors"] if len({info.file for info in target.values()}) > 1 else None
    files = tuple(dict.fromkeys(info.file for info in target.values()))
    planned = WeightSet("safetensors", files, index, target)
    if index and not converts:  # the same files, with more in them
        size = f"total_size: {planned.total_size}"
        actions.append(Action(index, size, "the sum of what is in the shards", WriteJson(planned.index_content)))
    return planned, actions, notes


def _rows_wanted(src: Folder, dst: Folder, multiple: int) -> tuple[int, list[str]]:
    """Rows to grow to, 0 when there is nothing to grow, and a remark."""
    if not multiple:
        return 0, []
    tensors = dst.weights.tensors
    embedding = embedding_name(tensors)
    if embedding is None:
        raise RepairRefusedError(f"--pad-vocab: the weights in {dst.path} hold no embedding that is known here")
    rows = tensors[embedding].shape[0]
    # A folder without a tokenizer of its own is going to have SRC's.
    tokens = max(highest_token(dst)[0], highest_token(src)[0]) + 1
    wanted = -(-max(rows, tokens) // multiple) * multiple
    if wanted == rows:
        return 0, [f"--pad-vocab: {rows} rows are a multiple of {multiple} already"]
    for name in _vocabulary_tensors(tensors):
        if tensors[name].dtype not in _FLOATS:
            raise RepairRefusedError(
                f"--pad-vocab: {name} in {dst.path} is {tensors[name].dtype}: quantised rows have no mean",
                hint="pad the 16-bit weights, and quantise them afterwards",
            )
    if _normalises_head(src) or _normalises_head(dst):
        raise RepairRefusedError(
            f"--pad-vocab: the model code of {dst.path} normalises every row of the head (NormHead), so that an "
            "untrained row is as loud as a trained one",
            hint="a 7B model can be converted first, to a layout whose head is a plain one: "
            f"rlhfkit convert {dst.path} NEW_FOLDER",
        )
    return wanted, []


def _normalises_head(folder: Folder) -> bool:
    """Whether the folder's model code says so; it is read as text."""
    return any(
        "class NormHead" in (folder.path / name).read_text(encoding="utf-8", errors="replace")
        for name in folder.files
        if name.endswith(".py")
    )


def _vocabulary_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Tensors with one row for each token: embedding, head, and the head's bias."""
    head = head_name(tensors)
    names = [embedding_name(tensors), head, head.replace(".weight", ".bias") if head else None]
    return {name: tensors[name].shape[0] for name in names if name in tensors and name is not None}


def _with_rows(info: TensorInfo, rows: int) -> TensorInfo:
    if not rows:
        return info
    return replace(info, shape=(rows, *info.shape[1:]), nbytes=info.nbytes // info.shape[0] * rows)


def _second_names(src: Folder, dst: Folder) -> dict[str, str]:
    """A tied head under two names in a .bin: its own name goes, as transformers does when it saves. Other tensors that
    share memory are written apart."""
    tensors = dst.weights.tensors
    embedding, head = embedding_name(tensors), head_name(tensors)
    if not embedding or not head or not is_tied(src, dst) or tensors[head].offset is None:
        return {}
    return {head: embedding} if tensors[head].place == tensors[embedding].place else {}


def _safetensors_name(file: str) -> str:
    if file == SINGLE_FILE["bin"]:
        return SINGLE_FILE["safetensors"]
    return f"{Path(file).stem.removeprefix('pytorch_')}.safetensors"


def _write(
    file: str,
    instead_of: str,
    content: Mapping[str, NewTensor],
    here: list[str],
    before: Mapping[str, TensorInfo],
    rows: int,
) -> Action:
    what, why = [], []
    if instead_of:
        what.append(f"written from {instead_of}, {len(content)} tensors")
        why.append("loading it can run no code, and is faster")
    for name in here:
        what.append(f"{name}: {before[name].shape[0]} → {rows} rows")
    if here:
        why.append("asked for; new rows are the mean of the old ones")
    return Action(file, "; ".join(what), "; ".join(why), WriteWeights(content))
