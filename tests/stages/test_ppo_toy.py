"""PPO on toys whose right direction is known, and the pieces between a rollout and its update.

The toy: one prompt token, a model with eight tokens, answers of one or two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhfkit.algo.advantages import gae
from rlhfkit.algo.logprobs import token_logprobs
from rlhfkit.algo.rewards import RunningMoments
from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import DataConfig, ModelConfig, PpoBlock, PpoOptimConfig, RunConfig
from rlhfkit.config.stages import PpoConfig
from rlhfkit.data.records import PromptRecord
from rlhfkit.data.tokenize import PromptRow
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.wrappers import PolicyModel
from rlhfkit.runtime.optim import Optimisation, StepResult
from rlhfkit.runtime.start import start_run
from rlhfkit.stages.episodes import Episode, Rollout, look_back, stack
from rlhfkit.stages.ppo import Targets, UpdateBatch, _explained_variance, _shape_scores, _targets, _update

PROMPT = [1]
GOOD, BAD = 6, 4
TOKENS, ROWS = 7, 8  # ids that are tokens, rows of the head
CPU = torch.device("cpu")


def make_policy(value: str | None = "shared", *, entropy_gradient: bool = False) -> PolicyModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return PolicyModel(LlamaForCausalLM(config), value, entropy_gradient=entropy_gradient)


def make_config(tmp_path: Path, *, lr: float = 0.01, batch_size: int = 64, **ppo: Any) -> PpoConfig:
    optim = {"lr": lr, "batch_size": batch_size, "max_grad_norm": 0.0, "micro_batch_tokens": ppo.pop("micro", 4096)}
    return PpoConfig(
        model=ModelConfig(path="toy", precision="fp32"),
        data=DataConfig(train=["toy"]),
        optim=PpoOptimConfig(**optim),
        run=RunConfig(out=str(tmp_path / "run"), trackers=["none"]),
        ppo=PpoBlock(**{"reward": ["toy"], "rollout_size": 4, "ppo_epochs": 1, **ppo}),
    )


def settings(temperature: float = 1.0, length: int = 1) -> SamplingSettings:
    return SamplingSettings(length, temperature, (), TOKENS)


def make_rollout(
    policy: PolicyModel, answers: Sequence[Sequence[int]], how: SamplingSettings, scores: Sequence[float] = ()
) -> Rollout:
    """Given answers, seen by the policy, which is its own reference here."""
    row = PromptRow(np.asarray(PROMPT, np.int32), PromptRecord("toy:1", (Message("user", "?"),)))
    episodes = [Episode(i, row, list(ids), True, text="") for i, ids in enumerate(answers)]
    for e, score in zip(episodes, scores, strict=False):
        e.score = score
    look_back(episodes, policy.eval(), policy, how, device=CPU, micro_batch_tokens=4096, autocast=None)
    return stack(episodes, CPU)


def next_token(policy: PolicyModel, temperature: float = 1.0) -> Tensor:
    """Probabilities of the toy's first answer token, through the model alone."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPT])).logits[0, -1, :TOKENS]
    return torch.softmax(logits / temperature, dim=-1)


def update_once(
    tmp_path: Path, policy: PolicyModel, rollout: Rollout, targets: Targets, how: SamplingSettings, **changes: Any
) -> dict[str, Any]:
    config = make_config(tmp_path, **changes)
    run = start_run(config)
    optimisation = Optimisation(run.accelerator, policy, config.optim, 100)
    return _update(rollout, targets, optimisation, config, run, how, step=1, kl_coef=0.0)


# -- directions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_rewarded_token_gains_and_the_other_loses(tmp_path: Path, advantage: str, temperature: float) -> None:
    policy = make_policy("shared" if advantage == "gae" else None)
    how = settings(temperature)
    rollout = make_rollout(policy, [[GOOD], [BAD], [GOOD], [BAD]], how)
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    before = next_token(policy, temperature)
    measured = update_once(
        tmp_path, policy, rollout, Targets(signs, torch.zeros(4, 1)), how,
        advantage=advantage, samples_per_prompt=2, temperature=temperature,
    )  # fmt: skip
    after = next_token(policy, temperature)
    assert after[GOOD] > before[GOOD] * 1.01
    assert after[BAD] < before[BAD] * 0.99
    # The first pass looks at the policy that sampled.
    assert measured["ratio_first"] == 1.0
    assert measured["clip_fraction"] == 0.0
    assert measured["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert measured["policy_loss"] == pytest.approx(0.0, abs=1e-6)  # as many good ones as bad ones


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_nothing_to_gain_moves_nothing(tmp_path: Path, advantage: str) -> None:
    policy = make_policy("shared" if advantage == "gae" else None)
    rollout = make_rollout(policy, [[GOOD], [BAD], [2], [0]], settings())
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    nothing = torch.zeros(4, 1)
    measured = update_once(
        tmp_path, policy, rollout, Targets(nothing, nothing), settings(),
        advantage=advantage, samples_per_prompt=2, ppo_epochs=3,
    )  # fmt: skip
    assert measured["grad_norm"] == 0.0
    assert measured["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_entropy_bonus_flattens_the_policy(tmp_path: Path) -> None:
    policy = make_policy(None, entropy_gradient=True)
    rollout = make_rollout(policy, [[GOOD], [BAD], [2], [0]], settings())
    before = torch.distributions.Categorical(next_token(policy)).entropy()
    zero = torch.zeros(4, 1)
    measured = update_once(
        tmp_path, policy, rollout, Targets(zero, zero), settings(),
        advantage="rloo", samples_per_prompt=2, entropy_coef=1.0,
    )  # fmt: skip
    assert measured["entropy"] == pytest.approx(float(before), rel=1e-5)
    assert torch.distributions.Categorical(next_token(policy)).entropy() > before


def test_the_value_head_learns_the_return(tmp_path: Path) -> None:
    policy = make_policy("shared")
    rollout = make_rollout(policy, [[GOOD], [BAD], [2], [0]], settings())
    targets = Targets(torch.zeros(4, 1), torch.full((4, 1), 3.0))
    measured = update_once(
        tmp_path, policy, rollout, targets, settings(), ppo_epochs=60, value_cliprange=0.0, value_coef=1.0, lr=0.03
    )
    assert rollout.values.tolist() == [[0.0]] * 4  # it starts by saying nothing
    assert measured["value_loss"] < 4.5
    after = make_rollout(policy, [[GOOD]], settings())
    assert after.values.tolist() == [[pytest.approx(3.0, abs=0.3)]]


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_a_bandit_is_solved(tmp_path: Path, advantage: str) -> None:
    """The whole loop but for text: sample, score, shape, aim, update. One arm pays; the policy must find it."""
    policy = make_policy("shared" if advantage == "gae" else None)
    config = make_config(
        tmp_path, lr=0.01, rollout_size=32, advantage=advantage, samples_per_prompt=4, ppo_epochs=2, kl_coef=0.0
    )
    run = start_run(config)
    optimisation = Optimisation(run.accelerator, policy, config.optim, 100)
    assert next_token(policy)[GOOD] < 0.1
    for step in range(1, 16):
        found = sample_answers(
            policy.model.eval(), [PROMPT] * 32, settings(), seeds=[(0, step, i) for i in range(32)], pad_id=0
        )
        rollout = make_rollout(policy, [a.ids for a in found], settings(), [float(a.ids == [GOOD]) for a in found])
        scores = _shape_scores(rollout, config, RunningMoments())
        targets = _targets(rollout, scores, 0.0, config)
        _update(rollout, targets, optimisation, config, run, settings(), step=step, kl_coef=0.0)
    assert float(next_token(policy)[GOOD]) > 0.8


# -- the update, piece by piece ----------------------------------------------------------------------------------------


class Recorder:
    """In place of `Optimisation`: takes no step, keeps what it was given and the last step's gradient."""

    def __init__(self, policy: PolicyModel) -> None:
        self.module = policy
        self.minibatches: list[list[UpdateBatch]] = []
        self.losses: list[float] = []
        self.passed_over = 0
        self.measured: dict[str, Any] = {}

    def step(
        self, micro_batches: Sequence[UpdateBatch], loss_of: Callable[[UpdateBatch], Tensor], spare: UpdateBatch
    ) -> StepResult:
        self.module.zero_grad()
        total = torch.stack([loss_of(m) for m in micro_batches]).sum()
        total.backward()
        self.minibatches.append(list(micro_batches))
        self.losses.append(total.item())
        return StepResult(total.item(), 0.0)

    def pass_over(self, steps: int) -> None:
        self.passed_over += steps


ANSWERS = [[GOOD, 2], [BAD], [4, 6, 0], [GOOD]]
LENGTHS = [len(a) for a in ANSWERS]


def record(
    tmp_path: Path, policy: PolicyModel, rollout: Rollout, targets: Targets, *, kl_coef: float = 0.0, **changes: Any
) -> Recorder:
    config = make_config(tmp_path, **changes)
    run = start_run(config)
    recorder: Any = Recorder(policy)
    how = settings(config.ppo.temperature)
    recorder.measured = _update(rollout, targets, recorder, config, run, how, step=1, kl_coef=kl_coef)
    assert isinstance(recorder, Recorder)
    return recorder


def random_targets(rollout: Rollout) -> Targets:
    generator = torch.Generator().manual_seed(3)
    return Targets(*(torch.randn(rollout.mask.shape, generator=generator) * rollout.mask for _ in range(2)))


def log_softmax_alone(policy: PolicyModel, answer: Sequence[int], temperature: float) -> Tensor:
    """[T, V] of one answer: no padding, all logits, with a gradient."""
    logits = policy.model(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1, :TOKENS]
    return torch.log_softmax(logits / temperature, dim=-1)


@pytest.mark.parametrize("micro", [1, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_gradient_is_the_policy_gradient(tmp_path: Path, micro: int, temperature: float) -> None:
    """d/dw of -sum of A log p over the tokens of the batch, and half of the squared value error beside it."""
    policy, twin = make_policy(), make_policy()
    for each in (policy, twin):  # a head of zeros would send no gradient into the trunk
        assert each.value_head is not None
        torch.nn.init.normal_(each.value_head.weight, generator=torch.Generator().manual_seed(1))
    rollout = make_rollout(policy, ANSWERS, settings(temperature, 3))
    targets = random_targets(rollout)
    record(tmp_path, policy, rollout, targets, micro=micro, temperature=temperature, value_coef=0.3)

    loss = torch.zeros(())
    for i, answer in enumerate(ANSWERS):
        scores = log_softmax_alone(twin, answer, temperature)
        chosen = scores[torch.arange(len(answer)), torch.tensor(answer)]
        hidden = twin.model.model(torch.tensor([[*PROMPT, *answer]])).last_hidden_state[0, len(PROMPT) - 1 : -1]
        assert twin.value_head is not None
        values = twin.value_head(hidden).squeeze(-1)
        n = len(answer)
        loss = loss - (targets.advantages[i, :n] * chosen).sum()
        loss = loss + 0.3 * 0.5 * (values - targets.returns[i, :n]).square().sum()
    (loss / sum(LENGTHS)).backward()
    expected = dict(twin.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tokens_beyond_the_clip_range_pull_no_more(tmp_path: Path, sign: float) -> None:
    """A policy that already moved by half: in the right direction it is left alone, in the wrong one pulled back."""
    policy = make_policy(None)
    rollout = make_rollout(policy, [[GOOD], [BAD], [GOOD], [BAD]], settings())
    moved = torch.tensor([[1.5], [0.5], [1.5], [0.5]])
    targets = Targets(sign * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.zeros(4, 1))
    found = record(
        tmp_path, policy, replace(rollout, logprobs=rollout.logprobs - moved.log()), targets,
        advantage="rloo", samples_per_prompt=2, ppo_epochs=2,
    )  # fmt: skip
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert any(g.any() for g in gradients) == (sign < 0)
    # Means over two passes. The first takes the policy for the one that sampled, and finds as much good as bad.
    assert found.measured["clip_fraction"] == (0.5 if sign > 0 else 0.0)
    assert found.measured["ratio_mean"] == pytest.approx(1.0)
    assert found.measured["ratio_first"] == 1.0
    # Policy loss by hand: -(1.2 - 0.8) / 2 where clipped, else (1.5 - 0.5) / 2.
    assert found.losses == pytest.approx([0.0, -0.2 if sign > 0 else 0.5], rel=1e-5, abs=1e-6)
    # KL of the sampling policy from the one now, by k3: the mean of r - 1 - log r.
    assert found.measured["approx_kl"] == pytest.approx(-0.5 * float(np.log(1.5 * 0.5)), rel=1e-5)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_rounding_of_another_pass_is_not_in_the_first_ratio(tmp_path: Path, minibatches: int) -> None:
    """Log-probabilities of the rollout that are off by as much as bf16's: the first step's ratio is 1 to the bit."""
    policy = make_policy(None)
    rollout = make_rollout(policy, ANSWERS, settings(length=3))
    noise = 0.05 * torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(4))
    rollout = replace(rollout, logprobs=(rollout.logprobs + noise) * rollout.mask)
    found = record(
        tmp_path, policy, rollout, random_targets(rollout),
        advantage="rloo", samples_per_prompt=2, minibatches=minibatches, micro=1,
    )  # fmt: skip
    assert found.measured["ratio_first"] == 1.0
    assert (found.measured["ratio_mean"] == 1.0) == (minibatches == 1)  # the next step goes by the rollout's numbers


def test_grpo_holds_the_policy_by_a_kl_in_the_loss(tmp_path: Path) -> None:
    policy, twin = make_policy(None), make_policy(None)
    rollout = make_rollout(policy, ANSWERS, settings(length=3))
    reference = rollout.ref_logprobs - 0.5 * rollout.mask  # a reference that finds every token less likely
    rollout = replace(rollout, ref_logprobs=reference)
    targets = random_targets(rollout)
    found = record(
        tmp_path, policy, rollout, targets,
        kl_coef=0.2, advantage="grpo", samples_per_prompt=2, kl_estimator="k3",
    )  # fmt: skip
    loss = torch.zeros(())
    for i, answer in enumerate(ANSWERS):
        chosen = log_softmax_alone(twin, answer, 1.0)[torch.arange(len(answer)), torch.tensor(answer)]
        ratio = (chosen - chosen.detach()).exp()
        apart = reference[i, : len(answer)] - chosen
        loss = loss - (targets.advantages[i, : len(answer)] * ratio).sum()
        loss = loss + 0.2 * (apart.exp() - 1 - apart).sum()
    loss = loss / sum(LENGTHS)
    loss.backward()
    assert found.losses == pytest.approx([loss.item()], rel=1e-4)
    expected = dict(twin.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("micro", [1, 8, 4096])
def test_every_pass_sees_every_episode_once_with_its_own_numbers(tmp_path: Path, micro: int) -> None:
    policy = make_policy()
    rollout = make_rollout(policy, ANSWERS, settings(length=3))
    # Each number says which episode, token and table it comes from.
    code = (torch.arange(4)[:, None] * 10.0 + torch.arange(3)) * rollout.mask
    rollout = replace(rollout, logprobs=code + 100, ref_logprobs=code + 200, values=code + 300)
    found = record(tmp_path, policy, rollout, Targets(code + 400, code + 500), ppo_epochs=3, minibatches=2, micro=micro)
    assert len(found.minibatches) == 6
    for start in range(0, 6, 2):
        seen = []
        for minibatch in found.minibatches[start : start + 2]:
            assert sum(len(m.tokens.tokens.layout.lengths) for m in minibatch) == 2
            for m in minibatch:
                assert torch.equal(m.ref_logprobs, m.old_logprobs + 100)
                assert torch.equal(m.old_values, m.old_logprobs + 200)
                assert torch.equal(m.advantages, m.old_logprobs + 300)
                assert torch.equal(m.returns, m.old_logprobs + 400)
                seen += list(zip((m.old_logprobs - 100).tolist(), m.tokens.targets.tolist(), strict=True))
        expected = [(10.0 * i + t, token) for i, answer in enumerate(ANSWERS) for t, token in enumerate(answer)]
        assert sorted(seen) == expected
    orders = [[m.old_logprobs.tolist() for b in found.minibatches[s : s + 2] for m in b] for s in range(0, 6, 2)]
    assert orders[0] != orders[1] or orders[1] != orders[2]  # shuffled anew for each pass


def test_each_minibatch_is_averaged_over_its_own_tokens(tmp_path: Path) -> None:
    policy = make_policy(None)
    rollout = make_rollout(policy, ANSWERS, settings(length=3))
    targets = random_targets(rollout)
    found = record(tmp_path, policy, rollout, targets, advantage="rloo", samples_per_prompt=2, minibatches=2, micro=1)
    for micro_batches, loss in zip(found.minibatches, found.losses, strict=True):
        advantages = torch.cat([m.advantages for m in micro_batches])  # at a ratio of 1 the loss is their mean
        assert loss == pytest.approx(-float(advantages.mean()), rel=1e-5)


@pytest.mark.parametrize(("size", "sizes"), [(3, [3, 1]), (2, [2, 2]), (5, [4])])
def test_the_last_minibatch_of_a_pass_takes_what_is_left(tmp_path: Path, size: int, sizes: list[int]) -> None:
    """Of the last rollout of a run, which may be smaller than the others."""
    policy = make_policy(None)
    rollout = make_rollout(policy, ANSWERS, settings(length=3))
    changes: dict[str, Any] = {"advantage": "rloo", "samples_per_prompt": 2, "rollout_size": 30, "batch_size": size}
    found = record(tmp_path, policy, rollout, random_targets(rollout), ppo_epochs=2, **changes)
    rows = [len(set(torch.cat([m.rows for m in minibatch]).tolist())) for minibatch in found.minibatches]
    assert rows == sizes * 2
    assert found.passed_over == 0


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_a_minibatch_of_empty_answers_is_no_step(tmp_path: Path, advantage: str) -> None:
    """One episode a minibatch: the figures are means over those that have tokens."""
    policy = make_policy("shared" if advantage == "gae" else None)
    rollout = make_rollout(policy, [[], [GOOD], [], [BAD, 2]], settings(length=2), [1.0, 2.0, 3.0, 5.0])
    changes: dict[str, Any] = {"advantage": advantage, "samples_per_prompt": 2, "batch_size": 1, "ppo_epochs": 3}
    targets = _targets(rollout, rollout.scores, 0.1, make_config(tmp_path, **changes))
    found = record(tmp_path, policy, rollout, targets, **changes)
    sizes = [sum(len(m.tokens.targets) for m in minibatch) for minibatch in found.minibatches]
    assert [sorted(sizes[i : i + 2]) for i in range(0, 6, 2)] == [[1, 2]] * 3
    assert found.passed_over == 6
    assert all(np.isfinite(value) for value in found.measured.values())
    assert found.measured["ratio_first"] == 1.0
    entropies = [
        -(log_p.exp() * log_p).sum(dim=-1).mean().item()
        for answer in ([GOOD], [BAD, 2])
        for log_p in [log_softmax_alone(policy, answer, 1.0)]
    ]
    assert found.measured["entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-4)


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_a_batch_of_only_empty_answers_moves_nothing(tmp_path: Path, advantage: str) -> None:
    policy = make_policy("shared" if advantage == "gae" else None)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    rollout = make_rollout(policy, [[]] * 4, settings(), [1.0, 2.0, 3.0, 5.0])
    changes: dict[str, Any] = {"advantage": advantage, "samples_per_prompt": 2, "early_stop_kl": 0.1}
    targets = _targets(rollout, rollout.scores, 0.1, make_config(tmp_path, **changes))
    measured = update_once(tmp_path, policy, rollout, targets, settings(), ppo_epochs=2, **changes)
    assert measured["loss"] == measured["grad_norm"] == measured["entropy"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert _explained_variance(rollout, targets) == 0.0


def test_passes_end_once_the_policy_moved_too_far(tmp_path: Path) -> None:
    policy = make_policy(None)
    rollout = make_rollout(policy, [[GOOD], [BAD], [GOOD], [BAD]], settings())
    targets = Targets(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.zeros(4, 1))
    changes: dict[str, Any] = {"advantage": "rloo", "samples_per_prompt": 2, "ppo_epochs": 10, "cliprange": 10.0}
    measured = update_once(tmp_path, policy, rollout, targets, settings(), early_stop_kl=0.02, lr=0.03, **changes)
    # The first pass sees no distance; one of the next sees too much, and is the last.
    assert 2 <= measured["ppo_epochs"] < 10
    assert measured["ratio_first"] == 1.0
    assert measured["ratio_mean"] != pytest.approx(1.0, abs=1e-3)
    again = make_policy(None)
    assert update_once(tmp_path, again, rollout, targets, settings(), lr=0.03, **changes)["ppo_epochs"] == 10


# -- from scores to targets --------------------------------------------------------------------------------------------


def scored(scores: Sequence[float], ended: Sequence[bool] = (True,) * 4) -> Rollout:
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(3)[None] < torch.tensor(LENGTHS)[:, None]
    logprobs, ref_logprobs, values = (torch.randn(4, 3, generator=generator) * mask for _ in range(3))
    return Rollout([], mask, logprobs, ref_logprobs, values, torch.tensor(scores), torch.tensor(ended))


def test_scores_are_normalised_then_clipped_then_fined(tmp_path: Path) -> None:
    config = make_config(tmp_path, reward_normalize=True, reward_clip=1.0, missing_eos_penalty=0.25)
    running = RunningMoments()
    found = _shape_scores(scored([0.0, 1.0, 2.0, 9.0], [True, False, True, False]), config, running)
    std = float(np.std([0.0, 1.0, 2.0, 9.0], ddof=1))
    assert found.tolist() == pytest.approx([0.0, 1.0 / std - 0.25, 2.0 / std, 1.0 - 0.25], rel=1e-5)
    # The next rollout is divided by the spread of all scores so far.
    found = _shape_scores(scored([1.0, 1.0, 1.0, 1.0]), config, running)
    std = float(np.std([0.0, 1.0, 2.0, 9.0, 1.0, 1.0, 1.0, 1.0], ddof=1))
    assert found.tolist() == pytest.approx([1.0 / std] * 4, rel=1e-5)


def test_scores_are_as_they_are_where_nothing_is_asked(tmp_path: Path) -> None:
    found = _shape_scores(scored([0.0, 1.0, 2.0, 9.0], [False] * 4), make_config(tmp_path), RunningMoments())
    assert found.tolist() == [0.0, 1.0, 2.0, 9.0]


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gae_targets(tmp_path: Path, whiten: bool, estimator: str) -> None:
    config = make_config(tmp_path, gamma=0.9, lam=0.8, kl_estimator=estimator, whiten_advantages=whiten)
    rollout = scored([1.0, -2.0, 0.5, 3.0])
    found = _targets(rollout, rollout.scores, 0.3, config)
    log_ratio = (rollout.ref_logprobs - rollout.logprobs).double()
    kl = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[estimator]
    rewards = -0.3 * kl * rollout.mask
    for i, n in enumerate(LENGTHS):
        rewards[i, n - 1] += rollout.scores[i]
    expected = gae(rewards, rollout.values.double(), rollout.mask, gamma=0.9, lam=0.8)
    torch.testing.assert_close(found.returns.double(), expected.returns, rtol=1e-4, atol=1e-5)
    kept = expected.advantages[rollout.mask]
    if whiten:
        kept = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(found.advantages[rollout.mask].double(), kept, rtol=1e-4, atol=1e-5)
    assert not found.advantages[~rollout.mask].any()


def test_rloo_targets_compare_scores_less_their_kl(tmp_path: Path) -> None:
    config = make_config(tmp_path, advantage="rloo", samples_per_prompt=2)
    rollout = scored([1.0, -2.0, 0.5, 3.0])
    found = _targets(rollout, rollout.scores, 0.3, config)
    kl = [float((rollout.logprobs - rollout.ref_logprobs)[i, :n].sum()) for i, n in enumerate(LENGTHS)]
    paid = [score - 0.3 * k for score, k in zip(rollout.scores.tolist(), kl, strict=True)]
    expected = [paid[0] - paid[1], paid[1] - paid[0], paid[2] - paid[3], paid[3] - paid[2]]
    for i, n in enumerate(LENGTHS):  # every token of an answer has the answer's advantage
        assert found.advantages[i, :n].tolist() == pytest.approx([expected[i]] * n, rel=1e-4)
        assert not found.advantages[i, n:].any()


def test_grpo_targets_know_no_kl(tmp_path: Path) -> None:
    config = make_config(tmp_path, advantage="grpo", samples_per_prompt=2)
    rollout = scored([1.0, 3.0, 5.0, 5.0])
    found = _targets(rollout, rollout.scores, 0.3, config)
    half = 2.0**-0.5
    for i, n in enumerate(LENGTHS):
        assert found.advantages[i, :n].tolist() == pytest.approx([[-half, half, 0.0, 0.0][i]] * n, rel=1e-3)
        assert not found.advantages[i, n:].any()


def test_explained_variance() -> None:
    rollout = scored([0.0] * 4)
    returns = torch.arange(12.0).view(4, 3)

    def explained(values: Tensor) -> float:
        return _explained_variance(replace(rollout, values=values), Targets(returns, returns))

    assert explained(returns + 7 * ~rollout.mask) == 1.0
    assert explained(returns + 2) == 1.0  # a constant error is no variance
    assert explained(torch.full((4, 3), 4.0)) == pytest.approx(0.0)
    assert explained(-returns) == pytest.approx(-3.0)
    assert explained(returns / 2) == pytest.approx(0.75)


# -- things that once went wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [1.0, 0.1])
def test_equal_scores_do_not_explode_when_normalised(tmp_path: Path, score: float) -> None:
    config = make_config(tmp_path, reward_normalize=True)
    found = _shape_scores(scored([score] * 4), config, RunningMoments())
    assert found.abs().max() < 100  # it is 1e8 * score


def with_dropout(kind: str) -> PolicyModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attention_dropout=0.5 if kind == "attention" else 0.0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    if kind == "lora":
        model = get_peft_model(
            model, LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    return PolicyModel(model, None)


@pytest.mark.parametrize("kind", ["attention", "lora"])
def test_dropout_is_off_in_the_update(tmp_path: Path, kind: str) -> None:
    policy = with_dropout(kind)
    rollout = make_rollout(policy, ANSWERS, settings(length=3))
    measured = update_once(
        tmp_path, policy, rollout, random_targets(rollout), settings(), advantage="rloo", samples_per_prompt=2
    )
    assert measured["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert measured["ratio_first"] == pytest.approx(1.0, abs=1e-5)


def test_the_kl_weight_stays_positive(tmp_path: Path) -> None:
    problems = dict(make_config(tmp_path, kl_target=1.0, kl_horizon=1.0).problems())
    assert "is less than ppo.rollout_size" in problems["ppo.kl_horizon"]


def test_no_targets_give_the_head_a_gradient_too() -> None:
    head = nn.Linear(4, 7)
    hidden = torch.zeros(0, 4, requires_grad=True)
    token_logprobs(head, hidden, torch.zeros(0, dtype=torch.long)).logprobs.sum().backward()
    assert head.weight.grad is not None


def test_nothing_is_kept_where_only_the_head_trains() -> None:
    head = nn.Linear(8, 5000, bias=False)
    hidden, targets = torch.randn(400, 8), torch.randint(0, 5000, (400,))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        token_logprobs(head, hidden, targets, chunk_tokens=16)
    assert sum(sizes) < 16 * 5000 * 2


@pytest.mark.parametrize("kind", [None, "k2", "k3"])
def test_the_kl_in_the_loss_of_grpo_holds_the_policy(tmp_path: Path, kind: str | None) -> None:
    """Every token once, weighed by how often it is sampled; no advantage, so that the KL is all there is."""
    policy = make_policy(None)
    p = next_token(policy)
    counts = (p * 400).round().long().tolist()
    answers = [[t] for t, n in enumerate(counts) for _ in range(n)]
    answers = answers[: len(answers) // 2 * 2]
    rollout = make_rollout(policy, answers, settings())
    shift = torch.linspace(-2, 2, TOKENS)
    q = torch.log_softmax(p.log() + shift, dim=-1)
    rollout = replace(rollout, ref_logprobs=q[torch.tensor(answers)])
    zero = torch.zeros(len(answers), 1)
    changes = {} if kind is None else {"kl_estimator": kind}
    record(
        tmp_path, policy, rollout, Targets(zero, zero), kl_coef=1.0, advantage="grpo", samples_per_prompt=2,
        rollout_size=len(answers), batch_size=len(answers), **changes,
    )  # fmt: skip
    norm = torch.stack([g.grad.norm() for g in policy.parameters() if g.grad is not None]).norm()
    assert norm > 0.3, norm  # of k1 only the rounding of the counts would be left
