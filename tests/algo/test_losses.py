"""Losses by hand on both sides of every clip, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhfkit.algo.losses import policy_loss, ranking_loss, value_loss

# -- ranking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_ranking_loss_is_its_formula(margin: float, center: float) -> None:
    pairs = [(1.0, 0.0), (0.0, 2.0), (-1.5, -1.5), (3.0, -3.0)]
    expected = [math.log1p(math.exp(-(c - r - margin))) + center * (c + r) ** 2 for c, r in pairs]
    chosen, rejected = (torch.tensor(side) for side in zip(*pairs, strict=True))
    found = ranking_loss(chosen, rejected, torch.full((4,), margin), center_coef=center)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_equal_scores_cost_ln_2_and_a_margin_more() -> None:
    zero = torch.zeros(1)
    assert float(ranking_loss(zero, zero, zero)) == pytest.approx(math.log(2))
    assert float(ranking_loss(zero, zero, zero + 1)) == pytest.approx(math.log(1 + math.e))


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothed_ranking_loss_is_a_mixture_of_both_orders(smoothing: float) -> None:
    """The cross-entropy of sigmoid(r_chosen - r_rejected - margin) with the label 1 - smoothing."""
    chosen, rejected = torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 1.0, -60.0])
    margin = torch.tensor([0.0, 0.5, 0.0])
    found = ranking_loss(chosen, rejected, margin, label_smoothing=smoothing)
    expected = F.binary_cross_entropy_with_logits(
        chosen - rejected - margin, torch.full((3,), 1 - smoothing), reduction="none"
    )
    torch.testing.assert_close(found, expected)


def test_far_wrong_pairs_stay_finite_and_keep_their_gradient() -> None:
    chosen = torch.tensor([-300.0], requires_grad=True)
    loss = ranking_loss(chosen, torch.tensor([300.0]), torch.zeros(1))
    loss.backward()
    assert loss.tolist() == [600.0]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0]


def test_ranking_loss_of_bf16_scores_is_float32() -> None:
    chosen, rejected = torch.tensor([1.0]).bfloat16(), torch.tensor([258.0]).bfloat16()
    found = ranking_loss(chosen, rejected, torch.zeros(1))
    assert found.dtype == torch.float32
    assert found.tolist() == [257.0]  # which bf16 does not have


# -- policy ------------------------------------------------------------------------------------------------------------

# ratio, advantage, loss, whether the clipped branch is taken; cliprange 0.2.
POLICY = [
    (1.0, 2.0, -2.0, False),
    (1.1, 2.0, -2.2, False),
    (1.5, 2.0, -2.4, True),  # better and already likelier by half: enough
    (0.5, 2.0, -1.0, False),  # better but less likely: go back up
    (1.0, -2.0, 2.0, False),
    (0.9, -2.0, 1.8, False),
    (0.5, -2.0, 1.6, True),  # worse and already half as likely: enough
    (1.5, -2.0, 3.0, False),  # worse but likelier: come down
    (1.5, 0.0, 0.0, False),
    (0.5, 0.0, 0.0, False),
]


def policy_inputs(ratio: float, advantage: float) -> tuple[Tensor, Tensor, Tensor]:
    old = torch.tensor([math.log(0.3)], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    return new, old, torch.tensor([advantage], dtype=torch.float64)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "clipped"), POLICY)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    new, old, advantages = policy_inputs(ratio, advantage)
    found = policy_loss(new, old, advantages, 0.2)
    assert found.loss.tolist() == pytest.approx([loss])
    assert found.ratio.tolist() == pytest.approx([ratio])
    assert found.clipped.tolist() == [clipped]
    assert not found.ratio.requires_grad
    found.loss.sum().backward()
    # d loss / d log p is -A r on the plain branch, and nothing on the clipped one.
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0 if clipped else -advantage * ratio])


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 0.7])
def test_first_pass_has_the_policy_gradient(advantage: float) -> None:
    """Before any step the ratio is 1 and the gradient that of -A log p: no clip range may halve or double it."""
    new, old, advantages = policy_inputs(1.0, advantage)
    for cliprange in (0.1, 0.3):
        new.grad = None
        policy_loss(new, old, advantages, cliprange).loss.sum().backward()
        assert new.grad is not None
        assert float(new.grad) == pytest.approx(-advantage)


def test_policy_loss_takes_any_shape() -> None:
    found = policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 0.2)
    assert [t.shape for t in found] == [(2, 3)] * 3


# -- value -------------------------------------------------------------------------------------------------------------

# value, old value, return, loss with clip range 0.5, gradient
VALUE = [
    (1.2, 1.0, 2.0, 0.32, -0.8),  # within the range: half of 0.8 squared
    (1.8, 1.0, 2.0, 0.125, 0.0),  # ran ahead towards the return: the clipped error of 0.5 counts, and stops
    (0.2, 1.0, 2.0, 1.62, -1.8),  # ran away from the return: the plain error is worse, and pulls back
    (0.2, 1.0, 0.0, 0.125, 0.0),  # the same two below
    (1.8, 1.0, 0.0, 1.62, 1.8),
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "gradient"), VALUE)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float, gradient: float) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    found = value_loss(values, torch.tensor([old]).double(), torch.tensor([target]).double(), 0.5)
    assert found.tolist() == pytest.approx([loss])
    found.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([gradient])


def test_no_clip_range_is_half_the_squared_error() -> None:
    values, old, returns = torch.tensor([1.8, -4.0]), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    assert value_loss(values, old, returns, 0.0).tolist() == pytest.approx([0.02, 12.5])
    assert value_loss(values, old, returns, 100.0).tolist() == pytest.approx([0.02, 12.5])


def test_the_first_pass_over_values_is_unclipped() -> None:
    values = torch.tensor([1.0, -1.0], requires_grad=True)
    value_loss(values, values.detach(), torch.tensor([3.0, 3.0]), 0.2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-2.0, -4.0]
