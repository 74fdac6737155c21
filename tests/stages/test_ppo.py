"""PPO end to end on a tiny model."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, read_metrics, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig
from rlhfkit.errors import ConfigError, Interrupted, NonFiniteError, RewardError
from rlhfkit.models.attention import takes_packed
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.reward_sources import FunctionReward, WeightedReward
from rlhfkit.models.sampling import Answer
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.models.wrappers import PolicyModel
from rlhfkit.runtime import checkpoint
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import Run
from rlhfkit.stages import episodes, plan, ppo, ppo_models, reward

REWARD = """
import random
from pathlib import Path

import numpy
import torch

def length(prompts, responses, n, **columns):
    assert len(prompts) == len(responses) == len(n)
    return [float(len(r)) / 10 for r in responses]

def short(prompts, responses):
    return [0.0]

def broken(prompts, responses):
    raise KeyError("no such thing")

def words(prompts, responses):
    return "12345678"

def large(prompts, responses):
    return [10**400] * len(responses)

def wide(prompts, responses):
    return [1.0] * (len(responses) - 1) + [3.5e38]

def half(prompts, responses):
    return [2e38] * len(responses)

def other_half(prompts, responses):
    return [1.0] * (len(responses) - 1) + [2e38]

def lazy(prompts, responses):
    return (1 / (len(r) - len(r)) for r in responses)

def leaves(prompts, responses):
    raise SystemExit(3)

def colour(prompts, responses, colour):
    return [0.0] * len(responses)

def questions(questions, answers):
    return [0.0] * len(answers)

CONSTANT = 3

def noisy(prompts, responses):
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in responses]

def nan(prompts, responses):
    return [float("nan")] * len(responses)

calls = 0

def late(prompts, responses, n):
    global calls
    calls += 1
    # Finite as a score, infinite once squared.
    bad = calls == 2 and not Path(__file__).with_name("mended").exists()
    return [1e30 if bad and i == 5 else 0.1 * len(r) for i, r in zip(n, responses)]
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
            **({} if "ppo__episodes" in changes else {"optim__epochs": 3}),
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
def test_packing_is_on_or_off_in_all_models(flags, settings, pairs_file, monkeypatch, packing):
    judge = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)]))).final
    seen = []

    def look(loaded: LoadedModel, policy: PolicyModel, rewards: WeightedReward) -> str:
        models = [loaded.model, policy.value_trunk, *(s.loaded.model for _, s in ppo_models.reward_models(rewards))]
        seen.extend(takes_packed(model) for model in models)
        return ""

    monkeypatch.setattr(ppo, "held", look)
    changes = {"ppo__value_model": "separate", "ppo__reward": [str(judge)], "optim__packing": packing}
    train(flags("run", **changes, optim__max_steps=1))
    assert seen == [packing] * 3


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


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("short", r"step 1 of 3: the reward \S+/rewards.py:short returned 1 numbers for 8 answers"),
        ("broken", r"raised KeyError: 'no such thing'\n  \S+/rewards.py, line 16, in broken: raise KeyError"),
        ("nan", r"returned nan for answer 1 of 8, to the prompt of \S+prompts.jsonl:\d"),
        ("words", "returned str, not a list of numbers"),
        ("large", r"returned 10{400} for answer 1 of 8(.|\n)*float32, whose largest is 3.4e\+38"),
        (
            "wide",
            r"step 1 of 3: .*returned 3.5e\+38 for answer 8 of 8, to the prompt of \S+:\d\n.*float32, whose largest",
        ),
        ("lazy", "raised ZeroDivisionError while its numbers were read: division by zero"),
        ("leaves", "raised SystemExit: 3"),
        ("colour", "needs the column colour, which the rows do not have\n  → their other fields: n;"),
        ("questions", r"takes \(questions, answers\), and is called with prompts and responses by name"),
        ("absent", "has no function 'absent'\n  → it has: length, short"),
        ("CONSTANT", "'CONSTANT' in .* is a int, not a function"),
    ],
)
def test_a_faulty_reward_is_named(flags, rewards, function, words):
    with pytest.raises(RewardError, match=words):
        train(flags("run", ppo__reward=[f"{rewards}:{function}"]))


def test_two_finite_rewards_whose_sum_is_none_are_named(flags, rewards, prompts_file):
    """2e38 + 2e38 is finite in a Python float, and infinite as the float32 that the update computes in."""
    pair = [f"{rewards}:half", f"{rewards}:other_half"]
    with pytest.raises(RewardError) as error:
        train(flags("run", ppo__reward=pair, run__save_every=1))
    assert re.fullmatch(
        r"step 1 of 3: the weighted sum of the rewards is 4e\+38 for answer 8 of 8, to the prompt of "
        + re.escape(str(prompts_file))
        + r":\d: 1 x 2e\+38 \(rewards.py:half\) \+ 1 x 2e\+38 \(rewards.py:other_half\)",
        error.value.message,
    )
    assert "float32, whose largest is 3.4e+38; there is no checkpoint yet" in error.value.hint
    # Weighed down they are as good as any.
    train(flags("run", ppo__reward=[f"{each}=1e-38" for each in pair], optim__max_steps=1))


def test_a_file_that_does_not_run_is_named(flags, tmp_path):
    (tmp_path / "a.py").write_text("\nimport absent_neighbour\ndef f(prompts, responses): ...\n")
    with pytest.raises(RewardError, match=r"a.py:2: running the file raised ModuleNotFound.*\n.*PYTHONPATH="):
        train(flags("run", ppo__reward=[f"{tmp_path}/a.py:f"]))
    (tmp_path / "b.py").write_text("def f(prompts, responses):\n  return [\n")
    with pytest.raises(RewardError, match=r"b.py:2: this is no Python"):
        train(flags("run", ppo__reward=[f"{tmp_path}/b.py:f"]))


def test_a_reward_file_is_ordinary_python(tmp_path):
    """Annotations are values, as in a file that asks for nothing else, and names may come in by a star."""
    path = tmp_path / "r.py"
    path.write_text("from math import *\ndef f(prompts: list, responses: list) -> list:\n    return [floor(1.5)]\n")
    assert FunctionReward(f"{path}:f").function.__annotations__["return"] is list
    with pytest.raises(RewardError, match="takes"):
        FunctionReward(f"{path}:floor")
    with pytest.raises(RewardError, match=r"'absent' in .* is a NoneType, not a function"):
        FunctionReward(f"{path}:absent")


def test_the_file_of_a_reward_runs_once_and_nothing_else_of_it_does(flags, tmp_path):
    path = tmp_path / "rewards.py"
    log = tmp_path / "log"
    path.write_text(
        f"open({str(log)!r}, 'a').write('file ')\n"
        "def f(prompts, responses):\n    return [0.0] * len(responses)\n"
        f"def other(prompts, responses):\n    open({str(log)!r}, 'a').write('other ')\n"
        f"if __name__ == '__main__':\n    other([], [])\n"
    )
    plan.run(load_config(PpoConfig, flags=flags("run", ppo__reward=[f"{path}:f"])))
    assert not log.exists()
    train(flags("run", ppo__reward=[f"{path}:f"], optim__max_steps=1))
    assert log.read_text() == "file "


EVALUATED = ("event", "step", "loss", "eval_reward_mean", "eval_kl")
GOOD = "def f(prompts, responses, n):\n    return [float(len(r)) / 10 for r in responses]\n"


DRAWS = GOOD.replace("    return [", "    import random\n    noise = random.random()\n    return [noise + ")


def goes_on_once_mended(
    flags, path: Path, call: int, words: str, good: str = GOOD, **settings: Any
) -> list[list[dict[str, Any]]]:
    """A run whose reward fails at one call, and goes on with it mended: its policy is that of the run that never met
    the fault. Returns the metrics of both.
    """
    settings["ppo__reward"] = [f"{path}:f"]
    path.write_text(
        "calls = []\n" + good.replace("    ret", f"    calls.append(1)\n    1 / ({call} - len(calls))\n    ret")
    )
    with pytest.raises(RewardError, match=words):
        train(flags("run", **settings))
    path.write_text(good)
    resumed, unbroken = train(flags("run", **settings, run__resume=True)), train(flags("other", **settings))
    one, other = (load_file(run.final / "model.safetensors") for run in (resumed, unbroken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    return [read_metrics(run.out) for run in (resumed, unbroken)]


@pytest.mark.parametrize("save_every", [0, 1])  # at 1 the step that is saved at the fault has been saved before
def test_a_run_goes_on_after_its_reward_was_mended(flags, tmp_path, save_every):
    """What was done before the fault is saved."""
    words = f"step 3 of 3: .*ZeroDivisionError(.|\n)*last good checkpoint is {tmp_path}/run/checkpoints/step-2"
    settings = {"ppo__reward_normalize": True, "ppo__kl_target": 1.0, "run__save_every": save_every}
    resumed, unbroken = goes_on_once_mended(flags, tmp_path / "rewards.py", 3, words, **settings)
    assert len(resumed) == len(unbroken)


def test_a_step_that_is_saved_is_not_saved_again(flags, tmp_path, monkeypatch):
    """Its folder would have to be deleted first, and a process that ends there would leave none."""
    saved = []
    save = checkpoint._save_state
    monkeypatch.setattr(checkpoint, "_save_state", lambda *given: saved.append(given[1].name) or save(*given))
    path = tmp_path / "rewards.py"
    path.write_text(
        "calls = []\n" + GOOD.replace("    return", "    calls.append(1)\n    1 / (3 - len(calls))\n    return")
    )
    with pytest.raises(RewardError):
        train(flags("run", ppo__reward=[f"{path}:f"], run__save_every=1))
    assert len(saved) == len(set(saved)) == 2


def test_a_fault_in_an_evaluation_loses_no_step(flags, tmp_path, prompts_file):
    """The reward is asked before step 1, in steps 1 and 2, and in the evaluation after step 2."""
    words = r"ZeroDivisionError(.|\n)*last good checkpoint is .*step-2"
    settings = {"data__eval": [str(prompts_file)], "run__eval_every": 2}
    for rows in goes_on_once_mended(flags, tmp_path / "rewards.py", 4, words, **settings):
        assert [row["step"] for row in rows if "event" not in row] == [1, 2, 3]


@pytest.mark.parametrize("call", [3, 4])  # in step 2, and in the evaluation after it
def test_a_reward_draws_again_what_it_drew_before_it_failed(flags, tmp_path, prompts_file, call):
    settings = {"data__eval": [str(prompts_file)], "run__eval_every": 2}
    goes_on_once_mended(flags, tmp_path / "rewards.py", call, "ZeroDivisionError", DRAWS, **settings)


@pytest.mark.parametrize("call", [3, 5])
def test_an_evaluation_that_failed_is_made_up_for(flags, tmp_path, prompts_file, call):
    """After step 1, where further steps follow, and the last one, after step 3: the run's end must not report the
    model that nobody had trained."""
    words = r"ZeroDivisionError(.|\n)*last good checkpoint is .*step-" + str(call - 2)
    settings = {"data__eval": [str(prompts_file)], "run__eval_every": call - 2}
    both = goes_on_once_mended(flags, tmp_path / "rewards.py", call, words, **settings)
    measured = [[{k: v for k, v in row.items() if k in EVALUATED} for row in rows] for rows in both]
    assert measured[0] == measured[1]
    assert [row["step"] for row in both[0]] == [row["step"] for row in both[1]]
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "other")]
    assert samples[0] == samples[1]
    last = json.loads((tmp_path / "run" / "checkpoints" / "step-3" / "state.json").read_text())
    assert last["evaluation_due"] == (call == 5)  # which was written when it failed


def test_an_evaluation_that_fails_again_says_of_which_step_it_is(flags, tmp_path, prompts_file):
    path = tmp_path / "rewards.py"
    path.write_text(
        "calls = []\n" + GOOD.replace("    return", "    calls.append(1)\n    1 / (3 - len(calls))\n    return")
    )
    settings = {"ppo__reward": [f"{path}:f"], "data__eval": [str(prompts_file)], "run__eval_every": 1}
    with pytest.raises(RewardError, match=r"^step 1 of 3: "):
        train(flags("run", **settings))
    path.write_text(GOOD.replace("return", "return 1 / 0\n    return"))
    with pytest.raises(RewardError, match=r"^the evaluation of step 1 of 3: .*ZeroDivisionError"):
        train(flags("run", **settings, run__resume=True))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0]


def test_a_fault_before_training_is_named_as_such(flags, rewards, prompts_file):
    settings = {"data__eval": [str(prompts_file)], "ppo__reward": [f"{rewards}:broken"]}
    with pytest.raises(RewardError, match=r"^before step 1 of 3: the reward \S+:broken raised KeyError(.|\n)*→ it was"):
        train(flags("run", **settings))


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


def test_the_component_of_a_single_reward_is_logged_without_its_weight(flags, rewards):
    first = read_metrics(train(flags("run", ppo__reward=[f"{rewards}:length=-2"], optim__max_steps=1)).out)[0]
    assert first["reward_mean"] == pytest.approx(-2 * first["reward/rewards.py:length"])
    assert first["reward_mean"] < 0


def test_reward_model_as_reward_with_weights(flags, settings, pairs_file, rewards):
    rm = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)], optim__epochs=2)))
    mixed = [f"{rm.final}=0.5", f"{rewards}:length=2"]
    rows = read_metrics(train(flags("run", ppo__reward=mixed, ppo__value_model="separate")).out)
    first = rows[0]
    assert first["reward_mean"] == pytest.approx(
        0.5 * first["reward/final"] + 2 * first["reward/rewards.py:length"], abs=1e-5
    )


@pytest.mark.parametrize("lora", [0, 4], ids=["alone", "on-the-policy-s-base"])
def test_conversations_that_a_reward_model_cuts_are_counted(flags, settings, pairs_file, prompts_file, capfd, lora):
    """By its own rule: the prompt loses its beginning. Long prompts are cut, short ones are not."""
    rm = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)], lora__rank=lora))).final
    record = json.loads((rm / "rlhfkit.json").read_text())
    (rm / "rlhfkit.json").write_text(json.dumps({**record, "max_length": 48}))
    rows = [{"prompt": "say one word " * (12 if i == 3 else 1) + str(i), "n": i} for i in range(8)]
    given = {"data__train": [str(write_jsonl(prompts_file, rows))], "data__eval": [str(prompts_file)]}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = RewardScorer.score_rows
        patch.setattr(RewardScorer, "score_rows", lambda self, rows: seen.append(rows) or real(self, rows))
        rows = read_metrics(train(flags("run", ppo__reward=[str(rm)], lora__rank=lora, **given)).out)
    assert max(map(len, seen[0])) == 48
    assert [row["reward_cut"] for row in rows[1:-1]] == [1 / 8] * 3
    assert rows[0]["eval_reward_cut"] == rows[-2]["eval_reward_cut"] == 1 / 8
    said = capfd.readouterr().err
    assert said.count("note: 1 of 8 conversations are longer than the 48 tokens that the reward model reads") == 1


def test_nothing_is_cut_where_no_reward_model_reads(flags):
    assert "reward_cut" not in read_metrics(train(flags("run", optim__max_steps=1)).out)[0]


def test_policy_from_an_sft_adapter_keeps_it_as_reference(flags, settings, sft_file):
    from rlhfkit.config.stages import SftConfig
    from rlhfkit.stages import sft

    tuned = sft.run(load_config(SftConfig, flags=settings("sft", data__train=[str(sft_file)], lora__rank=4)))
    result = train(flags("run", model__path=str(tuned.final), lora__rank=4))
    rows = read_metrics(result.out)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-2]["kl"] != 0.0


# -- numbers that are none ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_row_and_checkpoint(flags, rewards, prompts_file):
    changes = {"ppo__reward": [f"{rewards}:late"], "run__save_every": 1, "optim__batch_size": 4}
    with pytest.raises(NonFiniteError) as error:
        train(flags("run", **changes))
    out = Path(flags("run")["run.out"])
    assert error.value.message == (
        f"the loss is not finite at step 2, row {prompts_file}:6 (the last good checkpoint is {out}/checkpoints/step-1)"
    )
    assert [row["step"] for row in read_metrics(out)] == [1]
    rewards.with_name("mended").touch()
    resumed = train({**flags("run", **changes), "run.resume": True})
    assert read_metrics(resumed.out)[-1]["resumed_from"] == 1


@pytest.fixture
def holed(tmp_path):
    """A model that has no number for the token "5"."""
    folder = make_model(tmp_path / "holed", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder).encode("5", add_special_tokens=False)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("changes", [{}, {"lora__rank": 4}], ids=["full", "lora"])
def test_logits_that_are_not_finite_name_step_row_and_checkpoint(flags, holed, prompts_file, changes):
    with pytest.raises(NonFiniteError) as error:
        train(flags("run", model__path=str(holed), **changes))
    message = error.value.message
    assert message.startswith("the policy's log-probability is not finite at step 1, row ")
    assert message.endswith(" (there is no checkpoint yet)")
    # Its own row, and whichever the sampler has given a "5" to.
    assert f"{prompts_file}:6" in message


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("logprobs", "the policy's log-probability"),
        ("ref_logprobs", "the reference's log-probability"),
        ("values", "the value"),
        ("score", "the score"),
    ],
)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_rollout_that_is_not_finite_names_step_row_and_checkpoint(flags, monkeypatch, part, words, number):
    rollouts = []
    real = ppo.look_back

    def spoil(found, *given, **how):
        real(found, *given, **how)
        rollouts.append(found)
        if len(rollouts) == 2:
            if part == "score":
                found[5].score = number
            else:
                getattr(found[5], part)[-1] = number

    monkeypatch.setattr(ppo, "look_back", spoil)
    with pytest.raises(NonFiniteError) as error:
        train(flags("run", run__save_every=1))
    out = flags("run")["run.out"]
    assert error.value.message == (
        f"{words} is not finite at step 2, row {rollouts[1][5].prompt.record.where} "
        f"(the last good checkpoint is {out}/checkpoints/step-1)"
    )
    assert [row["step"] for row in read_metrics(out)] == [1]


def test_a_reference_that_is_not_finite_is_told_from_its_policy(flags, monkeypatch, tiny_model):
    token = AutoTokenizer.from_pretrained(tiny_model).encode("5", add_special_tokens=False)
    real = ppo.load_reference

    def holed(loaded, run):
        reference = real(loaded, run)
        reference.model.get_input_embeddings().weight.data[token] = float("nan")
        return reference

    monkeypatch.setattr(ppo, "load_reference", holed)
    with pytest.raises(NonFiniteError, match="the reference's log-probability is not finite at step 1, row"):
        train(flags("run"))


@pytest.fixture
def gradients(monkeypatch):
    """Has the gradient of the policy's last norm be what a function of the pass backward says, the first being 1."""
    real, passes = ppo.load_policy, itertools.count(1)

    def install(of):
        def load(*given):
            policy = real(*given)
            policy.model.model.norm.weight.register_hook(lambda g: g * of(next(passes)))
            return policy

        monkeypatch.setattr(ppo, "load_policy", load)

    return install


ONE_BY_ONE = {"optim__batch_size": 1, "ppo__ppo_epochs": 2, "run__save_every": 1}  # 16 optimiser steps a rollout


def test_a_gradient_that_is_not_finite_names_step_row_and_checkpoint(flags, gradients, prompts_file):
    gradients(lambda n: math.inf if n == 16 + 3 else 1.0)
    with pytest.raises(NonFiniteError) as error:
        train(flags("run", **ONE_BY_ONE))
    found = re.fullmatch(
        r"the gradient is not finite at step 2, row (\S+) \(the last good .* (\S+)\)", error.value.message
    )
    assert found is not None
    assert found[1] in [f"{prompts_file}:{i}" for i in range(1, 9)]
    assert found[2] == f"{flags('run')['run.out']}/checkpoints/step-1"


@pytest.fixture
def scaled(monkeypatch):
    """The loss scaler of fp16, in a run that goes on in float32: a CPU does not train in fp16."""
    begin, init = Run.begin, Optimisation.__init__

    def begin_in_fp16(self, load_state):
        begin(self, load_state)
        self.precision = "fp16"

    def with_scaler(self, accelerator, *rest):
        accelerator.scaler = torch.amp.GradScaler("cpu")
        init(self, accelerator, *rest)

    monkeypatch.setattr(Run, "begin", begin_in_fp16)
    monkeypatch.setattr(Run, "autocast", None)
    monkeypatch.setattr(Optimisation, "__init__", with_scaler)


def test_gradients_that_no_scale_makes_finite_end_an_fp16_run(flags, gradients, scaled):
    gradients(lambda n: math.nan)
    with pytest.raises(NonFiniteError) as error:
        train(flags("run", **ONE_BY_ONE))
    assert error.value.message == (
        "the gradient is not finite at step 2, nor was it in 30 optimiser steps in a row, which fp16's loss scaler "
        f"skipped (the last good checkpoint is {flags('run')['run.out']}/checkpoints/step-1)"
    )


def test_an_fp16_run_outlives_gradients_that_its_scale_makes_finite(flags, gradients, scaled):
    gradients(lambda n: math.inf if n % 30 else 1.0)
    result = train(flags("run", **ONE_BY_ONE))
    assert [row["step"] for row in read_metrics(result.out)[:-1]] == [1, 2, 3]


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
