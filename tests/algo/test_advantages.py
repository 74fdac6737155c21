"""Advantages against a second form of each formula, on ragged random answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhfkit.algo.advantages import Moments, gae, grpo, moments, rloo, whiten

LENGTHS = (1, 7, 4, 0, 2, 7, 3)


def ragged_mask(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def ragged_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask; what lies outside the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask()
    rewards = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    return rewards, values, mask


# -- generalised advantage estimation ----------------------------------------------------------------------------------


def gae_of_one_answer(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One answer, no padding, backwards as in the usual Python loop."""
    advantages: list[float] = []
    later = 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        later = rewards[t] + gamma * next_value - values[t] + gamma * lam * later
        advantages.insert(0, later)
    return advantages


def gae_as_a_sum(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Equation 16 as it stands: A_t = sum over l of (gamma lam)^l delta_(t+l), as a matrix times the deltas."""
    delta = rewards + gamma * torch.cat([values[1:], values.new_zeros(1)]) - values
    steps = torch.arange(len(delta))
    ahead = steps[None] - steps[:, None]
    weights = torch.where(ahead >= 0, (gamma * lam) ** ahead.clamp(min=0).double(), 0.0)
    return weights @ delta


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_three_forms_of_gae_agree(gamma: float, lam: float, seed: int) -> None:
    rewards, values, mask = ragged_batch(seed)
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, n in enumerate(LENGTHS):
        loop = gae_of_one_answer(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        total = gae_as_a_sum(rewards[i, :n], values[i, :n], gamma, lam)
        np.testing.assert_allclose(found.advantages[i, :n].numpy(), loop, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.advantages[i, :n].numpy(), total.numpy(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            found.returns[i, :n].numpy(), np.array(loop) + values[i, :n].numpy(), rtol=1e-12, atol=1e-12
        )
    assert not found.advantages[~mask].any()
    assert not found.returns[~mask].any()


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    # delta_2 = 2 - 1.5 = 0.5; delta_1 = 0 + 0.5*1.5 - 1 = -0.25; delta_0 = 1 + 0.5*1 - 0.5 = 1
    # A_2 = 0.5; A_1 = -0.25 + 0.25*0.5 = -0.125; A_0 = 1 + 0.25*(-0.125) = 0.96875
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    assert found.advantages.tolist() == [[0.96875, -0.125, 0.5]]
    assert found.returns.tolist() == [[1.46875, 0.875, 2.0]]


def test_lambda_zero_looks_one_step_ahead() -> None:
    rewards, values, mask = ragged_batch(2)
    found = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros(len(values), 1, dtype=values.dtype)], dim=1)
    torch.testing.assert_close(found.advantages, (rewards + 0.9 * next_values - values) * mask)


def test_lambda_one_is_discounted_reward_minus_value() -> None:
    rewards, values, mask = ragged_batch(3)
    found = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    to_go = torch.zeros_like(rewards)
    for t in range(rewards.shape[1]):
        discounts = 0.9 ** torch.arange(rewards.shape[1] - t).double()
        to_go[:, t] = (rewards[:, t:] * discounts).sum(dim=1)
    torch.testing.assert_close(found.returns, to_go * mask)
    torch.testing.assert_close(found.advantages, (to_go - values) * mask)


def test_what_lies_in_the_padding_changes_nothing() -> None:
    rewards, values, mask = ragged_batch(4)
    clean = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    dirty = gae(rewards + 1e3 * ~mask, values - 1e3 * ~mask, mask, gamma=0.99, lam=0.9)
    assert torch.equal(clean.advantages, dirty.advantages)
    assert torch.equal(clean.returns, dirty.returns)


def test_more_padding_changes_nothing() -> None:
    rewards, values, mask = ragged_batch(5)
    clean = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    wide = [torch.nn.functional.pad(t, (0, 3)) for t in (rewards, values, mask)]
    padded = gae(*wide, gamma=0.99, lam=0.9)
    assert torch.equal(padded.advantages[:, :7], clean.advantages)
    assert not padded.advantages[:, 7:].any()


def test_answers_that_are_all_empty_have_no_advantages() -> None:
    nothing = torch.zeros(3, 0)
    found = gae(nothing, nothing, nothing.bool(), gamma=0.9, lam=0.8)
    assert found.advantages.shape == found.returns.shape == (3, 0)
    assert whiten(nothing, nothing.bool(), moments(nothing, nothing.bool())).shape == (3, 0)


def test_gae_leaves_its_arguments_alone() -> None:
    rewards, values, mask = ragged_batch(6)
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


# -- groups of samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_rloo_equals_a_loop_over_groups(group_size: int) -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for i in range(12):
        start = i - i % group_size
        others = [float(scores[j]) for j in range(start, start + group_size) if j != i]
        expected.append(float(scores[i]) - sum(others) / len(others))
    np.testing.assert_allclose(rloo(scores, group_size).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_grpo_equals_a_loop_over_groups(group_size: int) -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = []
    for start in range(0, 12, group_size):
        group = scores[start : start + group_size].numpy()
        expected += ((group - group.mean()) / (group.std(ddof=1) + 1e-4)).tolist()
    np.testing.assert_allclose(grpo(scores, group_size).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_groups_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 10.0, 10.0])
    assert rloo(scores, 2).tolist() == [-2.0, 2.0, 0.0, 0.0]
    half = 2.0**-0.5  # the standard deviation of 1 and 3 is the root of 2
    assert grpo(scores, 2, eps=0.0)[:2].tolist() == pytest.approx([-half, half])
    assert grpo(scores, 2)[2:].tolist() == [0.0, 0.0]  # equal scores teach nothing, and divide nothing by 0


# -- whitening ---------------------------------------------------------------------------------------------------------


def test_whitened_entries_have_mean_zero_and_variance_one() -> None:
    mask = ragged_mask()
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(7)) * 3 + 5
    white = whiten(x, mask, moments(x, mask))
    kept = x[mask].numpy().astype(np.float64)
    np.testing.assert_allclose(white[mask].numpy(), (kept - kept.mean()) / kept.std(), rtol=1e-5, atol=1e-5)
    assert not white[~mask].any()
    assert white.dtype == x.dtype


def test_moments_of_two_processes_add_up_to_those_of_the_whole() -> None:
    mask = ragged_mask((3, 5, 1, 5, 2, 4))
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(8)) * 2 - 1
    x = x + 1e4 * ~mask  # what lies outside does not count
    halves = [moments(x[:2], mask[:2]), moments(x[2:], mask[2:])]
    summed = Moments(*(a + b for a, b in zip(*halves, strict=True)))
    whole = moments(x, mask)
    assert [float(m) for m in summed] == pytest.approx([float(m) for m in whole])
    assert float(whole.entries) == 20
    parts = torch.cat([whiten(x[:2], mask[:2], summed), whiten(x[2:], mask[2:], summed)])
    torch.testing.assert_close(parts, whiten(x, mask, whole))
    # Each half whitened by itself would be something else.
    assert not torch.allclose(parts[:2], whiten(x[:2], mask[:2], halves[0]), atol=0.05)


def test_moments_keep_a_small_spread_around_a_large_mean() -> None:
    x = torch.tensor([[4096.0, 4096.25, 4096.5, 4096.75]])
    mask = torch.ones_like(x, dtype=torch.bool)
    white = whiten(x, mask, moments(x, mask))
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.std([-1.5, -0.5, 0.5, 1.5])
    np.testing.assert_allclose(white[0].numpy(), expected, rtol=1e-4)


def test_equal_entries_whiten_to_zero() -> None:
    x = torch.full((2, 3), 0.7)
    mask = torch.ones_like(x, dtype=torch.bool)
    assert whiten(x, mask, moments(x, mask)).abs().max() < 1e-2
