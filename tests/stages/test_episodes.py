"""Episodes: what is sampled, what policy and reference say about it, and how it is laid out for the update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhfkit.algo.logprobs import token_logprobs
from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import LoraConfig
from rlhfkit.data.packing import Tree, pack
from rlhfkit.data.records import PromptRecord
from rlhfkit.data.tokenize import PromptRow, tokenize_prompts
from rlhfkit.models import wrappers
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.text_side import TextSide, load_text_side
from rlhfkit.models.wrappers import PolicyModel, hidden_states, reference_weights
from rlhfkit.stages.episodes import (
    Episode,
    by_tokens,
    collate_episodes,
    look_back,
    sample_episodes,
    score_episodes,
    stack,
)
from rlhfkit.stages.ppo import prompts_of_step
from rlhfkit.stages.ppo_models import load_reference

CPU = torch.device("cpu")
QUESTIONS = ("what do you think of the film?", "count to three", "say one word", "good or bad?", "x")


@pytest.fixture(scope="module")
def text(tiny_model: Path) -> TextSide:
    return load_text_side(open_model(str(tiny_model)), template="chatml")


@pytest.fixture(scope="module")
def prompts(text: TextSide) -> list[PromptRow]:
    records = [PromptRecord(f"q.jsonl:{i}", (Message("user", q),), {"n": i}) for i, q in enumerate(QUESTIONS)]
    rows, _ = tokenize_prompts(records, text.encoder, 100)
    return rows


def load(tiny_model: Path, text: TextSide, lora: LoraConfig | None = None) -> Any:
    model = load_model(open_model(str(tiny_model)), text, "causal", lora=lora, dtype=torch.float32).model
    return model.eval()


def make_adapter_speak(model: Any, seed: int, adapter: str = "default") -> None:
    """LoRA's second matrix starts at zero, and then an adapter cannot be told from none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def policy(tiny_model: Path, text: TextSide) -> PolicyModel:
    """A LoRA policy that differs from its base, with a value head that says something."""
    model = load(tiny_model, text, LoraConfig(rank=4))
    make_adapter_speak(model, seed=1)
    policy = PolicyModel(model, "shared").eval()
    assert policy.value_head is not None
    torch.manual_seed(2)
    torch.nn.init.normal_(policy.value_head.weight)
    torch.nn.init.normal_(policy.value_head.bias)
    return policy


@pytest.fixture
def how(text: TextSide) -> SamplingSettings:
    """Many tokens stop an answer, so that a random model's answers have many lengths."""
    size = len(text.tokenizer)
    return SamplingSettings(12, 0.8, (*text.tokens.stop_ids, *range(5, size, 12)), vocabulary=size)


def sample(
    policy: PolicyModel, prompts: list[PromptRow], text: TextSide, how: SamplingSettings, batch_size: int = 64
) -> list[Episode]:
    # Two answers to each prompt, as with --samples-per-prompt 2.
    indexed = [(2 * i + k, row) for i, row in enumerate(prompts) for k in range(2)]
    return sample_episodes(policy.model, indexed, text, how, seed=(5, 1), batch_size=batch_size, autocast=None)


def episode(index: int, prompt: list[int], response: list[int], ended: bool = True, score: float = 0.0) -> Episode:
    row = PromptRow(np.asarray(prompt, np.int32), PromptRecord("q.jsonl:1", (Message("user", "?"),)))
    return Episode(index, row, response, ended, text="", score=score)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_episodes_come_in_order_whatever_the_batch(
    policy: PolicyModel, prompts: list[PromptRow], text: TextSide, how: SamplingSettings
) -> None:
    found = sample(policy, prompts, text, how)
    assert [e.index for e in found] == list(range(10))
    assert [e.prompt for e in found] == [row for row in prompts for _ in range(2)]
    assert len({tuple(e.response) for e in found}) > 5  # two samples of a prompt are two, as are other prompts'
    for batch_size in (1, 3):
        again = sample(policy, prompts, text, how, batch_size)
        assert [(e.index, e.response, e.ended) for e in again] == [(e.index, e.response, e.ended) for e in found]


def test_a_process_samples_its_part_as_one_would_sample_all(
    policy: PolicyModel, prompts: list[PromptRow], text: TextSide, how: SamplingSettings
) -> None:
    whole = sample(policy, prompts, text, how)
    part = [(2 * i + k, row) for i, row in enumerate(prompts) for k in range(2) if i % 2 == 1]
    mine = sample_episodes(policy.model, part, text, how, seed=(5, 1), batch_size=64, autocast=None)
    assert [e.response for e in mine] == [whole[index].response for index, _ in part]
    later = sample_episodes(policy.model, part, text, how, seed=(5, 2), batch_size=64, autocast=None)
    assert [e.response for e in later] != [e.response for e in mine]


def test_the_text_of_an_answer_has_no_control_tokens(
    policy: PolicyModel, prompts: list[PromptRow], text: TextSide, how: SamplingSettings
) -> None:
    controls = set(text.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    episodes = sample(policy, prompts, text, how)
    assert any(controls & set(e.response) for e in episodes)
    for e in episodes:
        assert e.text == text.tokenizer.decode([i for i in e.response if i not in controls])
        assert e.length == len(e.prompt.prompt) + len(e.response)


def test_a_lora_policy_samples_as_its_merged_copy(
    policy: PolicyModel, prompts: list[PromptRow], text: TextSide, how: SamplingSettings
) -> None:
    rows, seeds = [row.prompt.tolist() for row in prompts], [(i,) for i in range(len(prompts))]
    found = sample_answers(policy.model, rows, how, seeds=seeds, pad_id=text.tokens.pad_id)
    merged = copy.deepcopy(policy.model).merge_and_unload()
    assert sample_answers(merged, rows, how, seeds=seeds, pad_id=text.tokens.pad_id) == found
    with reference_weights(policy.model):
        assert sample_answers(policy.model, rows, how, seeds=seeds, pad_id=text.tokens.pad_id) != found


def test_scores_and_their_parts_reach_their_episodes() -> None:
    class Reward:
        cut: ClassVar[list[bool]] = [False, True]

        def score(self, records: list[PromptRecord], answers: list[str]) -> tuple[list[float], dict[str, list[float]]]:
            assert answers == ["", ""]
            assert [r.where for r in records] == ["q.jsonl:1"] * 2
            return [1.5, -2.0], {"a": [1.0, -1.0], "b": [0.5, -1.0]}

    reward: Any = Reward()
    episodes = [episode(0, [1], [2]), episode(1, [1], [3])]
    score_episodes(episodes, reward)
    assert [e.score for e in episodes] == [1.5, -2.0]
    assert [e.components for e in episodes] == [{"a": 1.0, "b": 0.5}, {"a": -1.0, "b": -1.0}]
    assert [e.cut for e in episodes] == [False, True]
    score_episodes([], reward)


# -- layout ------------------------------------------------------------------------------------------------------------


def test_positions_are_those_that_choose_answer_tokens() -> None:
    episodes = [episode(0, [4, 5, 6], [7, 8]), episode(1, [4], [9, 9, 2]), episode(2, [4, 5], [2])]
    batch = collate_episodes(episodes, CPU)
    assert batch.tokens.input_ids.tolist() == [4, 5, 6, 7, 8, 4, 9, 9, 2, 4, 5, 2]
    assert batch.tokens.layout.lengths.tolist() == [5, 4, 3]
    # The prompt's last token chooses the answer's first; the answer's last token chooses nothing.
    assert batch.positions.tolist() == [2, 3, 5, 6, 7, 10]
    assert batch.targets.tolist() == [7, 8, 9, 9, 2, 2]


def test_what_prompts_begin_with_is_laid_out_once() -> None:
    episodes = [episode(0, [4, 5, 6], [7, 8]), episode(1, [4, 5, 9, 3], [9]), episode(2, [4, 5, 6], [2, 2])]
    batch = collate_episodes(episodes, CPU)
    assert batch.tokens.input_ids.tolist() == [4, 5, 6, 7, 8, 9, 3, 9, 6, 2, 2]
    assert batch.positions.tolist() == [2, 3, 6, 8, 9]
    assert batch.targets.tolist() == [7, 8, 9, 2, 2]
    # With several answers to each prompt the prompts are the trunks.
    twice = [episode(i, [4, 5, 6 + i // 2], [7, 8]) for i in range(4)]
    assert collate_episodes(twice, CPU).tokens.input_ids.tolist() == [4, 5, 6, 7, 8, 7, 8, 4, 5, 7, 7, 8, 7, 8]
    # Micro-batches are filled by what is computed: 2 + 3 + 3 tokens.
    assert [[e.index for e in group] for group in by_tokens(twice[::2], 8)] == [[0, 2]]


def test_micro_batches_hold_each_episode_once() -> None:
    episodes = [episode(i, [1] * (i + 1), [2] * (5 - i)) for i in range(4)]  # 6 tokens each
    assert [[e.index for e in group] for group in by_tokens(episodes, 12)] == [[0, 1], [2, 3]]
    assert [[e.index for e in group] for group in by_tokens(episodes, 11)] == [[0], [1], [2], [3]]


def test_stack_to_the_number() -> None:
    first = episode(0, [1, 2], [3], ended=True, score=0.5)
    second = episode(1, [1], [4, 5, 3], ended=False, score=-1.5)
    first.logprobs, first.ref_logprobs, first.values = (np.array([x], np.float32) for x in (-1.0, -2.0, 0.25))
    second.logprobs = np.array([-0.5, -0.25, -0.125], np.float32)
    second.ref_logprobs = np.array([-4.0, -5.0, -6.0], np.float32)
    rollout = stack([first, second], CPU)
    assert rollout.episodes == [first, second]
    assert rollout.mask.tolist() == [[True, False, False], [True, True, True]]
    assert rollout.logprobs.tolist() == [[-1.0, 0.0, 0.0], [-0.5, -0.25, -0.125]]
    assert rollout.ref_logprobs.tolist() == [[-2.0, 0.0, 0.0], [-4.0, -5.0, -6.0]]
    assert rollout.values.tolist() == [[0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]  # nobody valued the second
    assert rollout.scores.tolist() == [0.5, -1.5]
    assert rollout.ended.tolist() == [True, False]


@pytest.mark.parametrize(("count", "per_step"), [(10, 5), (10, 4), (3, 8), (7, 7), (1, 2)])
def test_every_prompt_comes_once_an_epoch(count: int, per_step: int) -> None:
    steps = 3 * count  # whole epochs, whatever divides what
    stream = [i for step in range(1, steps + 1) for i in prompts_of_step(count, per_step, 0, step)]
    assert len(stream) == steps * per_step
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count == 10:
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2
        assert stream != [i for step in range(1, steps + 1) for i in prompts_of_step(count, per_step, 1, step)]
    # A step needs no history: asked for alone, it is the same.
    assert prompts_of_step(count, per_step, 0, steps) == stream[-per_step:]


# -- looking back ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(model: Any, e: Episode, how: SamplingSettings) -> Tensor:
    """Log-probabilities of the answer's tokens by transformers alone: no padding, all logits."""
    ids = torch.tensor([[*e.prompt.prompt.tolist(), *e.response]])
    scores = torch.log_softmax(model(ids).logits[0, :, : how.vocabulary] / how.temperature, dim=-1)
    start = len(e.prompt.prompt)
    return torch.stack([scores[start + t - 1, token] for t, token in enumerate(e.response)])


@pytest.fixture
def bare(tiny_model: Path, text: TextSide) -> Any:
    return load(tiny_model, text)


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 10**6])
def test_looking_back_equals_one_by_one(
    policy: PolicyModel,
    bare: Any,
    prompts: list[PromptRow],
    text: TextSide,
    how: SamplingSettings,
    micro_batch_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    episodes = sample(policy, prompts, text, how)
    assert len({len(e.response) for e in episodes}) > 3
    asked: list[Any] = []
    monkeypatch.setattr(
        wrappers, "token_logprobs", lambda *given, **more: asked.append(more) or token_logprobs(*given, **more)
    )
    values_of, valued = PolicyModel._values, []
    monkeypatch.setattr(PolicyModel, "_values", lambda *given: valued.append(0) or values_of(*given))
    look_back(
        episodes, policy, None, how,
        device=CPU, micro_batch_tokens=micro_batch_tokens, autocast=None,
    )  # fmt: skip
    # Nothing is computed that is not looked at: no entropies, and the reference has no values.
    assert not any(more["with_entropy"] for more in asked)
    assert len(asked) == 2 * len(valued) > 0
    merged = copy.deepcopy(policy.model).merge_and_unload()
    head = policy.value_head
    assert head is not None
    assert how.vocabulary < merged.lm_head.out_features  # the limit means something
    for e in episodes:
        expected = one_by_one(merged, e, how)
        torch.testing.assert_close(torch.from_numpy(e.logprobs), expected, rtol=1e-4, atol=1e-4)
        reference = one_by_one(bare, e, how)
        torch.testing.assert_close(torch.from_numpy(e.ref_logprobs), reference, rtol=1e-4, atol=1e-4)
        assert (expected - reference).abs().max() > 0.05
        whole = pack([Tree(np.asarray([*e.prompt.prompt.tolist(), *e.response], np.int32))])
        with torch.no_grad():
            values = head(hidden_states(merged, whole))[len(e.prompt.prompt) - 1 : -1, 0]
        torch.testing.assert_close(torch.from_numpy(e.values), values, rtol=1e-4, atol=1e-4)
        assert e.logprobs.dtype == e.ref_logprobs.dtype == e.values.dtype == np.float32


def test_looking_back_with_a_reference_of_its_own(
    bare: Any, prompts: list[PromptRow], text: TextSide, how: SamplingSettings
) -> None:
    """Full training: the reference is another model, and without a value head there are no values."""
    policy = PolicyModel(copy.deepcopy(bare), None).eval()
    with torch.no_grad():
        policy.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    episodes = sample(policy, prompts, text, how)
    look_back(
        episodes, policy, PolicyModel(bare, None), how,
        device=CPU, micro_batch_tokens=200, autocast=None,
    )  # fmt: skip
    for e in episodes:
        torch.testing.assert_close(torch.from_numpy(e.logprobs), one_by_one(policy.model, e, how), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(e.ref_logprobs), one_by_one(bare, e, how), rtol=1e-4, atol=1e-4)
        assert len(e.values) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_copy_says_what_the_policy_says_in_less_memory(
    tiny_model: Path, prompts: list[PromptRow], text: TextSide, how: SamplingSettings, dtype: torch.dtype
) -> None:
    loaded = load_model(open_model(str(tiny_model)), text, "causal", lora=LoraConfig(), dtype=dtype)
    policy = PolicyModel(loaded.model, None).eval()
    reference: Any = load_reference(loaded, SimpleNamespace(dtype=dtype, device=CPU))  # type: ignore[arg-type]
    autocast = None if dtype == torch.float32 else dtype
    episodes = sample(policy, prompts, text, how)
    look_back(episodes, policy, reference, how, device=CPU, micro_batch_tokens=200, autocast=autocast)
    assert all(np.array_equal(e.logprobs, e.ref_logprobs) for e in episodes)
    layer, head = reference.model.model.layers[0], reference.model.get_output_embeddings()
    assert layer.mlp.gate_proj.weight.dtype == layer.self_attn.q_proj.weight.dtype == dtype
    assert layer.input_layernorm.weight.dtype == reference.model.get_input_embeddings().weight.dtype == torch.float32
    assert (head.weight is reference.model.get_input_embeddings().weight) == loaded.model.config.tie_word_embeddings
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)  # the policy moves on, its copy does not
    moved = copy.deepcopy(episodes)
    look_back(moved, policy, reference, how, device=CPU, micro_batch_tokens=200, autocast=autocast)
    assert all(np.array_equal(e.ref_logprobs, m.ref_logprobs) for e, m in zip(episodes, moved, strict=True))
    assert not any(np.array_equal(e.logprobs, m.logprobs) for e, m in zip(episodes, moved, strict=True))


# -- reference ---------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 60, 7, 7, 120, 31]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_reference_of_a_lora_policy_is_the_bare_base(policy: PolicyModel, bare: Any) -> None:
    before, trains = logits(policy.model), trainable(policy.model)
    assert trains
    with reference_weights(policy.model):
        assert torch.equal(logits(policy.model), logits(bare))
    assert not torch.allclose(before, logits(bare), atol=0.1)
    assert torch.equal(logits(policy.model), before)
    assert trainable(policy.model) == trains


def test_the_reference_of_a_policy_that_goes_on_from_sft_is_the_sft_adapter(
    tiny_model: Path, text: TextSide, bare: Any, tmp_path: Path
) -> None:
    start = load(tiny_model, text, LoraConfig(rank=4))
    make_adapter_speak(start, seed=7)
    start.save_pretrained(tmp_path / "sft")
    policy = load_model(
        open_model(str(tmp_path / "sft")), text, "causal", lora=LoraConfig(rank=4), dtype=torch.float32
    ).model.eval()
    policy.load_adapter(str(tmp_path / "sft"), "reference", is_trainable=False)
    policy.set_adapter("default")
    trains = trainable(policy)
    assert all(".default." in name for name in trains)
    torch.testing.assert_close(logits(policy), logits(start))
    make_adapter_speak(policy, seed=8)  # the policy moves on
    moved = logits(policy)
    assert not torch.allclose(moved, logits(start), atol=0.1)
    with reference_weights(policy):
        assert not any(".reference." in name for name in trainable(policy))
        torch.testing.assert_close(logits(policy), logits(start))
        assert not torch.allclose(logits(policy), logits(bare), atol=0.1)
    assert torch.equal(logits(policy), moved)
    assert policy.active_adapter == "default"
    assert trainable(policy) == trains


@pytest.fixture(params=["base", "adapter"])
def with_reference(request: pytest.FixtureRequest, policy: PolicyModel, tmp_path: Path) -> Mapping[str, Any]:
    if request.param == "adapter":
        policy.model.save_pretrained(tmp_path / "sft")
        policy.model.load_adapter(str(tmp_path / "sft"), "reference", is_trainable=False)
        policy.model.set_adapter("default")
        make_adapter_speak(policy.model, seed=9)
    return {"model": policy.model, "trains": trainable(policy.model)}


def test_the_policy_is_back_after_an_error(with_reference: Mapping[str, Any]) -> None:
    model, before = with_reference["model"], logits(with_reference["model"])

    def fail() -> None:
        with reference_weights(model):
            assert not torch.allclose(logits(model), before, atol=0.1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(logits(model), before)
    assert trainable(model) == with_reference["trains"]
