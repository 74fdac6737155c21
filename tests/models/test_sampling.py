"""Drawing tokens and sampling answers, against loops that know no batch, no cache and no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhfkit.models.attention import takes_packed, use_packed_attention
from rlhfkit.models.sampling import Answer, SamplingSettings, draw, sample_answers

ROWS, VOCABULARY = 64, 40  # rows of the head; ids that are tokens


# -- drawing -----------------------------------------------------------------------------------------------------------


def drawing(temperature: float = 1.0, top_p: float = 1.0) -> SamplingSettings:
    return SamplingSettings(1, temperature, (), VOCABULARY, top_p=top_p)


def even_grid(count: int) -> Tensor:
    """Uniform numbers without noise: every token comes as often as its probability says, give or take one."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def counts(logits: Tensor, settings: SamplingSettings, count: int = 20_000) -> NDArray[np.int64]:
    tokens = draw(logits.expand(count, -1), even_grid(count), settings)
    return np.bincount(tokens.numpy(), minlength=len(logits))


def probabilities(logits: Tensor, temperature: float) -> NDArray[np.float64]:
    weights = np.exp(logits.double().numpy() / temperature)
    return np.asarray(weights / weights.sum())


def nucleus(p: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """The likeliest tokens, one at a time, until together they have ``top_p``."""
    kept = np.zeros_like(p)
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if kept.sum() >= top_p:
            break
        kept[token] = p[token]
    return np.asarray(kept / kept.sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    expected = probabilities(logits, temperature) * 20_000
    assert np.abs(counts(logits, drawing(temperature)) - expected).max() <= 1


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_those_of_the_nucleus(top_p: float, temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    expected = nucleus(probabilities(logits, temperature), top_p) * 20_000
    found = counts(logits, drawing(temperature, top_p))
    assert np.abs(found - expected).max() <= 1
    assert not found[expected == 0].any()
    assert 0 < (expected > 0).sum() < 12


def test_the_nucleus_is_the_smallest_set() -> None:
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125]).log()
    assert (counts(logits, drawing(top_p=0.5)) > 0).tolist() == [False, True, False, False]
    assert (counts(logits, drawing(top_p=0.51)) > 0).tolist() == [False, True, True, False]
    assert (counts(logits, drawing(top_p=0.01)) > 0).tolist() == [False, True, False, False]


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    for u in (0.0, 0.5, 0.999):
        assert draw(logits, torch.full((2,), u), drawing(0.0)).tolist() == [1, 0]


def test_every_row_has_its_own_number() -> None:
    logits = torch.zeros(3, 4)
    assert draw(logits, torch.tensor([0.9, 0.1, 0.6]), drawing()).tolist() == [3, 0, 2]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_impossible_tokens_do_not_come_at_the_ends_of_the_interval(top_p: float) -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), ends, drawing(top_p=top_p)).tolist() == [1, 3]


def test_logits_that_are_no_numbers_do_not_break_the_loop() -> None:
    """Whoever looks at the answer's probabilities can say which row it was."""
    for bad in (torch.nan, torch.inf):
        logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, -torch.inf]])
        broken, sound = draw(logits, torch.tensor([0.3, 0.99]), drawing()).tolist()
        assert broken in range(3)
        assert sound == 1


def test_a_large_vocabulary_is_summed_exactly() -> None:
    size = 150_000
    wanted = torch.tensor([0, 1, 777, 74_999, 149_998, 149_999])
    found = draw(torch.zeros(1, size).expand(len(wanted), -1), (wanted.double() + 0.5) / size, drawing())
    assert found.tolist() == wanted.tolist()


def test_rare_tokens_behind_likely_ones_can_be_drawn() -> None:
    """Added to one half in float32, a billionth is nothing, and such tokens would never come."""
    logits = torch.cat([torch.zeros(1), torch.full((1000,), 1e-9).log(), torch.zeros(1)])
    wanted = torch.tensor([1, 2, 500, 999, 1000])
    places = (1 + (wanted.double() - 0.5) * 1e-9) / (2 + 1e-6)
    assert draw(logits.expand(len(wanted), -1), places, drawing()).tolist() == wanted.tolist()


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["padded", "lines"])
def model(request: pytest.FixtureRequest) -> Any:
    """Untied, so that the head's rows beyond the vocabulary can be made the likeliest of all."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert request.param == "padded" or use_packed_attention(model)
    return model


PROMPTS = [[5, 9, 2, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [12, 30], [22, 22, 22, 22, 22, 22], [3, 17, 0]]
SEEDS = [(11, i) for i in range(len(PROMPTS))]
STOPS = (3, 8, 26)
PAD = 0  # also a real token, in the last prompt


def settings(
    temperature: float = 1.0, max_new_tokens: int = 16, stops: tuple[int, ...] = STOPS, top_p: float = 1.0
) -> SamplingSettings:
    return SamplingSettings(max_new_tokens, temperature, stops, VOCABULARY, top_p=top_p)


def answer_alone(model: Any, prompt: Sequence[int], how: SamplingSettings, seed: tuple[int, ...]) -> Answer:
    """One prompt, the whole sequence computed again for every token."""
    uniforms = np.random.default_rng(seed).random(how.max_new_tokens)
    ids = list(prompt)
    for u in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, : how.vocabulary]
        if how.temperature == 0:
            token = int(logits.argmax())
        else:
            p = probabilities(logits, how.temperature)
            p = nucleus(p, how.top_p) if how.top_p < 1 else p
            token = next(i for i in range(len(p)) if p[: i + 1].sum() > u)
        ids.append(token)
        if token in how.stop_ids:
            return Answer(ids[len(prompt) :], True)
    return Answer(ids[len(prompt) :], False)


@pytest.mark.parametrize(
    "how",
    [settings(), settings(0.6), settings(2.0), settings(0.9, top_p=0.8), settings(0.0)],
    ids=["plain", "cold", "hot", "nucleus", "greedy"],
)
def test_a_ragged_batch_equals_one_at_a_time(model: Any, how: SamplingSettings) -> None:
    found = sample_answers(model, PROMPTS, how, seeds=SEEDS, pad_id=PAD)
    assert found == [answer_alone(model, p, how, s) for p, s in zip(PROMPTS, SEEDS, strict=True)]


@pytest.mark.parametrize("lines", [False, True])
def test_positions_are_counted_from_the_first_real_token(lines: bool) -> None:
    """Rotary models see distances alone; one with a table of positions tells a padded prompt from a shifted one."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=ROWS, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()
    assert not lines or use_packed_attention(model)
    found = sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD)
    assert found == [answer_alone(model, p, settings(), s) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert len({len(a.ids) for a in found}) >= 3


def test_the_answers_above_end_at_different_times(model: Any) -> None:
    """Otherwise the tests around here would not see what happens when a row leaves the batch."""
    found = sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD)
    assert len({len(a.ids) for a in found}) >= 3
    assert {a.ended for a in found} == {True, False}


def test_greedy_answers_equal_those_of_transformers(model: Any) -> None:
    def generated(prompt: list[int]) -> list[int]:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=16, eos_token_id=list(STOPS), pad_token_id=PAD,
        )  # fmt: skip
        return [int(i) for i in out[0, len(prompt) :]]

    how = SamplingSettings(16, 0.0, STOPS, ROWS)
    found = sample_answers(model, PROMPTS, how, seeds=SEEDS, pad_id=PAD)
    assert [a.ids for a in found] == [generated(p) for p in PROMPTS]
    assert len({tuple(a.ids) for a in found}) >= 3  # not all the same rut


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_answer_does_not_depend_on_its_batch(model: Any, batch_size: int) -> None:
    together = sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD)
    order = [4, 0, 5, 2, 1, 3]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found = sample_answers(
            model, [PROMPTS[i] for i in part], settings(), seeds=[SEEDS[i] for i in part], pad_id=PAD
        )
        assert found == [together[i] for i in part]


SHARED = [[5, 9, 2, 31], [5, 9, 2], [5, 9, 2, 31], [5, 9, 2, 30, 4], [5, 9, 2, 31]]


def test_what_prompts_begin_with_is_read_once(model: Any) -> None:
    """Several answers of one prompt among prompts that begin alike, one of them being another's beginning."""
    read: list[int] = []

    def seen(module: Any, args: Any, kwargs: Any) -> None:
        read.append(kwargs["input_ids"].numel())

    hook = model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        found = sample_answers(model, SHARED, settings(), seeds=SEEDS[:5], pad_id=PAD)
    finally:
        hook.remove()
    assert found == [answer_alone(model, p, settings(), s) for p, s in zip(SHARED, SEEDS, strict=False)]
    assert len({len(a.ids) for a in found}) >= 3
    # [5, 9] once and [2, 31], [2], [2, 30, 4] behind it; or three rows of five cells.
    assert read[0] == (8 if takes_packed(model) else 15)


def test_seeds_make_the_difference(model: Any) -> None:
    same = sample_answers(model, [[5, 9]] * 3, settings(), seeds=[(1, 0), (1, 1), (1, 0)], pad_id=PAD)
    assert same[0] == same[2]
    assert same[0] != same[1]


def test_sampling_leaves_the_global_generator_alone(model: Any) -> None:
    state = torch.get_rng_state()
    sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_pad_is_masked(model: Any) -> None:
    answers = [sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=pad) for pad in (0, 13)]
    assert answers[0] == answers[1]


def test_padding_rows_of_the_head_are_never_drawn(model: Any) -> None:
    original = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight[VOCABULARY:] *= 50
            logits = model(torch.tensor([[5, 9]])).logits[0, -1]
            assert logits.argmax() >= VOCABULARY  # they would be, if they could
            for temperature in (0.0, 1.0, 5.0):
                found = sample_answers(model, PROMPTS, settings(temperature, stops=()), seeds=SEEDS, pad_id=PAD)
                assert max(i for a in found for i in a.ids) < VOCABULARY
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(original)


def test_finished_answers_leave_the_batch(model: Any) -> None:
    sizes: list[tuple[int, int]] = []

    def seen(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(tuple(kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        found = sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD)
    finally:
        hook.remove()
    lengths = [len(a.ids) for a in found]
    alive = [sum(n > step for n in lengths) for step in range(max(lengths))]
    first = (1, sum(map(len, PROMPTS))) if takes_packed(model) else (6, 9)
    assert sizes == [first, *((n, 1) for n in alive[1:])]
    assert alive[-1] < 6


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_an_answer_cut_at_the_limit_has_not_ended(model: Any, limit: int) -> None:
    long = sample_answers(model, PROMPTS, settings(stops=()), seeds=SEEDS, pad_id=PAD)
    assert [(len(a.ids), a.ended) for a in long] == [(16, False)] * 6
    cut = sample_answers(model, PROMPTS, settings(stops=(), max_new_tokens=limit), seeds=SEEDS, pad_id=PAD)
    assert cut == [Answer(a.ids[:limit], False) for a in long]


def test_an_answer_ends_with_the_first_stop_token(model: Any) -> None:
    long = sample_answers(model, PROMPTS, settings(stops=()), seeds=SEEDS, pad_id=PAD)
    stopped = sample_answers(model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD)
    for whole, answer in zip(long, stopped, strict=True):
        first = next((i for i, token in enumerate(whole.ids) if token in STOPS), None)
        assert answer == (Answer(whole.ids, False) if first is None else Answer(whole.ids[: first + 1], True))


def test_a_stop_as_the_last_allowed_token_has_ended(model: Any) -> None:
    long = sample_answers(model, [[5, 9]], settings(stops=(), max_new_tokens=4), seeds=[(0,)], pad_id=PAD)[0]
    assert long.ids.count(long.ids[3]) == 1
    how = settings(stops=(long.ids[3],), max_new_tokens=4)
    assert sample_answers(model, [[5, 9]], how, seeds=[(0,)], pad_id=PAD) == [Answer(long.ids, True)]


def test_tokens_are_told_as_they_come(model: Any) -> None:
    told: list[tuple[int, int]] = []
    found = sample_answers(
        model, PROMPTS, settings(), seeds=SEEDS, pad_id=PAD, on_token=lambda row, token: told.append((row, token))
    )
    assert [[token for row, token in told if row == i] for i in range(6)] == [a.ids for a in found]
    assert [row for row, _ in told[:6]] == [0, 1, 2, 3, 4, 5]


def test_autocast_sets_the_number_format(model: Any) -> None:
    formats = set()

    def seen(module: Any, args: Any, output: Any) -> None:
        formats.add(output.dtype)

    hook = model.lm_head.register_forward_hook(seen)
    try:
        for autocast in (None, torch.bfloat16):
            sample_answers(model, PROMPTS, settings(max_new_tokens=3), seeds=SEEDS, pad_id=PAD, autocast=autocast)
            assert formats == {autocast or torch.float32}
            formats.clear()
    finally:
        hook.remove()
