"""Padding, micro-batches and the order of rows, to the index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhfkit.data.batch import BatchOrder, TokenRow, collate, share, token_row


def random_rows(seed: int, lengths: tuple[int, ...]) -> list[TokenRow]:
    generator = np.random.default_rng(seed)
    return [token_row(generator.integers(50, size=n).tolist(), (generator.random(n) < 0.5).tolist()) for n in lengths]


# -- collate -----------------------------------------------------------------------------------------------------------


def test_collate_to_the_number() -> None:
    rows = [
        token_row([7, 8, 5], [False, False, True]),
        token_row([5, 6, 5, 9, 5], [True, False, True, True, True]),
        token_row([5, 5], [False, True]),
    ]
    batch = collate(rows)
    assert batch.tokens.input_ids.tolist() == [7, 8, 5, 5, 6, 5, 9, 5, 5, 5]
    assert batch.tokens.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    # Token 2 of row 0 is predicted at place 1; tokens 2, 3, 4 of row 1 at 4, 5, 6; token 1 of row 2 at its start.
    assert batch.positions.tolist() == [1, 4, 5, 6, 8]
    assert batch.targets.tolist() == [5, 5, 9, 5, 5]


def test_the_first_token_is_never_a_target_even_in_a_later_row() -> None:
    """Its hidden state in front would be the last one of the row above."""
    batch = collate([token_row([1, 2], [True, True]), token_row([3, 4], [True, False])])
    assert batch.positions.tolist() == [0]
    assert batch.targets.tolist() == [2]


def test_row_counts_its_targets_as_collate_does() -> None:
    rows = random_rows(0, (1, 2, 5, 9, 9))
    assert [row.targets for row in rows] == [len(collate([row]).targets) for row in rows]
    assert len(collate(rows).targets) == sum(row.targets for row in rows)
    assert [len(row) for row in rows] == [1, 2, 5, 9, 9]


def test_collate_leaves_the_rows_as_they_were() -> None:
    rows = [token_row([1, 2], [True, True])]
    collate(rows)
    assert rows[0].supervised.tolist() == [True, True]


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 5), (10, 4), (3, 8), (1, 1)])
def test_each_epoch_is_a_permutation(rows: int, batch_size: int) -> None:
    order = BatchOrder(rows, batch_size, seed=3)
    steps = order.steps_per_epoch
    assert steps == int(np.ceil(rows / batch_size))
    epochs = []
    for epoch in range(3):
        batches = [order.batch(epoch * steps + k + 1) for k in range(steps)]
        assert [len(b) for b in batches[:-1]] == [batch_size] * (steps - 1)
        epochs.append([i for b in batches for i in b])
        assert sorted(epochs[-1]) == list(range(rows))
    if rows == 10:
        assert len({tuple(e) for e in epochs}) == 3  # each epoch has an order of its own


def test_a_step_needs_no_history() -> None:
    """What step 17 trains on is known without the 16 before it; that is what a resume relies on."""
    walked = [BatchOrder(50, 8, seed=1).batch(step) for step in range(1, 30)]
    for step in (17, 1, 29, 8, 7):
        assert BatchOrder(50, 8, seed=1).batch(step) == walked[step - 1]
    assert [BatchOrder(50, 8, seed=2).batch(step) for step in range(1, 30)] != walked


def test_the_order_does_not_touch_the_global_generators() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    BatchOrder(50, 8, seed=1).batch(3)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # type: ignore[index]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"), [(1.0, 0, 3), (2.0, 0, 6), (0.5, 0, 2), (0.01, 0, 1), (2.0, 4, 4), (1.0, 100, 3)]
)
def test_total_steps(epochs: float, max_steps: int, total: int) -> None:
    assert BatchOrder(10, 4, seed=0).total_steps(epochs, max_steps) == total


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_the_whole(processes: int) -> None:
    items = list(range(7))
    shares = [share(items, process, processes) for process in range(processes)]
    assert sorted(i for part in shares for i in part) == items
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
    assert share(items, 1, 3) == [1, 4]
