"""Rows laid end to end, so that no padding is computed, and prompts shared by several answers, computed once.

Every layer but attention looks at one token at a time. It gets the tokens of a micro-batch as one line, each of them
once. Attention alone works on rows; a `Layout` says where the tokens stand in them. A prompt with several answers is a
*tree*: its trunk stands in the row of each of its branches, but only once in the line.

Shapes: N tokens of a micro-batch, R rows of attention, L cells in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int32]


class Tree(NamedTuple):
    """Token ids that begin a row, and the continuations that each see them and not each other; there may be none."""

    trunk: Ids
    branches: tuple[Ids, ...] = ()

    def __len__(self) -> int:
        """Tokens to compute."""
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def rows(self) -> int:
        """Rows of attention."""
        return max(1, len(self.branches))

    @property
    def longest(self) -> int:
        """Cells of its longest row."""
        return len(self.trunk) + max(map(len, self.branches), default=0)


class Layout(NamedTuple):
    """Where the tokens of a line stand in rows. All int64; rows are filled from the left."""

    rows: Tensor  # [R, L] the token in each cell; 0 in the cells beyond a row's end
    lengths: Tensor  # [R]
    cells: Tensor  # [N] the first cell of each token, counted through all rows
    # The i-th further copy of each trunk: which tokens they are and in which cells they stand, [M] each. No token comes
    # twice in one of these, which is what lets gradients be added without an atomic operation.
    copies: tuple[tuple[Tensor, Tensor], ...]


class Packed(NamedTuple):
    """A line of tokens: the branches of a tree follow its trunk, trees follow one another."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N] counted from the beginning of each row
    layout: Layout

    def to(self, device: torch.device) -> Packed:
        layout = self.layout
        moved = Layout(
            layout.rows.to(device),
            layout.lengths.to(device),
            layout.cells.to(device),
            tuple((tokens.to(device), cells.to(device)) for tokens, cells in layout.copies),
        )
        return Packed(self.input_ids.to(device), self.position_ids.to(device), moved)


def pack(trees: Sequence[Tree]) -> Packed:
    """Lay trees end to end.

    Args:
        trees: at least one; none of their rows is empty.
    """
    width = max(tree.longest for tree in trees)
    height = sum(tree.rows for tree in trees)
    total = sum(map(len, trees))
    ids = np.empty(total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    rows = np.zeros((height, width), dtype=np.int64)
    lengths = np.empty(height, dtype=np.int64)
    cells = np.empty(total, dtype=np.int64)
    copies: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = []
    row = token = 0
    for trunk, branches in trees:
        size = len(trunk)
        trunk_tokens = np.arange(token, token + size)
        ids[token : token + size] = trunk
        positions[token : token + size] = np.arange(size)
        cells[token : token + size] = row * width + np.arange(size)
        token += size
        for copy, branch in enumerate(branches or (trunk[:0],)):
            end = size + len(branch)
            branch_tokens = np.arange(token, token + len(branch))
            ids[token : token + len(branch)] = branch
            positions[token : token + len(branch)] = np.arange(size, end)
            cells[token : token + len(branch)] = row * width + np.arange(size, end)
            rows[row, :size] = trunk_tokens
            rows[row, size:end] = branch_tokens
            lengths[row] = end
            if copy and size:
                if len(copies) < copy:
                    copies.append([])
                copies[copy - 1].append((trunk_tokens, row * width + np.arange(size)))
            token += len(branch)
            row += 1
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        Layout(
            torch.from_numpy(rows),
            torch.from_numpy(lengths),
            torch.from_numpy(cells),
            tuple((_joined(t for t, _ in parts), _joined(c for _, c in parts)) for parts in copies),
        ),
    )


def join(rows: Sequence[Ids]) -> Tree:
    """Rows as one tree: what all begin with is its trunk. Each keeps at least its last token as a branch.

    Prompts begin alike more often than it seems: with the template's system message.
    """
    size = shared_beginning(rows)
    return Tree(rows[0][:size], tuple(row[size:] for row in rows))


def shared_beginning(rows: Sequence[Ids]) -> int:
    """How many tokens all rows begin with alike, the last one of each not counted."""
    first, size = rows[0], min(map(len, rows)) - 1
    for row in rows[1:]:
        other = np.flatnonzero(first[:size] != row[:size])
        size = int(other[0]) if len(other) else size
    return size


def _joined(parts: Iterable[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(parts)))


def part_ends(trees: Sequence[Tree]) -> list[tuple[int, list[int]]]:
    """For each tree, where in the line its trunk ends and where each of its branches does (one past the last token)."""
    ends = []
    token = 0
    for trunk, branches in trees:
        token += len(trunk)
        trunk_end = token
        branch_ends = []
        for branch in branches:
            token += len(branch)
            branch_ends.append(token)
        ends.append((trunk_end, branch_ends))
    return ends


def group_by_tokens(trees: Sequence[tuple[int, int, int]], max_tokens: int) -> list[list[int]]:
    """Indices of trees in micro-batches of at most ``max_tokens`` tokens each; a bigger tree is alone.

    Trees of like length stand together, and their rows take at most twice ``max_tokens`` cells, so that attention
    computes little padding. The micro-batches come out about equally full.

    Args:
        trees: of each its tokens, rows of attention, and cells of its longest row.
        max_tokens: sets memory, never the result.
    """
    order = sorted(range(len(trees)), key=lambda i: (-trees[i][2], i))
    groups = _fill([trees[i] for i in order], max_tokens, max_tokens)
    # The smallest limit that makes no more micro-batches makes them most alike.
    low, high = 0, max_tokens
    while high - low > 1:
        middle = (low + high) // 2
        tried = _fill([trees[i] for i in order], middle, max_tokens)
        low, high = (low, middle) if len(tried) <= len(groups) else (middle, high)
        groups = min(groups, tried, key=len) if len(tried) > len(groups) else tried
    return [[order[i] for i in group] for group in groups]


def _fill(trees: Sequence[tuple[int, int, int]], limit: int, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    filled = rows = widest = 0
    for i, (tokens, height, longest) in enumerate(trees):
        if groups and filled + tokens <= limit and (rows + height) * widest <= 2 * max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
            filled = rows = 0
            widest = longest
        filled += tokens
        rows += height
    return groups
