"""Rows of token ids, micro-batches of them, and the order in which they come.

Shapes: B rows, T tokens of the longest row, N tokens that carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of one row; ``supervised[i]`` is true where token i is learned."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that carry loss. The first token has nothing in front to be predicted from."""
        return int(self.supervised[1:].sum())


def token_row(ids: Sequence[int], supervised: Sequence[bool]) -> TokenRow:
    return TokenRow(np.asarray(ids, dtype=np.int32), np.asarray(supervised, dtype=np.bool_))


class TokenBatch(NamedTuple):
    """Right-padded rows, and which hidden states predict which tokens."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    positions: Tensor  # [N] index into the flattened [B * T] hidden states
    targets: Tensor  # [N] the token that follows there

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(*(t.to(device) for t in self))


def collate(rows: Sequence[TokenRow], pad_id: int) -> TokenBatch:
    """Rows to a batch. ``pad_id`` only fills: no label and no mask is ever derived from it."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    learned = np.zeros((len(rows), longest), dtype=np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = 1
        learned[i, 1 : len(row)] = row.supervised[1:]
    flat = np.flatnonzero(learned.reshape(-1))
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.from_numpy(flat - 1),
        torch.from_numpy(ids.reshape(-1)[flat]),
    )


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows in micro-batches whose padded size stays within ``max_tokens``.

    Rows of like length stand together, so little padding is computed. A row longer than ``max_tokens`` is alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        widest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * widest <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which rows make up each step's global batch: a pure function of seed and step, so that resuming needs no state.

    Args:
        rows: size of the data set.
        batch_size: rows per step over all processes; an epoch's last batch may be smaller.
        seed: each epoch is shuffled by seed and epoch number.
    """

    rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    def total_steps(self, epochs: float, max_steps: int) -> int:
        steps = max(1, round(self.steps_per_epoch * epochs))
        return min(steps, max_steps) if max_steps else steps

    def batch(self, step: int) -> list[int]:
        """Row indices of step ``step``, the first being 1."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return [int(i) for i in order[within * self.batch_size : (within + 1) * self.batch_size]]


def share(items: Sequence[Any], process: int, processes: int) -> list[Any]:
    """The part of a global batch that one process works on."""
    return list(items[process::processes])
