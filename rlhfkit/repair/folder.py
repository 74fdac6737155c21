"""Read a model folder without running anything in it: file names, JSON files, tensor names and shapes."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhfkit.errors import RepairRefusedError

# Loaders try these in this order: one safetensors file, safetensors shards, one .bin file, .bin shards.
KINDS = ("safetensors", "bin")
SINGLE_FILE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
INDEX_FILE = {kind: f"{name}.index.json" for kind, name in SINGLE_FILE.items()}
_SHARD = {
    "safetensors": re.compile(r"model-(\d+)-of-(\d+)\.safetensors"),
    "bin": re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin"),
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a weight file says of one tensor."""

    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The weight files that a loader would read, and every tensor in them.

    ``index`` is the name of the index file that several shards need; None for a single file.
    """

    kind: str
    files: tuple[str, ...]
    index: str | None
    tensors: Mapping[str, TensorInfo]

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file, as an index holds it."""
        return {name: tensor.file for name, tensor in self.tensors.items()}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Folder:
    """A model folder as it is on disk. Nothing is cached between two objects: make a new one after a change.

    Args:
        path: the folder.
        role: how messages call it, ``SRC`` or ``DST``.

    Raises:
        RepairRefusedError: ``path`` is no folder.
    """

    def __init__(self, path: Path, role: str) -> None:
        if not path.is_dir():
            found = "a file" if path.exists() else "not there"
            raise RepairRefusedError(
                f"{role} must be a model folder, but {path} is {found}",
                hint="usage: rlhfkit fix-checkpoint SRC DST, SRC the original model folder, DST the fine-tuned one",
            )
        self.path = path
        self.role = role
        self.files = frozenset(entry.name for entry in path.iterdir() if entry.is_file())
        self._json: dict[str, dict[str, Any] | None] = {}

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file; None when the file is absent or holds none. Not to be changed by the caller."""
        if name not in self._json:
            self._json[name] = self._read_json(name)
        return self._json[name]

    def _read_json(self, name: str) -> dict[str, Any] | None:
        if name not in self.files:
            return None
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def is_broken(self, name: str) -> bool:
        """Whether a file is there but of no use: empty, a Git LFS pointer, or JSON that does not parse."""
        if name not in self.files:
            return False
        if self.is_lfs_pointer(name) or (self.path / name).stat().st_size == 0:
            return True
        return name.endswith(".json") and self.json(name) is None

    def is_lfs_pointer(self, name: str) -> bool:
        """Whether a clone without Git LFS left a text of three lines in place of the file."""
        with (self.path / name).open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER

    def index_map(self, name: str) -> dict[str, str] | None:
        """Tensor name -> file, as an index file says; None when it is absent or damaged."""
        mapping = (self.json(name) or {}).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
            return None
        return mapping

    def index_is_stale(self, name: str) -> bool:
        """Whether an index file is there but damaged, empty, or names files that are absent."""
        mapping = self.index_map(name)
        return name in self.files and not (mapping and all((self.path / file).is_file() for file in mapping.values()))

    @cached_property
    def weights(self) -> WeightSet:
        """Names and shapes of the weights a loader would read; no tensor data is loaded.

        Raises:
            RepairRefusedError: there are none, shards are missing, or a file cannot be read.
        """
        kind, files, index = self._choose_weight_files()
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            found = _read_safetensors(self, file) if kind == "safetensors" else _read_bin(self, file)
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                raise RepairRefusedError(
                    f"{self.path}: the tensor {twice[0]} is in {tensors[twice[0]].file} and in {file}",
                    hint="remove the shards of the other save, so that each tensor is there once",
                )
            tensors.update(found)
        return WeightSet(kind, files, index, tensors)

    def _choose_weight_files(self) -> tuple[str, tuple[str, ...], str | None]:
        """Kind, files and index name, by the order in which loaders look; an index that fits beats shard names."""
        for kind in KINDS:
            if SINGLE_FILE[kind] in self.files:
                return kind, (SINGLE_FILE[kind],), None
            index = INDEX_FILE[kind]
            if index in self.files and not self.index_is_stale(index):
                return kind, tuple(sorted(set((self.index_map(index) or {}).values()))), index
            shards = self._complete_shards(kind)
            if shards:
                return kind, shards, index
        raise self._no_weights()

    def _shards_by_total(self, kind: str) -> dict[int, dict[int, str]]:
        groups: dict[int, dict[int, str]] = defaultdict(dict)
        for name in sorted(self.files):
            match = _SHARD[kind].fullmatch(name)
            if match:
                groups[int(match[2])][int(match[1])] = name
        return groups

    def _complete_shards(self, kind: str) -> tuple[str, ...]:
        groups = self._shards_by_total(kind)
        complete = [total for total, shards in groups.items() if set(shards) == set(range(1, total + 1))]
        if len(complete) > 1:
            raise RepairRefusedError(
                f"{self.path} holds several complete sets of {kind} shards (of {', '.join(map(str, sorted(complete)))} "
                "files), and no index says which one is meant",
                hint="move the shards of the older save away",
            )
        return tuple(name for _, name in sorted(groups[complete[0]].items())) if complete else ()

    def _no_weights(self) -> RepairRefusedError:
        for kind in KINDS:
            for total, shards in sorted(self._shards_by_total(kind).items()):
                absent = sorted(set(range(1, total + 1)) - set(shards))
                return RepairRefusedError(
                    f"{self.path} holds {len(shards)} of {total} {kind} shards: number {absent[0]} is missing",
                    hint="copy the missing shards from where the model was saved",
                )
        if any(child.is_dir() and child.name.startswith("global_step") for child in self.path.iterdir()):
            return RepairRefusedError(
                f"{self.path} holds DeepSpeed's partitioned state, no weights a loader can read",
                hint=f"join it first: python {self.path}/zero_to_fp32.py {self.path} {self.path}/pytorch_model.bin",
            )
        inside = sorted(
            child.name
            for child in self.path.iterdir()
            if child.is_dir()
            and any((child / name).is_file() for name in (*SINGLE_FILE.values(), *INDEX_FILE.values()))
        )
        return RepairRefusedError(
            f"{self.path} holds no weights: neither {' nor '.join(SINGLE_FILE.values())}, nor shards of them",
            hint=f"name the folder inside it that does: {', '.join(inside)}"
            if inside
            else f"{self.role} must be the folder the model was saved to",
        )


def _read_safetensors(folder: Folder, name: str) -> dict[str, TensorInfo]:
    """The header: eight bytes of length, then JSON. The end of the last tensor must be the end of the file."""
    path = folder.path / name
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _damaged(
                path, _pointer_or(folder, name, f"its header should have {length} bytes, the file has {size}")
            )
        try:
            header = json.loads(file.read(length))
            tensors = {
                key: TensorInfo(tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0], name)
                for key, entry in header.items()
                if key != "__metadata__"
            }
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise _damaged(path, "its header is not that of a safetensors file") from error
    if 8 + length + end != size:
        raise _damaged(path, f"its header announces {8 + length + end} bytes, the file has {size}")
    return tensors


def _read_bin(folder: Folder, name: str) -> dict[str, TensorInfo]:
    """A pickled state dict on the meta device: the file is mapped, its tensors stay on disk, no code in it runs."""
    import torch

    path = folder.path / name
    if folder.is_lfs_pointer(name):
        raise _damaged(path, "it is a Git LFS pointer, not the file itself")
    # Files older than torch 1.6 are no zip archives and cannot be mapped; on the meta device they stay cheap.
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, f"torch cannot read it as plain weights ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _damaged(path, "it is not a plain state dict of names and tensors")
    return {key: TensorInfo(tuple(t.shape), t.numel() * t.element_size(), name) for key, t in state.items()}


def _pointer_or(folder: Folder, name: str, reason: str) -> str:
    return "it is a Git LFS pointer, not the file itself" if folder.is_lfs_pointer(name) else reason


def _damaged(path: Path, reason: str) -> RepairRefusedError:
    return RepairRefusedError(f"{path} cannot be used: {reason}", hint="save or copy the weights again")


def layer_count(names: Iterable[str]) -> int:
    """Number of layers that tensor names speak of: the number that occurs first in most names, plus one."""
    stems: Counter[str] = Counter()
    highest: dict[str, int] = defaultdict(int)
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            stems[match[1]] += 1
            highest[match[1]] = max(highest[match[1]], int(match[2]) + 1)
    return highest[stems.most_common(1)[0][0]] if stems else 0


_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "output_layer.weight")


def embedding_name(tensors: Mapping[str, object]) -> str | None:
    """Name of the input embedding, or None."""
    return _shortest_with_ending(tensors, _EMBEDDINGS)


def head_name(tensors: Mapping[str, object]) -> str | None:
    """Name of the output head, or None: a tied one need not be in the file."""
    return _shortest_with_ending({name: 0 for name in tensors if name.count(".") <= 2}, _HEADS)


def _shortest_with_ending(names: Mapping[str, object], endings: tuple[str, ...]) -> str | None:
    fitting = [name for name in names if any(name == end or name.endswith(f".{end}") for end in endings)]
    return min(fitting, key=len) if fitting else None
