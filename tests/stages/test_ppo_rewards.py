"""Where PPO's rewards come from and go, and what becomes of a run whose reward fails."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig
from rlhfkit.errors import CheckpointError, ModelError, RewardError
from rlhfkit.models.reward_sources import FunctionReward
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.runtime import checkpoint
from rlhfkit.stages import plan, ppo, reward


def train(flags, *sets):
    return ppo.run(load_config(PpoConfig, flags=flags, sets=sets))


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


def test_an_evaluation_that_was_made_up_for_in_vain_is_recorded_once(flags, tmp_path, prompts_file):
    """After it the run ends again, before another step is saved: then it is done a second time."""
    path = tmp_path / "rewards.py"
    settings = {"ppo__reward": [f"{path}:f"], "data__eval": [str(prompts_file)], "run__eval_every": 1}
    for call, resume in ((3, False), (2, True), (99, True)):
        path.write_text(
            "calls = []\n" + GOOD.replace("    ret", f"    calls.append(1)\n    1 / ({call} - len(calls))\n    ret")
        )
        try:
            train(flags("run", **settings, run__resume=resume))
        except RewardError:
            assert call < 99
    train(flags("other", **settings))
    steps, expected = ([row["step"] for row in read_metrics(tmp_path / name)] for name in ("run", "other"))
    assert steps == expected
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "other")]
    assert samples[0] == samples[1]


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
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("fault", ["absent", "cut"])
def test_random_states_that_are_not_whole_are_refused(flags, tmp_path, fault):
    train(flags("run", optim__max_steps=2, run__save_every=1))
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2", ignore_errors=True)
    states = tmp_path / "run" / "checkpoints" / "step-1" / "random_states_0.pkl"
    states.write_bytes(states.read_bytes()[:100]) if fault == "cut" else states.unlink()
    with pytest.raises(CheckpointError, match=r"step-1 cannot be read: (.|\n)*delete this folder"):
        train(flags("run", optim__max_steps=2, run__save_every=1, run__resume=True))


def test_a_column_of_some_rows_is_there_for_all(flags, tmp_path):
    """Whatever rows a rollout has: None stands for those without it."""
    rows = [{"prompt": f"say one word {i}", **({"answer": "one"} if i == 5 else {})} for i in range(8)]
    path = tmp_path / "rewards.py"
    path.write_text(
        "seen = []\n"
        "def f(prompts, responses, answer):\n"
        f"    open({str(tmp_path / 'seen')!r}, 'a').write(str(len(answer)) + str(set(map(type, answer))) + '\\n')\n"
        "    return [1.0] * len(responses)\n"
    )
    data = [str(write_jsonl(tmp_path / "some.jsonl", rows))]
    train(flags("run", data__train=data, ppo__reward=[f"{path}:f"], ppo__rollout_size=2, optim__batch_size=2))
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {line[0] for line in seen} == {"2"}
    assert any("str" in line for line in seen)
    assert "2{<class 'NoneType'>}" in seen


@pytest.mark.parametrize("function", ["colour", "questions", "CONSTANT"])
def test_a_function_that_cannot_be_called_is_found_before_a_model_is_loaded(flags, rewards, function, monkeypatch):
    monkeypatch.setattr(ppo, "load_for_training", None)
    with pytest.raises(RewardError):
        train(flags("run", ppo__reward=[f"{rewards}:{function}"]))


def test_a_reward_model_without_a_head_is_found_before_anything_is_read(flags, tiny_model, monkeypatch):
    monkeypatch.setattr(ppo, "open_text_side", None)
    with pytest.raises(ModelError, match="has no reward head"):
        train(flags("run", ppo__reward=[str(tiny_model)]))


def test_the_screen_names_rewards_and_what_each_gives(flags, rewards, capfd):
    reward_file = str(rewards)
    train(flags("run", ppo__reward=[f"{reward_file}:length=2", f"{reward_file}:noisy"], optim__max_steps=1))
    said = capfd.readouterr().err
    assert f"rewards: 2 x {reward_file}:length, {reward_file}:noisy\n" in said
    assert re.search(r"step 1/1 .* reward/rewards.py:length \S+  reward/rewards.py:noisy ", said)


def test_data_that_ends_before_max_steps_is_told(flags, capfd):
    train(flags("run", optim__max_steps=9))
    assert "note: 3 steps and not --max-steps 9: the data ends there (--epochs)" in capfd.readouterr().err


def test_other_tokens_are_other_data(flags, tmp_path):
    """The words of both prompts are the same; what the template makes of them is not."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "say one word", "input": "good film"}] * 8)
    settings = {"data__train": [str(data)], "model__template": "alpaca", "ppo__reward": [f"{tmp_path}/r.py:f"]}
    settings |= {"data__max_length": 512}
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [0.0] * len(responses)\n")
    train(flags("run", **settings, optim__max_steps=1))
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    write_jsonl(data, [{"instruction": "say one word\ngood film"}] * 8)
    with pytest.raises(CheckpointError, match="the training data is not what it was"):
        train(flags("run", **settings, optim__max_steps=1, run__resume=True))


def test_a_fault_before_training_is_named_as_such(flags, rewards, prompts_file):
    settings = {"data__eval": [str(prompts_file)], "ppo__reward": [f"{rewards}:broken"]}
    with pytest.raises(RewardError, match=r"^before step 1 of 3: the reward \S+:broken raised KeyError(.|\n)*→ it was"):
        train(flags("run", **settings))


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
