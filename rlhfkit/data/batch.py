"""Rows of token ids, micro-batches of them, and the order in which they come.

Shapes: N tokens of a micro-batch, M of them carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhfkit.data.packing import Packed, Tree, group_by_tokens, pack


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of one row; ``supervised[i]`` is true where token i is learned. ``noise`` seeds NEFTune's, if any."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    noise: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that carry loss. The first token has nothing in front to be predicted from."""
        return int(self.supervised[1:].sum())


def token_row(ids: Sequence[int], supervised: Sequence[bool]) -> TokenRow:
    return TokenRow(np.asarray(ids, dtype=np.int32), np.asarray(supervised, dtype=np.bool_))


class TokenBatch(NamedTuple):
    """A micro-batch, and which hidden states predict which tokens."""

    tokens: Packed
    positions: Tensor  # [M] place in the line of the token in front of each target
    targets: Tensor  # [M]
    noise: tuple[tuple[int, ...], ...] = ()  # of each row: seeds, or nothing

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.tokens.to(device), self.positions.to(device), self.targets.to(device), self.noise)


def collate(rows: Sequence[TokenRow]) -> TokenBatch:
    """Rows to a micro-batch."""
    packed = pack([Tree(row.ids) for row in rows])
    learned = np.concatenate([row.supervised for row in rows])
    learned[np.cumsum([0, *(len(row) for row in rows[:-1])])] = False  # nothing stands in front of a first token
    places = torch.from_numpy(np.flatnonzero(learned))
    return TokenBatch(packed, places - 1, packed.input_ids[places], tuple(row.noise for row in rows))


def micro_batches(rows: Sequence[TokenRow], max_tokens: int) -> list[list[TokenRow]]:
    """Rows in micro-batches of at most ``max_tokens`` tokens; see `group_by_tokens`."""
    groups = group_by_tokens([(len(row), 1, len(row)) for row in rows], max_tokens)
    return [[rows[i] for i in group] for group in groups]


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
        order = _shuffled(self.rows, self.seed, epoch)
        return [int(i) for i in order[within * self.batch_size : (within + 1) * self.batch_size]]


@lru_cache(maxsize=1)  # an epoch's batches follow each other
def _shuffled(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def share(items: Sequence[Any], process: int, processes: int) -> list[Any]:
    """The part of a global batch that one process works on."""
    return list(items[process::processes])
