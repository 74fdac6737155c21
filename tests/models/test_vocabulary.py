"""Growing a vocabulary: by how much, what new rows hold, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
)

from rlhfkit.models.vocabulary import forbid_padding_rows, grow_vocabulary, rows_for, token_count

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = torch.tensor([[3, 99, 17, 0]])


def tiny(*, tied: bool = True, rows: int = 100) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, initializer_range=0.2, **SIZES)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(PROMPT).logits
    return found


@pytest.mark.parametrize(("tokens", "rows"), [(101, 128), (128, 128), (129, 192), (1000, 1024)])
@pytest.mark.parametrize("tied", [True, False])
def test_up_to_a_multiple_of_64(tied: bool, tokens: int, rows: int) -> None:
    model = tiny(tied=tied)
    told = grow_vocabulary(model, tokens)
    assert told == (
        f"vocabulary grown from 100 to {rows} rows for {tokens} tokens; new rows start as the mean of the old ones"
    )
    assert model.get_input_embeddings().weight.shape == (rows, 16)
    assert model.get_output_embeddings().weight.shape == (rows, 16)
    assert (model.config.vocab_size, model.lm_head.out_features) == (rows, rows)
    assert model.get_input_embeddings().num_embeddings == rows


@pytest.mark.parametrize("tokens", [1, 99, 100])
def test_never_down_and_never_for_the_multiple_alone(tokens: int) -> None:
    model = tiny()
    before = model.get_input_embeddings().weight
    assert grow_vocabulary(model, tokens) == ""
    assert model.get_input_embeddings().weight is before
    assert model.config.vocab_size == 100


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_rows_stay(tied: bool) -> None:
    model = tiny(tied=tied)
    old_embedding = model.get_input_embeddings().weight.detach().clone()
    old_head = model.get_output_embeddings().weight.detach().clone()
    grow_vocabulary(model, 110)
    for old, layer in ((old_embedding, model.get_input_embeddings()), (old_head, model.get_output_embeddings())):
        torch.testing.assert_close(layer.weight[:100], old, rtol=0, atol=0)
        torch.testing.assert_close(layer.weight[100:], old.mean(dim=0).expand(28, -1))
    assert torch.equal(old_embedding, old_head) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied_and_untied_untied(tied: bool) -> None:
    model = tiny(tied=tied)
    grow_vocabulary(model, 110)
    model.tie_weights()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_old_tokens_are_unchanged(tied: bool) -> None:
    model = tiny(tied=tied)
    before = logits(model)
    grow_vocabulary(model, 110)
    after = logits(model)
    torch.testing.assert_close(after[..., :100], before)
    # A mean row gives the mean logit: a new token takes no more of the probability than an average one.
    torch.testing.assert_close(after[..., 100:], before.mean(dim=-1, keepdim=True).expand(-1, -1, 28))


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_model_survives_its_folder(tied: bool, tmp_path: Path) -> None:
    model = tiny(tied=tied)
    grow_vocabulary(model, 110)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.vocab_size == 128
    assert torch.equal(logits(again), logits(model))
    assert grow_vocabulary(again, 110) == ""


def test_a_bias_of_the_head_grows_with_it() -> None:
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(vocab_size=100, initializer_range=0.2, bos_token_id=None, eos_token_id=None, **SIZES)
    )
    model.eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    before = logits(model)
    grow_vocabulary(model, 110)
    assert model.lm_head.bias.shape == (128,)
    after = logits(model)
    torch.testing.assert_close(after[..., :100], before)
    torch.testing.assert_close(after[..., 100:], before.mean(dim=-1, keepdim=True).expand(-1, -1, 28))


def test_a_model_without_a_vocabulary_head_grows_its_embedding() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=100, num_labels=1, pad_token_id=0, **SIZES))
    head = model.score.weight.detach().clone()
    old = model.get_input_embeddings().weight.detach().clone()
    assert grow_vocabulary(model, 101)
    torch.testing.assert_close(model.get_input_embeddings().weight[100:], old.mean(dim=0).expand(28, -1))
    assert torch.equal(model.score.weight, head)
    assert model.config.vocab_size == 128


def test_new_rows_of_a_bf16_model_are_the_mean_rounded_once() -> None:
    model = tiny().bfloat16()
    old = model.get_input_embeddings().weight.detach().clone()
    grow_vocabulary(model, 110)
    weight = model.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[100:], old.float().mean(dim=0).bfloat16().expand(28, -1))


# -- ids and rows ------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, *ids: int) -> None:
        self._vocabulary = {f"word {i}": i for i in ids}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def test_ids_with_gaps_count_up_to_the_highest() -> None:
    assert token_count(Words(0, 1, 2)) == 3
    assert token_count(Words(0, 1, 7)) == 8
    assert token_count(Words()) == 0


def test_rows_are_padded_to_64_when_they_grow_and_never_taken_away() -> None:
    assert [rows_for(tokens, 100) for tokens in (5, 100, 101, 129)] == [100, 100, 128, 192]


def test_plain_transformers_do_not_draw_padding_rows_either() -> None:
    model = tiny(tied=False)
    with torch.no_grad():
        model.lm_head.weight[90:] = 50 * model.lm_head.weight.mean(dim=0).sign()  # likely, one way or the other
        model.lm_head.weight[95:] *= -1
    kept = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(PROMPT, **kept)[0, 4:].max() >= 90
    told = forbid_padding_rows(model.generation_config, 90, 100, stored_rows=100)
    assert told.startswith("ids 90 to 99 are padding rows")
    assert model.generate(PROMPT, **kept)[0, 4:].max() < 90


def test_what_else_was_suppressed_stays_and_what_became_a_token_does_not() -> None:
    config = GenerationConfig(suppress_tokens=[3])
    assert forbid_padding_rows(config, 98, 100, stored_rows=100) == (
        "ids 98 to 99 are padding rows of the head, no tokens: they are never drawn when sampling"
    )
    assert config.suppress_tokens == [3, 98, 99]
    # A template brought three tokens: two of them in rows that stood empty, one in a new row.
    forbid_padding_rows(config, 101, 104, stored_rows=100)
    assert config.suppress_tokens == [3, 101, 102, 103]
    assert forbid_padding_rows(config, 104, 104, stored_rows=104) == ""
    assert config.suppress_tokens == [3]
    config = GenerationConfig()
    assert forbid_padding_rows(config, 100, 100, stored_rows=100) == ""
    assert config.suppress_tokens is None
