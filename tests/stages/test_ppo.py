"""PPO end to end on a tiny model."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig
from rlhfkit.errors import ConfigError, Interrupted
from rlhfkit.models.attention import takes_packed
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.reward_sources import WeightedReward
from rlhfkit.models.sampling import Answer
from rlhfkit.models.wrappers import PolicyModel
from rlhfkit.stages import episodes, plan, ppo, ppo_models, reward


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
    assert first["ratio_first"] == 1.0
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora__rank": 4},
        {"ppo__value_model": "separate"},
        {"ppo__early_stop_kl": 1e-5, "ppo__ppo_epochs": 3, "ppo__episodes": 29},
        {"ppo__reward": "noisy"},
    ],
    ids=["full", "lora", "separate", "early", "noisy"],
)
def test_resume_equals_unbroken_bit_for_bit(flags, rewards, changes):
    """A reward that draws random numbers goes on with those that would have come next, whatever was drawn meanwhile."""
    if "ppo__reward" in changes:
        changes = {"ppo__reward": [f"{rewards}:noisy"]}
    changes = {**changes, "ppo__kl_target": 1.0, "ppo__reward_normalize": True}
    changes |= {} if "ppo__episodes" in changes else {"optim__epochs": 4}
    unbroken = train(flags("unbroken", **changes))
    broken = flags("broken", **changes)

    def stop_after_two(self, record):
        self.interrupted = record["step"] == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run._refuse_non_finite", stop_after_two)
        with pytest.raises(Interrupted):
            train(broken)
    torch.rand(3)
    random.random()
    np.random.rand()
    resumed = train({**broken, "run.resume": True})
    for part in ("final", "value"):
        a, b = weights(unbroken.out / part), weights(resumed.out / part)
        assert set(a) == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
    old, new = read_metrics(unbroken.out), read_metrics(resumed.out)
    same = ("step", "loss", "reward_mean", "kl", "kl_coef", "lr", "episodes", "ppo_epochs")
    assert [[r.get(k) for k in same] for r in old[:-1]] == [[r.get(k) for k in same] for r in new[:-1]]


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_an_early_stop_leaves_the_course_of_the_learning_rate(flags, scheduler):
    """Steps that were not taken are passed over: the learning rate of a rollout depends on its number alone."""
    changes = {"ppo__ppo_epochs": 4, "optim__epochs": 4, "optim__scheduler": scheduler, "optim__lr": 3e-3}
    whole, early = (
        read_metrics(train(flags(f"run-{kl}", ppo__early_stop_kl=kl, **changes)).out)[:-1] for kl in (0, 1e-5)
    )
    assert [row["ppo_epochs"] for row in whole] == [4] * 4
    assert max(row["ppo_epochs"] for row in early) < 4
    assert [row["lr"] for row in early] == [row["lr"] for row in whole]
    assert whole[-1]["lr"] < 0.5 * whole[0]["lr"]


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"ppo__episodes": 5, "ppo__rollout_size": 4}, [4, 1]),
        ({"ppo__episodes": 6}, [6]),
        ({"optim__epochs": 1.5, "ppo__rollout_size": 5, "optim__batch_size": 5}, [5, 5, 2]),
        ({"ppo__episodes": 10, "ppo__rollout_size": 8, "ppo__samples_per_prompt": 2, "ppo__advantage": "rloo"}, [8, 2]),
        ({"ppo__episodes": 24, "optim__max_steps": 2}, [8, 8]),
        ({"optim__epochs": 0.01}, [1]),
    ],
)
def test_as_many_episodes_are_sampled_as_were_asked_for(flags, prompts_file, changes, sizes, capfd):
    """The last rollout takes what is left, and its prompts are those that would come next."""
    given = flags("run", **changes)
    rollouts = []
    real = ppo.sample_episodes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "sample_episodes", lambda *a, **how: rollouts.append(real(*a, **how)) or rollouts[-1])
        rows = read_metrics(train(given).out)[:-1]
    assert [len(found) for found in rollouts] == sizes
    assert [row["episodes"] for row in rows] == list(itertools.accumulate(sizes))
    assert all(math.isfinite(row["loss"]) for row in rows)
    asked = [e.prompt.record.where for found in rollouts for e in found][:: given.get("ppo.samples_per_prompt", 1)]
    assert len(set(asked[:8])) == len(asked[:8])  # an epoch of them
    plan.run(load_config(PpoConfig, flags={**given, "run.out": given["run.out"] + "-plan"}))
    last = f", the last of {sizes[-1]}" if sizes[-1] < sizes[0] else ""
    assert f"{len(sizes)} steps of {sizes[0]} episodes{last}, each with 2 passes of " in capfd.readouterr().out


def test_episodes_that_do_not_divide_into_samples_are_refused(flags):
    with pytest.raises(ConfigError, match=r"ppo\.episodes: 5 episodes do not divide into 2 samples per prompt"):
        train(flags("run", ppo__episodes=5, ppo__samples_per_prompt=2))


@pytest.mark.parametrize("packing", [True, False])
def test_packing_and_kernels_are_those_of_all_models(flags, settings, pairs_file, monkeypatch, packing):
    judge = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)]))).final
    seen = []

    def look(loaded: LoadedModel, policy: PolicyModel, rewards: WeightedReward) -> str:
        models = [loaded.model, policy.value_trunk, *(s.loaded.model for _, s in ppo_models.reward_models(rewards))]
        seen.extend((takes_packed(model), _patched(model)) for model in models)
        return ""

    monkeypatch.setattr(ppo, "held", look)
    changes = {"ppo__value_model": "separate", "ppo__reward": [str(judge)], "optim__packing": packing}
    changes["optim__kernels"] = "fused" if packing else "plain"
    train(flags("run", **changes, optim__max_steps=1))
    assert seen == [(packing, packing)] * 3


def _patched(model: torch.nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules())


def test_a_value_model_of_its_own_is_saved_whole(flags):
    """Every weight of it, as the last checkpoint holds it, and nothing of the policy."""
    result = train(flags("run", ppo__value_model="separate"))
    values, policy = weights(result.out / "value"), weights(result.final)
    trained = load_file(result.out / "checkpoints/step-3/trained-0.safetensors")
    assert set(values) == {name for name in trained if name.startswith("value_")}
    assert all(torch.equal(values[name], trained[name]) for name in values)
    # The policy's trunk, and a head.
    trunk = {name.removeprefix("model.") for name in policy if name != "lm_head.weight"}
    assert set(values) == {f"value_trunk.{name}" for name in trunk} | {"value_head.weight", "value_head.bias"}
    assert not torch.equal(values["value_trunk.norm.weight"], policy["model.norm.weight"])


def test_micro_batches_do_not_change_the_update(flags):
    a = read_metrics(train(flags("a", optim__micro_batch_tokens=10**6), "optim.max_steps=1").out)
    b = read_metrics(train(flags("b", optim__micro_batch_tokens=1), "optim.max_steps=1").out)
    for name in ("loss", "grad_norm", "policy_loss", "value_loss", "reward_mean"):
        assert a[0][name] == pytest.approx(b[0][name], rel=1e-3, abs=1e-4)


GROUPS = {"ppo__samples_per_prompt": 2}


@pytest.mark.parametrize(
    ("key", "values", "more"),
    [
        ("ppo__kl_coef", (0.0, 5.0), {}),
        ("ppo__kl_coef", (0.0, 5.0), {**GROUPS, "ppo__advantage": "rloo"}),
        ("ppo__kl_coef", (0.0, 5.0), {**GROUPS, "ppo__advantage": "grpo"}),
        ("ppo__cliprange", (0.2, 1e-4), {}),
        ("ppo__value_cliprange", (0.2, 1e-5), {}),
        ("ppo__entropy_coef", (0.01, 1.0), {}),
        ("ppo__gamma", (1.0, 0.5), {}),
        ("ppo__lam", (0.95, 0.1), {}),
    ],
)
def test_every_weight_and_bound_reaches_the_update(flags, key, values, more):
    changes = {"ppo__ppo_epochs": 3, "optim__max_steps": 2, "optim__lr": 3e-3, **more}
    runs = [read_metrics(train(flags(f"run-{i}", **changes, **{key: value})).out) for i, value in enumerate(values)]
    losses = [[row["loss"] for row in rows[:2]] for rows in runs]
    assert losses[0] != losses[1]


def test_the_scored_distribution_is_the_sampled_one(flags):
    """One pass over a rollout has nothing to move: what the update finds is what looking back found."""
    changes = {"ppo__temperature": 0.7, "ppo__ppo_epochs": 1, "optim__batch_size": 8, "optim__max_steps": 1}
    assert read_metrics(train(flags("run", **changes)).out)[0]["approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_the_kl_weight_follows_its_controller(flags):
    changes = {"ppo__kl_target": 0.01, "ppo__kl_horizon": 20, "ppo__ppo_epochs": 3, "optim__lr": 3e-3}
    rows = read_metrics(train(flags("run", **changes)).out)[:-1]
    for before, after in itertools.pairwise(rows):
        error = min(max(before["kl"] / 0.01 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 8 / 20))
    assert rows[-1]["kl_coef"] > rows[-2]["kl_coef"]


def test_each_step_draws_anew(flags, tmp_path):
    """One prompt in all rows, and a policy that stays where it is."""
    prompts = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a film?", "n": i} for i in range(8)])
    rows = read_metrics(train(flags("run", data__train=[str(prompts)], optim__lr=1e-12)).out)[:-1]
    assert len({row["reward_mean"] for row in rows}) == len(rows) > 1


def test_policy_from_an_sft_adapter_keeps_it_as_reference(flags, settings, sft_file):
    from rlhfkit.config.stages import SftConfig
    from rlhfkit.stages import sft

    tuned = sft.run(load_config(SftConfig, flags=settings("sft", data__train=[str(sft_file)], lora__rank=4)))
    result = train(flags("run", model__path=str(tuned.final), lora__rank=4))
    rows = read_metrics(result.out)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-2]["kl"] != 0.0


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_gae_no_value_function_is_loaded(flags, monkeypatch, capfd, advantage):
    built = []
    monkeypatch.setattr(
        PolicyModel, "__init__", lambda self, model, value, real=PolicyModel.__init__, **how: (
            built.append(value), real(self, model, value, **how)
        )[0],
    )  # fmt: skip
    result = train(flags("run", ppo__advantage=advantage, ppo__samples_per_prompt=2, optim__epochs=1))
    assert set(built) == {None}
    assert "value function:" not in capfd.readouterr().err
    assert not (result.out / "value").exists()
    assert all(row["value_explained_variance"] is None for row in read_metrics(result.out))


# -- where answers end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"], ids=["pad", "pad-is-eos"])
@pytest.mark.parametrize("shape", ["one", "full", "ended"])
def test_the_score_is_paid_at_the_last_real_token(flags, tmp_path, monkeypatch, pad, shape):
    """An answer of one token, one cut at the limit, and those that end by themselves, the end being the pad or not."""
    folder = make_model(tmp_path / "model")
    tokenizer = make_tokenizer(pad_token=pad)
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    found = []
    real = ppo._targets
    monkeypatch.setattr(
        ppo, "_targets", lambda rollout, scores, *rest: found.append((rollout, scores, real(rollout, scores, *rest)))
        or found[-1][-1],
    )  # fmt: skip
    if shape == "ended":  # as likely as not at each token
        monkeypatch.setattr(
            "rlhfkit.models.sampling.draw",
            lambda logits, uniforms, how: torch.where(uniforms < 0.4, end, logits.argmax(dim=-1)),
        )
    changes = {"ppo__max_new_tokens": 1 if shape == "one" else 6, "ppo__lam": 1.0, "ppo__kl_coef": 0.0}
    train(
        flags("run", model__path=str(folder), **changes, ppo__missing_eos_penalty=5.0),
        "ppo.whiten_advantages=false", "optim.max_steps=1",
    )  # fmt: skip
    rollout, scores, targets = found[0]
    lengths = [len(e.response) for e in rollout.episodes]
    assert set(lengths) == ({1} if shape == "one" else {6} if shape == "full" else set(lengths))
    assert shape != "ended" or len(set(lengths)) > 2
    for i, e in enumerate(rollout.episodes):
        assert e.ended == (e.response[-1] == end)
        assert end not in e.response[:-1]
        assert float(scores[i]) == pytest.approx(e.score - 5.0 * (not e.ended), abs=1e-5)
        # At lambda 1 and without KL, the return of each token is the score; the values are 0 so far.
        expected = [float(scores[i])] * lengths[i] + [0.0] * (rollout.mask.shape[1] - lengths[i])
        assert targets.returns[i].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kinds", [{0}, {0, 3}], ids=["all", "some"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"ppo__value_model": "separate"}, {"ppo__advantage": "grpo", "ppo__samples_per_prompt": 2}],
    ids=["shared", "separate", "grpo"],
)
def test_empty_answers_are_answers(flags, monkeypatch, kinds, changes):
    """Nothing is learned from them, and nothing breaks; minibatches of one episode are wholly empty or not at all."""
    real = episodes.sample_answers

    def some(*given, **how):
        answers = real(*given, **how)
        return [Answer(a.ids[: i % 2 * max(kinds)], ended=True) for i, a in enumerate(answers)]

    monkeypatch.setattr(episodes, "sample_answers", some)
    rows = read_metrics(train(flags("run", optim__batch_size=1, optim__max_steps=2, **changes)).out)[:-1]
    assert [row["response_tokens"] for row in rows] == [max(kinds) / 2] * 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["kl"]) for row in rows)
    assert (rows[0]["grad_norm"] > 0) == (max(kinds) > 0)
