"""Tensors on disk, a few rows at a time: no conversion needs more memory than `CHUNK` times a small number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlhfkit.repair.folder import INDEX_FILE, SINGLE_FILE, Folder
from rlhfkit.repair.tensors import (
    NewTensor,
    load_old_file,
    load_rows,
    stored_dtype,
    tensor_bytes,
    torch_dtype,
    write_safetensors,
)

CHUNK = 64 * 2**20  # bytes of one read
SHARD = 4 * 2**30  # bytes of one file that is written


class TensorReader:
    """The tensors of a model folder by name, read from disk as they are asked for."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tensors = folder.weights.tensors
        self._old: tuple[str, dict[str, Tensor]] = ("", {})  # the one file that cannot be read in parts

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._tensors[name].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor."""
        info = self._tensors[name]
        if info.offset is not None:
            return load_rows(self._folder.path, name, info, start, stop)
        if self._old[0] != info.file:
            self._old = ("", {})  # never two at a time
            self._old = (info.file, load_old_file(self._folder.path / info.file))
        return self._old[1][name][start:stop]

    def whole(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0])


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start`` to ``stop`` of a tensor that is read."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that is written: parts of others, one under the other.

    Args:
        name: its name.
        shape: its shape.
        dtype: its number format, that of its parts.
        parts: where its rows come from.
        unit_rows: every row is scaled to length one, in float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    unit_rows: bool = False

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def chunks(self, reader: TensorReader) -> Iterator[Tensor]:
        """Its rows in order, few at a time."""
        row = max(1, self.nbytes // self.shape[0]) if self.shape else self.nbytes
        step = max(1, CHUNK // row)
        for part in self.parts:
            for start in range(part.start, part.stop, step):
                rows = reader.rows(part.source, start, min(start + step, part.stop))
                yield unit_rows(rows) if self.unit_rows else rows

    def to_write(self, reader: TensorReader) -> NewTensor:
        """The same for the writer of safetensors files."""
        return NewTensor(
            stored_dtype(self.dtype), self.shape, lambda: (tensor_bytes(rows) for rows in self.chunks(reader))
        )


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length one: computed in float32, rounded to the format they came in."""
    return normalize(rows.float(), dim=1).to(rows.dtype)


def write_tensors(folder: Path, targets: Sequence[Target], reader: TensorReader) -> tuple[str, ...]:
    """Write safetensors files, and an index where there are several.

    Returns:
        names of the files.
    """
    shards = _shards(targets)
    single = SINGLE_FILE["safetensors"]
    stem, ending = single.rsplit(".", 1)
    names = [single] if len(shards) == 1 else [
        f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{ending}" for i in range(len(shards))
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, {target.name: target.to_write(reader) for target in shard})
    if len(shards) > 1:
        where = {target.name: name for name, shard in zip(names, shards, strict=True) for target in shard}
        index = {"metadata": {"total_size": sum(target.nbytes for target in targets)}, "weight_map": where}
        (folder / INDEX_FILE["safetensors"]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names.append(INDEX_FILE["safetensors"])
    return tuple(names)


def _shards(targets: Iterable[Target]) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if shards[-1] and size + target.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.nbytes
    return shards
