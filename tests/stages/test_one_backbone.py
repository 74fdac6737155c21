"""Policy, reference, reward and value function as adapters on one base = separate copies of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, read_metrics
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhfkit.algo.logprobs import token_logprobs
from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import LoraConfig
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig, SftConfig
from rlhfkit.data.batch import TokenBatch, collate, token_row
from rlhfkit.errors import Interrupted
from rlhfkit.models.adapters import POLICY, VALUE, active_adapter, add_value_adapter, checkpoint_contexts
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import PolicyModel, reference_weights
from rlhfkit.stages import ppo, reward, sft

CPU = torch.device("cpu")
PROMPTS = [[Message("user", f"what do you think of film {i}?")] for i in range(5)]
ANSWERS = ["it was good 1", "bad, very bad", "one two three", "a good story with a good film", ""]


@pytest.fixture
def rm_folder(settings: Callable[..., Any], pairs_file: Path) -> Path:
    flags = settings("rm", data__train=[str(pairs_file)], lora__rank=4, optim__lr=0.02, optim__epochs=3)
    return reward.run(load_config(RmConfig, flags=flags)).final


def lora_policy(folder: Path, *, seed: int = 0, targets: str = "auto") -> LoadedModel:
    """The same weights at each call: LoRA's own start is drawn at random, too."""
    torch.manual_seed(seed)
    source = open_model(str(folder))
    lora = LoraConfig(rank=4, targets=targets)
    loaded = load_model(source, load_text_side(source), "causal", lora=lora, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return loaded


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def scorer(path: Path, policy: LoadedModel | None = None) -> RewardScorer:
    return RewardScorer(str(path), device=CPU, dtype=torch.float32, policy=policy)


def some_batch() -> TokenBatch:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (9, 14, 5)]
    return collate([token_row(ids, [i > 2 for i in range(len(ids))]) for ids in rows])


def test_the_reward_adapter_scores_as_a_model_of_its_own(tiny_model: Path, rm_folder: Path) -> None:
    policy = lora_policy(tiny_model)
    before, trains = policy_logprobs(policy), trainable(policy.model)
    alone, shared = scorer(rm_folder), scorer(rm_folder, policy)
    assert shared.shared
    assert not alone.shared
    assert shared.loaded is policy
    torch.testing.assert_close(
        torch.tensor(shared.score(PROMPTS, ANSWERS)), torch.tensor(alone.score(PROMPTS, ANSWERS)), rtol=1e-5, atol=1e-6
    )
    # The policy neither moved nor changed in what trains.
    torch.testing.assert_close(policy_logprobs(policy), before, rtol=0, atol=0)
    assert trainable(policy.model) == trains


def test_a_reward_adapter_may_name_a_head_that_it_had_no_weights_for(tiny_model: Path, rm_folder: Path) -> None:
    """As one has that went on from an SFT adapter beside the vocabulary's head."""
    expected = scorer(rm_folder).score(PROMPTS, ANSWERS)
    config = json.loads((rm_folder / "adapter_config.json").read_text())
    config["target_modules"] += ["lm_head"]
    (rm_folder / "adapter_config.json").write_text(json.dumps(config))
    shared = scorer(rm_folder, lora_policy(tiny_model))
    assert shared.shared
    torch.testing.assert_close(
        torch.tensor(shared.score(PROMPTS, ANSWERS)), torch.tensor(expected), rtol=1e-5, atol=1e-6
    )


def policy_logprobs(policy: LoadedModel) -> Tensor:
    with torch.no_grad():
        return PolicyModel(policy.model, None)(some_batch()).logprobs


def test_two_reward_models_on_one_base(tiny_model: Path, rm_folder: Path) -> None:
    policy = lora_policy(tiny_model)
    first, second = scorer(rm_folder, policy), scorer(rm_folder, policy)
    assert {"default", "reward", "reward_1"} == set(policy.model.peft_config)
    assert first.score(PROMPTS, ANSWERS) == second.score(PROMPTS, ANSWERS)


def test_another_base_is_loaded_by_itself(tiny_model: Path, rm_folder: Path, tmp_path: Path) -> None:
    assert not scorer(rm_folder, lora_policy(make_model(tmp_path / "other", seed=1))).shared


def test_adapters_are_back_after_an_error_and_nested(tiny_model: Path) -> None:
    policy = lora_policy(tiny_model)
    before = policy_logprobs(policy)
    with pytest.raises(RuntimeError, match="on purpose"), active_adapter(policy.model, None):
        raise RuntimeError("on purpose")
    with reference_weights(policy.model):
        bare = policy_logprobs(policy)
        with active_adapter(policy.model, POLICY):
            torch.testing.assert_close(policy_logprobs(policy), before, rtol=0, atol=0)
        torch.testing.assert_close(policy_logprobs(policy), bare, rtol=0, atol=0)
    assert (bare - before).abs().max() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_value_adapter_is_a_trunk_of_its_own(tiny_model: Path, checkpointing: bool) -> None:
    """Values and both gradients equal those of two separate copies, also when activations are computed again."""
    policy, copy = lora_policy(tiny_model), lora_policy(tiny_model)
    add_value_adapter(policy.model, POLICY)
    if checkpointing:
        policy.model.get_base_model().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts(policy.model)}
        )
    both = PolicyModel(policy.model, "adapter").train()
    apart = PolicyModel(copy.model, "shared").train()
    torch.manual_seed(5)
    for module in (both, apart):
        torch.manual_seed(5)
        torch.nn.init.normal_(module.value_head.weight)
    batch = some_batch()
    out = both(batch)
    expected = apart(batch)
    torch.testing.assert_close(out.values, expected.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-6)
    (out.logprobs.sum() + out.values.square().sum()).backward()
    mine = {n: p.grad for n, p in both.named_parameters() if p.grad is not None}
    for part, adapter in (("logprobs", POLICY), ("values", VALUE)):
        apart.zero_grad()
        again = apart(batch)
        (again.logprobs.sum() if part == "logprobs" else again.values.square().sum()).backward()
        theirs = {n: p.grad for n, p in apart.named_parameters() if p.grad is not None and ".lora_" in n}
        assert theirs
        for name, grad in theirs.items():
            torch.testing.assert_close(mine[name.replace(".default.", f".{adapter}.")], grad, rtol=1e-4, atol=1e-5)


def test_all_that_trains_gets_a_gradient(tiny_model: Path) -> None:
    """Processes wait for each other's gradients. A value does not pass the head: its adapter is the policy's alone."""
    policy = lora_policy(tiny_model, targets="q_proj,lm_head")
    add_value_adapter(policy.model, POLICY)
    both = PolicyModel(policy.model, "adapter").train()
    out = both(some_batch())
    (out.logprobs.sum() + out.values.sum()).backward()
    assert trainable(both) == {name for name, p in both.named_parameters() if p.grad is not None}
    assert [name for name in trainable(both) if "lm_head" in name and POLICY in name]
    assert [name for name in trainable(both) if "q_proj" in name and VALUE in name]


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(settings: Callable[..., Any], prompts_file: Path, rm_folder: Path) -> Callable[..., Any]:
    def make(out: str, **changes: Any) -> Any:
        defaults = {
            "data__train": [str(prompts_file)],
            "ppo__reward": [str(rm_folder)],
            "ppo__max_new_tokens": 8,
            "ppo__rollout_size": 8,
            "ppo__ppo_epochs": 2,
            "ppo__value_model": "adapter",
            "optim__epochs": 3,
            "lora__rank": 4,
        }
        return settings(out, **{**defaults, **changes})

    return make


def train(flags: Any) -> Any:
    return ppo.run(load_config(PpoConfig, flags=flags))


def test_a_run_on_one_backbone_equals_one_with_copies(
    flags: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = train(flags("shared", ppo__value_model="shared"))
    assert (
        "models held: one base with the adapters policy, reward; the base alone as the reference\n"
        in capfd.readouterr().err
    )
    monkeypatch.setattr("rlhfkit.models.scoring.fits_on", lambda *_: False)
    apart = train(flags("apart", ppo__value_model="shared"))
    assert "reward model" in capfd.readouterr().err
    mine, theirs = (load_file(r.final / "adapter_model.safetensors") for r in (shared, apart))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
    for one, other in zip(read_metrics(shared.out), read_metrics(apart.out), strict=True):
        assert one.get("reward_mean") == pytest.approx(other.get("reward_mean"), rel=1e-4)


def test_the_value_function_starts_as_the_reward_model_and_is_saved_apart(flags: Callable[..., Any]) -> None:
    result = train(flags("run"))
    assert not [p for p in result.final.iterdir() if p.is_dir()]  # no second adapter beside the policy's
    values = load_file(result.out / "value" / "value.safetensors")
    assert any(".value." in name for name in values)
    assert "value_head.weight" in values
    rows = [r for r in read_metrics(result.out) if "event" not in r]
    assert all(r["value_explained_variance"] is not None for r in rows)


def test_resume_with_a_value_adapter_is_exact(flags: Callable[..., Any]) -> None:
    whole = train(flags("whole"))
    stopped = flags("stopped", run__save_every=1)
    import os
    import signal
    from unittest import mock

    finish = ppo.Run.finish_step

    def stop_at_first(self: Any, step: int, *args: Any, **kwargs: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        finish(self, step, *args, **kwargs)

    with mock.patch.object(ppo.Run, "finish_step", stop_at_first), pytest.raises(Interrupted):
        train(stopped)
    resumed = train({**stopped, "run.resume": True})
    for part in ("final/adapter_model.safetensors", "value/value.safetensors"):
        mine, theirs = load_file(resumed.out / part), load_file(whole.out / part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_written_out_head_serves_the_shared_backbone(tiny_model: Path) -> None:
    """The policy's head is a plain layer under peft: it must not fall back to the slower form."""
    head = lora_policy(tiny_model).model.get_base_model().get_output_embeddings()
    hidden = torch.randn(3, head.in_features, requires_grad=True)
    assert "_LinearStats" in type(token_logprobs(head, hidden, torch.tensor([1, 2, 3])).logprobs.grad_fn).__name__


# -- from stage to stage -----------------------------------------------------------------------------------------------


def test_three_stages_of_adapters_share_their_first_base(
    settings: Callable[..., Any], flags: Callable[..., Any], sft_file: Path, pairs_file: Path, capfd: Any
) -> None:
    """sft on a base, rm on what sft left, ppo on both: adapters name the base they are for, not what they came from."""
    tuned = sft.run(load_config(SftConfig, flags=settings("sft", data__train=[str(sft_file)], lora__rank=4)))
    changes = {"model__path": str(tuned.final), "data__train": [str(pairs_file)], "lora__rank": 4}
    judge = reward.run(load_config(RmConfig, flags=settings("judge", **changes)))
    capfd.readouterr()
    result = train(flags("run", model__path=str(tuned.final), ppo__reward=[str(judge.final)]))
    said = capfd.readouterr().err
    assert "models held: one base with the adapters policy, reference, reward, value\n" in said
    assert f"value function: starts as {judge.final}\n" in said
    assert read_metrics(result.out)[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert read_metrics(result.out)[-2]["kl"] != 0.0


@pytest.mark.parametrize("kind", ["adapter", "separate"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_first_values_are_the_weighted_scores(
    flags: Callable[..., Any], rm_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, weight: float
) -> None:
    """The value at an answer's last token is the reward model's score of the text up to there."""
    rollouts = []
    real = ppo._targets
    monkeypatch.setattr(ppo, "_targets", lambda rollout, *rest: rollouts.append(rollout) or real(rollout, *rest))
    train(flags("run", ppo__value_model=kind, ppo__reward=[f"{rm_folder}={weight}"], optim__max_steps=1))
    judge = scorer(rm_folder)
    for e in rollouts[0].episodes:
        # The last token is chosen where the answer stands without it.
        ids = np.asarray([*e.prompt.prompt.tolist(), *e.response[:-1]], np.int32)
        assert e.values[-1] == pytest.approx(weight * judge.score_rows([ids])[0], rel=1e-3, abs=1e-4)


# -- four bits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantisation works on blocks of 64 weights."""
    return make_model(tmp_path_factory.mktemp("models") / "wider", hidden_size=128, intermediate_size=256)


def rm_on(wider: Path, settings: Callable[..., Any], pairs_file: Path, quantize: str) -> Path:
    changes = {"model__path": str(wider), "model__quantize": quantize, "lora__rank": 4, "optim__lr": 0.02}
    flags = settings(f"rm-{quantize}", data__train=[str(pairs_file)], **changes)
    return reward.run(load_config(RmConfig, flags=flags)).final


def test_everything_on_one_base_of_four_bits(
    wider: Path, settings: Callable[..., Any], flags: Callable[..., Any], pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judge = rm_on(wider, settings, pairs_file, "4bit")
    changes = {"model__path": str(wider), "model__quantize": "4bit", "ppo__reward": [str(judge)]}
    shared = train(flags("shared", **changes))
    said = capfd.readouterr().err
    assert (
        "models held: one base in 4bit with the adapters policy, reward, value; the base alone as the reference" in said
    )
    monkeypatch.setattr("rlhfkit.models.scoring.fits_on", lambda *_: False)
    apart = train(flags("apart", **changes, ppo__value_model="shared"))
    assert f"the reward model {judge} on a base of its own, since more than LoRA layers" in capfd.readouterr().err
    one, other = (read_metrics(r.out)[0] for r in (shared, apart))
    for name in ("reward_mean", "reward_std", "kl", "response_tokens"):
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_an_adapter_scores_on_the_storage_it_was_trained_on(
    wider: Path, settings: Callable[..., Any], flags: Callable[..., Any], pairs_file: Path, capfd: Any
) -> None:
    """On the policy's four bits its scores would be others: it gets its own base, and the run says why."""
    judge = rm_on(wider, settings, pairs_file, "none")
    changes = {"model__path": str(wider), "model__quantize": "4bit", "ppo__reward": [str(judge)]}
    train(flags("run", **changes, ppo__value_model="shared", optim__max_steps=1))
    assert (
        f"the reward model {judge} on a base of its own, since it was trained on one in 16 bits\n"
        in capfd.readouterr().err
    )


# -- reward models of another kind -------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path: Path, settings: Callable[..., Any], pairs_file: Path) -> Path:
    """A reward model of another architecture, tokenizer and template than the policy's."""
    tokenizer = make_tokenizer()
    fewer = tokenizer.train_new_from_iterator(["gut und schlecht", "one two three four five six"] * 4, 300)
    fewer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    assert fewer.get_vocab() != tokenizer.get_vocab()
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, eos_token_id=fewer.eos_token_id,
        pad_token_id=fewer.pad_token_id, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "stranger")
    fewer.save_pretrained(tmp_path / "stranger")
    changes = {"model__path": str(tmp_path / "stranger"), "data__train": [str(pairs_file)], "optim__epochs": 2}
    return reward.run(load_config(RmConfig, flags=settings("stranger-rm", **changes))).final


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_reward_model_of_another_kind_reads_the_text_in_its_own_way(
    flags: Callable[..., Any], stranger: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, rank: int
) -> None:
    rollouts = []
    real = ppo._targets
    monkeypatch.setattr(ppo, "_targets", lambda rollout, *rest: rollouts.append(rollout) or real(rollout, *rest))
    kind = {"ppo__value_model": "separate", "lora__rank": rank}
    train(flags("run", ppo__reward=[str(stranger)], optim__max_steps=1, **kind))
    said = capfd.readouterr().err
    assert f"; the reward model {stranger}\n" in said
    assert f"value function: starts as {stranger}" not in said  # it reads other ids
    judge = scorer(stranger)
    episodes = rollouts[0].episodes
    expected = judge.score([e.prompt.record.prompt for e in episodes], [e.text for e in episodes])
    assert [e.score for e in episodes] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(s, 4) for s in expected}) > 1
