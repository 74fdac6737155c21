"""Read a model folder without running anything in it: file names, JSON files, tensor names and shapes."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhfkit.errors import RepairRefusedError
from rlhfkit.repair.tensors import TensorInfo, is_lfs_pointer, read_tensors

# Loaders try these in this order: one safetensors file, safetensors shards, one .bin file, .bin shards.
KINDS = ("safetensors", "bin")
SINGLE_FILE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
INDEX_FILE = {kind: f"{name}.index.json" for kind, name in SINGLE_FILE.items()}
_SHARD = {
    "safetensors": re.compile(r"model-(\d+)-of-(\d+)\.safetensors"),
    "bin": re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin"),
}


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

    @property
    def index_content(self) -> dict[str, Any]:
        """What the index file of these weights holds."""
        return {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}


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

    def with_weights(self, weights: WeightSet) -> Folder:
        """The same folder, as rules see it once its weights are these."""
        other = Folder(self.path, self.role)
        other.__dict__["weights"] = weights  # where cached_property keeps it
        return other

    def is_broken(self, name: str) -> bool:
        """Whether a file is there but of no use: empty, a Git LFS pointer, or JSON that does not parse."""
        if name not in self.files:
            return False
        if self.is_lfs_pointer(name) or (self.path / name).stat().st_size == 0:
            return True
        return name.endswith(".json") and self.json(name) is None

    def is_lfs_pointer(self, name: str) -> bool:
        """Whether a clone without Git LFS left a text of three lines in place of the file."""
        return is_lfs_pointer(self.path / name)

    def index_map(self, name: str) -> dict[str, str] | None:
        """Tensor name -> file, as an index file says; None when it is absent or damaged.

        Raises:
            RepairRefusedError: it names a file outside the folder.
        """
        mapping = (self.json(name) or {}).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
            return None
        refuse_paths(self.path / name, mapping.values())
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
            found = read_tensors(self.path / file)
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


def refuse_paths(index: Path, files: Iterable[str]) -> None:
    """An index names files beside it. A path that leads elsewhere is a mistake, or an attempt to have it read."""
    for file in files:
        if not file or "/" in file or "\\" in file or file in (".", ".."):
            raise RepairRefusedError(
                f"{index} names {file!r}, which is no file of its own folder",
                hint="download the model again from a source you trust",
            )


def highest_token(folder: Folder) -> tuple[int, str]:
    """The highest id in a folder's tokenizer files and its token, as far as JSON files say; (-1, "") without any."""
    fast, settings = folder.json("tokenizer.json") or {}, folder.json("tokenizer_config.json") or {}
    found: list[tuple[Any, Any]] = [(-1, "")]
    model = fast.get("model")
    vocabularies = [model.get("vocab") if isinstance(model, dict) else None]
    vocabularies += [folder.json("vocab.json"), folder.json("added_tokens.json")]
    for vocabulary in vocabularies:
        if isinstance(vocabulary, dict):
            found += [(index, token) for token, index in vocabulary.items()]
        elif isinstance(vocabulary, list):  # unigram: pieces with their scores
            found.append((len(vocabulary) - 1, vocabulary[-1][0] if vocabulary and vocabulary[-1] else ""))
    for token in fast.get("added_tokens") or []:
        if isinstance(token, dict):
            found.append((token.get("id"), token.get("content")))
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        found.append((int(index) if index.isdigit() else None, token.get("content") if isinstance(token, dict) else ""))
    return max((index, str(token)) for index, token in found if isinstance(index, int))


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
