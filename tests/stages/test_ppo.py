"""PPO end to end on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig
from rlhfkit.errors import Interrupted, RewardError
from rlhfkit.stages import ppo, reward

REWARD = """
def length(prompts, responses, n, **columns):
    assert len(prompts) == len(responses) == len(n)
    return [float(len(r)) / 10 for r in responses]

def short(prompts, responses):
    return [0.0]

def broken(prompts, responses):
    raise KeyError("no such thing")

def nan(prompts, responses):
    return [float("nan")] * len(responses)
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARD)
    return path


@pytest.fixture
def flags(settings, prompts_file, rewards):
    def make(out, **changes):
        defaults = {
            "data__train": [str(prompts_file)],
            "ppo__reward": [f"{rewards}:length"],
            "ppo__max_new_tokens": 8,
            "ppo__rollout_size": 8,
            "ppo__ppo_epochs": 2,
            "optim__epochs": 3,
        }
        return settings(out, **{**defaults, **changes})

    return make


def train(flags, *sets):
    return ppo.run(load_config(PpoConfig, flags=flags, sets=sets))


KEYS = {
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_total", "seconds", "tokens_per_second", "peak_memory_gib",
    "episodes", "reward_mean", "reward_std", "kl", "kl_coef", "entropy", "policy_loss", "value_loss", "clip_fraction",
    "value_explained_variance", "response_tokens", "eos_rate", "ratio_mean", "seconds_rollout", "seconds_score",
    "seconds_update",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora__rank": 4},
        {"ppo__value_model": "separate"},
        {"ppo__advantage": "rloo", "ppo__samples_per_prompt": 2},
        {"ppo__advantage": "grpo", "ppo__samples_per_prompt": 2, "ppo__kl_estimator": "k3"},
        {
            "ppo__kl_target": 1.0,
            "ppo__reward_normalize": True,
            "ppo__reward_clip": 2.0,
            "ppo__missing_eos_penalty": 1.0,
        },
        {"ppo__entropy_coef": 0.01, "ppo__temperature": 0.7},
    ],
    ids=lambda c: "-".join(f"{k.split('__')[1]}" for k in c) or "plain",
)
def test_runs_and_records(flags, changes):
    result = train(flags("run", **changes))
    rows = read_metrics(result.out)
    assert all(set(row) >= KEYS for row in rows[:-1])
    first = rows[0]
    # Before any update policy and reference are the same model, and the scorer sees what the sampler drew from.
    assert first["kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert rows[-1]["event"] == "end"


def test_reward_rises(flags):
    """Longer answers are better: the policy must find out. Same seed, same numbers."""
    changes = {"optim__epochs": 20, "optim__lr": 3e-3, "ppo__kl_coef": 0.0, "ppo__rollout_size": 8}
    rows = read_metrics(train(flags("run", **changes)).out)
    assert rows[-2]["reward_mean"] > rows[0]["reward_mean"] + 2 * rows[0]["reward_std"] / 8**0.5
    again = read_metrics(train(flags("again", **changes)).out)
    assert [r["reward_mean"] for r in rows[:-1]] == [r["reward_mean"] for r in again[:-1]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("changes", [{}, {"lora__rank": 4}], ids=["full", "lora"])
def test_resume_equals_unbroken_bit_for_bit(flags, changes):
    changes = {**changes, "ppo__kl_target": 1.0, "ppo__reward_normalize": True, "optim__epochs": 4}
    unbroken = train(flags("unbroken", **changes))
    broken = flags("broken", **changes)

    def stop_after_two(self, record):
        self.interrupted = record["step"] == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run._refuse_non_finite", stop_after_two)
        with pytest.raises(Interrupted):
            train(broken)
    torch.rand(3)
    resumed = train({**broken, "run.resume": True})
    for part in ("final", "value"):
        a, b = weights(unbroken.out / part), weights(resumed.out / part)
        assert set(a) == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
    old, new = read_metrics(unbroken.out), read_metrics(resumed.out)
    same = ("step", "loss", "reward_mean", "kl", "kl_coef")
    assert [[r.get(k) for k in same] for r in old[:-1]] == [[r.get(k) for k in same] for r in new[:-1]]


def test_micro_batches_do_not_change_the_update(flags):
    a = read_metrics(train(flags("a", optim__micro_batch_tokens=10**6), "optim.max_steps=1").out)
    b = read_metrics(train(flags("b", optim__micro_batch_tokens=1), "optim.max_steps=1").out)
    for name in ("loss", "grad_norm", "policy_loss", "value_loss", "reward_mean"):
        assert a[0][name] == pytest.approx(b[0][name], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("short", "returned 1 numbers for 8 answers"),
        ("broken", "raised KeyError: 'no such thing'"),
        ("nan", "returned nan for answer 0 of 8"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_faulty_reward_is_named(flags, rewards, function, words):
    with pytest.raises(RewardError, match=words):
        train(flags("run", ppo__reward=[f"{rewards}:{function}"]))


def test_reward_model_as_reward_with_weights(flags, settings, pairs_file, rewards):
    rm = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)], optim__epochs=2)))
    mixed = [f"{rm.final}=0.5", f"{rewards}:length=2"]
    rows = read_metrics(train(flags("run", ppo__reward=mixed, ppo__value_model="separate")).out)
    first = rows[0]
    assert first["reward_mean"] == pytest.approx(
        0.5 * first["reward/final"] + 2 * first["reward/rewards.py:length"], abs=1e-5
    )


def test_policy_from_an_sft_adapter_keeps_it_as_reference(flags, settings, sft_file):
    from rlhfkit.config.stages import SftConfig
    from rlhfkit.stages import sft

    tuned = sft.run(load_config(SftConfig, flags=settings("sft", data__train=[str(sft_file)], lora__rank=4)))
    result = train(flags("run", model__path=str(tuned.final), lora__rank=4))
    rows = read_metrics(result.out)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-2]["kl"] != 0.0
