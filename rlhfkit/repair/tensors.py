"""Tensors in weight files, read and written without holding a model: names, shapes and places first, bytes in pieces.

A safetensors file says where its tensors are in its header. A .bin file is a pickle: it is unpickled by torch's
restricted loader (``weights_only``) into tensors without data, which know where in the file their data is. So either
kind is read piece by piece, and no code in a file ever runs.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfkit.errors import RepairRefusedError

if TYPE_CHECKING:
    import torch

PIECE = 4 * 2**20  # bytes held at a time
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# The names that safetensors gives to torch's number formats.
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_STORED_NAMES = {name: stored for stored, name in _TORCH_NAMES.items()}


def _width(dtype: str) -> int:
    """Bytes of one value, from the name of the format; torch need not be there for it."""
    return 1 if dtype == "BOOL" else int(re.sub(r"^(BF|F|I|U)(\d+).*", r"\2", dtype)) // 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a weight file says of one tensor.

    Args:
        shape: of the tensor.
        nbytes: of its values.
        file: name of the file.
        dtype: number format, under safetensors' name; torch's own where safetensors has none.
        offset: where its first value is in the file; None when only torch can tell (.bin files older than torch 1.6).
        stride: of a tensor that does not lie row after row; None for all others.
    """

    shape: tuple[int, ...]
    nbytes: int
    file: str
    dtype: str = ""
    offset: int | None = None
    stride: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for two names of one tensor."""
        return self.file, self.offset, self.shape, self.stride


# ---------------------------------------------------------------- reading


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and places of the tensors in a file; no data is read.

    Raises:
        RepairRefusedError: the file is damaged, or holds something else than tensors.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left a text of three lines in place of the file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The header: eight bytes of length, then JSON. The end of the last tensor must be the end of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            reason = f"its header should have {length} bytes, the file has {size}"
            raise _damaged(path, "it is a Git LFS pointer, not the file itself" if is_lfs_pointer(path) else reason)
        try:
            header = json.loads(file.read(length))
            tensors, end = {}, 0
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                start, stop = entry["data_offsets"]
                if not 0 <= start <= stop:
                    raise ValueError(key)
                end = max(end, stop)
                shape, dtype = tuple(entry["shape"]), str(entry["dtype"])
                if dtype in _TORCH_NAMES and prod(shape) * _width(dtype) != stop - start:
                    raise ValueError(key)
                tensors[key] = TensorInfo(shape, stop - start, path.name, dtype, 8 + length + start)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise _damaged(path, "its header is not that of a safetensors file") from error
    if 8 + length + end != size:
        raise _damaged(path, f"its header announces {8 + length + end} bytes, the file has {size}")
    return tensors


def _read_bin(path: Path) -> dict[str, TensorInfo]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if is_lfs_pointer(path):
        raise _damaged(path, "it is a Git LFS pointer, not the file itself")
    try:
        if zipfile.is_zipfile(path):
            with FakeTensorMode():
                state = torch.load(path, weights_only=True)
        else:  # older than torch 1.6: no archive, so that nothing tells where a tensor is
            state = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError, KeyError) as error:
        raise _damaged(path, f"torch cannot read it as plain weights ({why_unreadable(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _damaged(path, "it is not a plain state dict of names and tensors")
    return {key: _bin_tensor(value, path.name) for key, value in state.items()}


def why_unreadable(error: BaseException) -> str:
    """What is wrong with a weight file. torch's own advice is to load a pickle that it refused without its guard."""
    text = str(error).strip()
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is code and no tensor; none of it was run"
    if "weights_only" in text:
        return "it holds something else than tensors; none of it was run"
    return (text.splitlines() or [type(error).__name__])[0]


def _bin_tensor(tensor: torch.Tensor, file: str) -> TensorInfo:
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    first = int(tensor.storage_offset()) * tensor.element_size()
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(
        shape=tuple(tensor.shape),
        nbytes=tensor.numel() * tensor.element_size(),
        file=file,
        dtype=_STORED_NAMES.get(name, name),
        offset=None if start is None else int(start) + first,
        stride=None if tensor.is_contiguous() else tuple(tensor.stride()),
    )


def _damaged(path: Path, reason: str) -> RepairRefusedError:
    return RepairRefusedError(f"{path} cannot be used: {reason}", hint="save or copy the weights again")


def torch_dtype(stored: str) -> torch.dtype:
    """torch's number format for safetensors' name of it."""
    import torch

    return getattr(torch, torch_name(stored))


def torch_name(stored: str) -> str:
    """The name of torch's number format for safetensors' name of it."""
    return _TORCH_NAMES.get(stored, stored)


def stored_dtype(dtype: torch.dtype) -> str:
    """safetensors' name for torch's number format."""
    return _STORED_NAMES[str(dtype).removeprefix("torch.")]


def load_tensor(folder: Path, name: str, info: TensorInfo) -> torch.Tensor:
    """One tensor, all of it in memory."""
    if info.offset is None:
        return load_old_file(folder / info.file)[name].contiguous()
    dtype = torch_dtype(info.dtype)
    # A transposed or sliced tensor: everything from its first to its last value is read, then put in order.
    span = info.nbytes
    if info.stride is not None and info.nbytes:
        last = sum((n - 1) * s for n, s in zip(info.shape, info.stride, strict=True))
        span = (last + 1) * dtype.itemsize
    flat = _values(folder / info.file, info.offset, span, dtype)
    return flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride).contiguous()


def load_rows(folder: Path, name: str, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor; all of it is read where it does not lie row after row."""
    if info.offset is None or info.stride is not None:
        return load_tensor(folder, name, info)[start:stop]
    stop = min(stop, info.shape[0])
    row = info.nbytes // max(1, info.shape[0])
    flat = _values(folder / info.file, info.offset + start * row, (stop - start) * row, torch_dtype(info.dtype))
    return flat.view(stop - start, *info.shape[1:])


def load_old_file(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .bin file older than torch 1.6."""
    import torch

    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _values(path: Path, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if not nbytes:
        return torch.empty(0, dtype=dtype)
    data = bytearray(nbytes)
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(data) != nbytes:
            raise _damaged(path, "it ends inside a tensor")
    return torch.frombuffer(data, dtype=dtype)


def read_pieces(folder: Path, name: str, info: TensorInfo, *, size: int = PIECE) -> Iterator[bytes]:
    """The bytes of a tensor, row after row, ``size`` at a time."""
    if info.offset is None or info.stride is not None:
        yield tensor_bytes(load_tensor(folder, name, info))
        return
    with (folder / info.file).open("rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            piece = file.read(min(size, left))
            if not piece:
                raise _damaged(folder / info.file, f"it ends inside {name}")
            left -= len(piece)
            yield piece


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a tensor as they stand in a file."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is going to be written; ``pieces`` gives its bytes, again at each call."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * _width(self.dtype)


def copied(folder: Path, name: str, info: TensorInfo) -> NewTensor:
    """A tensor as it is in another file."""
    if info.dtype not in _TORCH_NAMES:
        raise _damaged(folder / info.file, f"safetensors has no number format for {name} ({info.dtype})")
    return NewTensor(info.dtype, info.shape, lambda: read_pieces(folder, name, info))


def grown(folder: Path, name: str, info: TensorInfo, rows: int) -> NewTensor:
    """A tensor with further rows, each the mean of those it has; they are averaged in float64 while they pass."""
    import torch

    old = info.shape[0]
    width = prod(info.shape[1:])
    dtype = torch_dtype(info.dtype)

    def pieces() -> Iterator[bytes]:
        total = torch.zeros(width, dtype=torch.float64)
        row = width * dtype.itemsize
        for piece in read_pieces(folder, name, info, size=max(row, PIECE - PIECE % row)):
            yield piece
            total += torch.frombuffer(bytearray(piece), dtype=dtype).view(-1, width).double().sum(dim=0)
        mean = tensor_bytes((total / old).to(dtype))
        for _ in range(rows - old):
            yield mean

    return NewTensor(info.dtype, (rows, *info.shape[1:]), pieces)


def write_safetensors(
    path: Path, tensors: dict[str, NewTensor], tick: Callable[[int], None] = lambda count: None
) -> None:
    """Write a file, a piece at a time, and read it back: every byte must be the one that was meant.

    Args:
        path: made anew.
        tensors: by name.
        tick: called with the number of bytes that were written.

    Raises:
        RepairRefusedError: what was read back differs.
    """
    # Wide formats first, so that every tensor begins at a multiple of its own width.
    order = sorted(tensors, key=lambda name: -_width(tensors[name].dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in tensors[name].pieces():
                file.write(piece)
                tick(len(piece))
        file.flush()
        os.fsync(file.fileno())
    _read_back(path, order, tensors)


def _read_back(path: Path, order: Sequence[str], tensors: dict[str, NewTensor]) -> None:
    found = read_tensors(path)
    for name in order:
        with path.open("rb") as file:
            file.seek(found[name].offset or 0)
            for piece in tensors[name].pieces():
                if file.read(len(piece)) != piece:
                    raise _damaged(path, f"{name} was read back otherwise than it was written; is the disk sound?")
