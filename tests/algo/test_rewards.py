"""Where scores land among an answer's tokens, and running statistics of scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhfkit.algo.rewards import RunningMoments, apply_missing_eos_penalty, token_rewards


def test_the_score_lands_on_the_last_token() -> None:
    mask = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    found = token_rewards(torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.zeros(4, 3), mask, 0.5)
    assert found.tolist() == [[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]]


def test_every_token_pays_its_kl_and_padding_nothing() -> None:
    mask = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    kl = torch.tensor([[7.0, 7.0, 7.0], [1.0, 7.0, 7.0], [0.5, -0.25, 2.0]])
    found = token_rewards(torch.tensor([9.0, 1.0, -3.0]), kl, mask, 0.5)
    assert found.tolist() == [[0, 0, 0], [0.5, 0, 0], [-0.25, 0.125, -4.0]]


def test_rewards_add_up_to_score_minus_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 3, 5, 2])
    mask = torch.arange(5)[None] < lengths[:, None]
    kl, scores = torch.randn(5, 5, generator=generator), torch.randn(5, generator=generator)
    found = token_rewards(scores, kl, mask, 0.3)
    expected = [float(scores[i]) - 0.3 * float(kl[i, :n].sum()) for i, n in enumerate(lengths.tolist())]
    assert found.sum(dim=1).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_arguments_are_left_alone() -> None:
    kl, scores = torch.ones(1, 2), torch.ones(1)
    token_rewards(scores, kl, torch.ones(1, 2, dtype=torch.bool), 1.0)
    assert kl.tolist() == [[1, 1]]
    assert scores.tolist() == [1]


def test_answers_without_an_end_lose_the_penalty() -> None:
    scores, ended = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False])
    assert apply_missing_eos_penalty(scores, ended, 0.75).tolist() == [1.0, 0.25, -2.75]
    assert apply_missing_eos_penalty(scores, ended, 0.0).tolist() == [1.0, 1.0, -2.0]
    assert scores.tolist() == [1.0, 1.0, -2.0]


# -- running moments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [20, 20, 20], [1, 0, 40, 2, 17], [59, 1], [0, 0, 60]])
def test_running_moments_equal_those_of_all_scores_in_any_chunking(sizes: list[int]) -> None:
    scores = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 3 + 100
    running = RunningMoments()
    for chunk in scores.split(sizes):
        running.update(chunk)
    everything = scores.double().numpy()
    assert running.count == 60
    assert running.mean == pytest.approx(everything.mean(), rel=1e-12)
    assert running.std == pytest.approx(everything.std(ddof=1), rel=1e-9)
    assert running.squares == pytest.approx(np.square(everything - everything.mean()).sum(), rel=1e-9)


def test_running_std_without_two_scores_is_one() -> None:
    running = RunningMoments()
    assert running.std == 1.0
    running.update(torch.tensor([4.0]))
    assert (running.mean, running.std) == (4.0, 1.0)
    running.update(torch.tensor([]))
    assert (running.count, running.mean, running.std) == (1.0, 4.0, 1.0)


def test_running_moments_come_back_from_what_a_checkpoint_stores() -> None:
    running = RunningMoments()
    running.update(torch.tensor([1.0, 2.0, 4.0]))
    again = RunningMoments(**vars(running))
    for one in (running, again):
        one.update(torch.tensor([8.0]))
    assert vars(again) == vars(running)
    assert all(type(value) is float for value in vars(running).values())
