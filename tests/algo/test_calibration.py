"""The report on ranked pairs: by hand, against what it means, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from rlhfkit.algo.calibration import evaluation_report, histogram


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_by_hand() -> None:
    """Four pairs in two bins: 0.6 twice, right once; 0.9 twice, right twice."""
    chosen = [logit(0.6), 0.0, logit(0.9), logit(0.9) + 2]
    rejected = [0.0, logit(0.6), 0.0, 2.0]
    report = evaluation_report(chosen, rejected, [1.0] * 4, bins=3)
    assert (report.pairs, report.prompts, report.accuracy, report.ties) == (4, 4.0, 0.75, 0)
    assert report.margin == pytest.approx(2 * logit(0.9) / 4)
    assert report.log_loss == pytest.approx(-(math.log(0.6) + math.log(0.4) + 2 * math.log(0.9)) / 4)
    assert report.confidence == pytest.approx(0.75)
    assert report.calibration_error == pytest.approx((0.1 + 0.1) / 2)
    assert report.reward_chosen_std == pytest.approx(torch.tensor(chosen).std(correction=0).item(), rel=1e-6)
    assert [(b.pairs, b.share) for b in report.reliability] == [(2, 0.5), (0, 0), (2, 0.5)]
    filled = [b for b in report.reliability if b.pairs]
    assert [b.predicted for b in filled] == pytest.approx([0.6, 0.9])
    assert [b.observed for b in filled] == pytest.approx([0.5, 1.0])
    assert report.reliability[1].predicted is report.reliability[1].observed is None


def test_turning_a_pair_round_turns_its_accuracy_alone() -> None:
    """What is predicted of two answers does not depend on which of them is called chosen."""
    chosen, rejected = torch.randn(50, generator=torch.manual_seed(0)), torch.randn(50)
    one = evaluation_report(chosen, rejected, torch.ones(50))
    two = evaluation_report(rejected, chosen, torch.ones(50))
    assert two.confidence == pytest.approx(one.confidence)
    assert two.accuracy == pytest.approx(1 - one.accuracy)
    assert two.margin == pytest.approx(-one.margin)


def test_a_weight_is_a_repetition() -> None:
    chosen, rejected = [1.0, 0.5, -1.0], [0.0, 1.0, -4.0]
    weighted = evaluation_report(chosen, rejected, [1.0, 2.0, 1.0])
    repeated = evaluation_report([*chosen, 0.5], [*rejected, 1.0], [1.0] * 4)
    left, right = weighted.as_dict(), repeated.as_dict()
    for name in ("prompts", "accuracy", "margin", "margin_std", "log_loss", "calibration_error", "reward_chosen_std"):
        assert left[name] == pytest.approx(right[name])
    assert weighted.histogram == repeated.histogram


@pytest.mark.parametrize("scale", [1.0, 4.0, 0.25])
def test_scores_that_come_true_are_calibrated_and_scaled_ones_are_not(scale: float) -> None:
    """Labels drawn with probability sigmoid(margin); stretched scores promise more than they keep."""
    generator = torch.manual_seed(0)
    a, b = torch.randn(20000, generator=generator), torch.randn(20000, generator=generator)
    a_wins = torch.rand(20000, generator=generator) < (a - b).sigmoid()
    report = evaluation_report(
        scale * torch.where(a_wins, a, b), scale * torch.where(a_wins, b, a), torch.ones(20000), bins=10
    )
    truth, said = ((s * (a - b)).abs().sigmoid().mean().item() for s in (1.0, scale))
    assert report.accuracy == pytest.approx(truth, abs=0.01)
    assert report.confidence == pytest.approx(said)
    assert report.calibration_error == pytest.approx(abs(said - truth), abs=0.015)


def test_ties_are_wrong_in_accuracy_and_half_right_in_calibration() -> None:
    report = evaluation_report([1.0, 2.0], [1.0, 2.0], [1.0, 1.0])
    assert (report.accuracy, report.ties, report.confidence, report.calibration_error) == (0.0, 2, 0.5, 0.0)
    assert report.log_loss == pytest.approx(math.log(2))


def test_certain_pairs_lie_in_the_last_bin() -> None:
    report = evaluation_report([1000.0, 0.0], [0.0, 1000.0], [1.0, 1.0])
    assert report.reliability[-1].pairs == 2
    assert report.reliability[-1].observed == 0.5
    assert report.log_loss == 500.0


@pytest.mark.parametrize("bad", [([], []), ([1.0], [math.nan]), ([math.inf], [1.0])])
def test_nothing_and_no_numbers_are_refused(bad: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match=r"no pair|not finite"):
        evaluation_report(*bad, [1.0] * len(bad[0]))


@pytest.mark.parametrize("values", [[0.1, 0.9], [-3.2, 4.1, 0.0], [5.0, 5.0], [-1e6, 1e6], [1e-7, 3e-7], [2.0, 3.0]])
def test_histograms_hold_every_score_between_round_bounds(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    found = histogram({"a": scores, "b": scores[:1]})
    assert len(found.edges) - 1 <= 16
    assert found.edges[0] <= min(values)
    assert max(values) <= found.edges[-1]
    assert (sum(found.counts["a"]), sum(found.counts["b"])) == (len(values), 1)
    for value in values:
        place = next((i for i, edge in enumerate(found.edges) if value < edge), len(found.edges) - 1) - 1
        assert found.counts["a"][place] >= 1
    width = found.edges[1] - found.edges[0]
    assert f"{width:.0e}"[0] in "125"
