"""KL estimators against the exact KL of policies small enough to enumerate, and the controller of its weight."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from rlhfkit.algo.kl import KlController, kl_estimate


def two_policies(seed: int, spread: float, tokens: int = 5) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy and of a reference that is ``spread`` away from it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, generator=generator, dtype=torch.float64)
    moved = logits + spread * torch.randn(tokens, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0), moved.log_softmax(0)


def exact_kl(p: Tensor, q: Tensor) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_expectations_over_the_policy(seed: int, spread: float) -> None:
    """Weighing every token by the policy's probability is sampling without noise."""
    p, q = two_policies(seed, spread)
    kl = exact_kl(p, q)
    weights = p.exp()
    for kind in ("k1", "k3"):
        assert float((weights * kl_estimate(p, q, kind)).sum()) == pytest.approx(kl, rel=1e-9), kind
    biased = float((weights * kl_estimate(p, q, "k2")).sum())
    if spread == 0.01:  # the bias is of third order in the distance
        assert biased == pytest.approx(kl, rel=0.02)
    assert biased > 0


def test_direction() -> None:
    """KL(policy || reference), not the other way round: they differ, and so must the estimates."""
    p, q = torch.tensor([0.9, 0.09, 0.01]).double().log(), torch.tensor([0.2, 0.2, 0.6]).double().log()
    forward, backward = exact_kl(p, q), exact_kl(q, p)
    assert abs(forward - backward) > 0.1
    for kind in ("k1", "k3"):
        assert float((p.exp() * kl_estimate(p, q, kind)).sum()) == pytest.approx(forward)
        assert float((q.exp() * kl_estimate(q, p, kind)).sum()) == pytest.approx(backward)


def test_by_hand() -> None:
    p, q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # r = 1/2
    assert float(kl_estimate(p, q, "k1")) == pytest.approx(math.log(2))
    assert float(kl_estimate(p, q, "k2")) == pytest.approx(0.5 * math.log(2) ** 2)
    assert float(kl_estimate(p, q, "k3")) == pytest.approx(-0.5 + math.log(2))
    assert float(kl_estimate(q, p, "k1")) == pytest.approx(-math.log(2))


def test_k3_and_k2_are_never_negative_and_zero_only_where_equal() -> None:
    log_ratio = torch.arange(-500, 501) / 64
    zero = torch.zeros_like(log_ratio)
    for kind in ("k2", "k3"):
        found = kl_estimate(zero, log_ratio, kind)
        assert (found >= 0).all(), kind
        assert float(found[500]) == 0.0
        assert (found[log_ratio != 0] > 0).all(), kind
    assert (kl_estimate(zero, log_ratio, "k1") < 0).any()


def test_k3_keeps_its_digits_for_near_policies() -> None:
    """In float32 (r - 1) - log r is all rounding where r is near 1; through expm1 it is not negative at least."""
    tiny = torch.linspace(-1e-3, 1e-3, 201)
    found = kl_estimate(torch.zeros_like(tiny), tiny, "k3")
    torch.testing.assert_close(found, 0.5 * tiny.square(), rtol=2e-3, atol=2e-10)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(torch.zeros(shape), torch.ones(shape), kind).shape == shape


@pytest.mark.parametrize("seed", range(3))
def test_gradients_over_the_policy(seed: int) -> None:
    """What an estimator pulls at when it stands in a loss, as with GRPO: its gradient, averaged over the policy.

    k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy); k1 pulls at nothing on average.
    """
    p, q = two_policies(seed, 0.5)
    logits = p.clone().requires_grad_()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits)[0]

    def of_estimate(kind: Literal["k1", "k2", "k3"]) -> Tensor:
        return gradient((p.exp() * kl_estimate(logits.log_softmax(0), q, kind)).sum())

    new = logits.log_softmax(0)
    torch.testing.assert_close(of_estimate("k2"), gradient((new.exp() * (new - q)).sum()))
    torch.testing.assert_close(of_estimate("k3"), gradient((q.exp() * (q - logits.log_softmax(0))).sum()))
    torch.testing.assert_close(of_estimate("k1"), torch.zeros_like(p))


# -- the controller ----------------------------------------------------------------------------------------------------


def test_a_fixed_weight_stays() -> None:
    controller = KlController(0.05)
    for kl in (-1.0, 0.0, 3.0, 1e6):
        controller.update(kl, 64)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "error"), [(6.6, 0.1), (5.4, -0.1), (6.0, 0.0), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-5.0, -0.2)]
)
def test_the_weight_follows_the_deviation_up_to_a_fifth(kl: float, error: float) -> None:
    controller = KlController(0.2, target=6.0, horizon=1000.0)
    controller.update(kl, 50)
    assert controller.coef == pytest.approx(0.2 * (1 + error * 50 / 1000), rel=1e-12)


def test_a_horizon_of_large_deviation_changes_the_weight_by_a_fifth() -> None:
    controller = KlController(1.0, target=1.0, horizon=10000.0)
    for _ in range(10000 // 50):
        controller.update(5.0, 50)
    assert controller.coef == pytest.approx(math.exp(0.2), rel=1e-2)


@pytest.mark.parametrize("start", [0.001, 3.0])
def test_the_loop_finds_its_target(start: float) -> None:
    """A policy that drifts further the less it is held: KL = 1 / weight. The target of 4 is met at 1/4."""
    controller = KlController(start, target=4.0, horizon=300.0)
    for _ in range(500):
        controller.update(1.0 / controller.coef, 30)
    assert controller.coef == pytest.approx(0.25, rel=1e-3)
