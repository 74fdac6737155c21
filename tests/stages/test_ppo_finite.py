"""Numbers that are none stop PPO before they reach the weights, and are told with their step, rows and checkpoint."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model, read_metrics
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig
from rlhfkit.errors import NonFiniteError
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import Run
from rlhfkit.stages import ppo


def train(flags, *sets):
    return ppo.run(load_config(PpoConfig, flags=flags, sets=sets))


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
