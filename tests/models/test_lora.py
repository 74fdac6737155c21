"""The short way through LoRA layers against peft's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.data.batch import TokenBatch, collate, token_row
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.lora import AdaptedLinear
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import LanguageModel


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    source = open_model(str(tiny_model))
    settings = LoraConfig(rank=4)
    model = load_model(source, load_text_side(source), "causal", lora=settings, dtype=torch.float32).model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # they begin as zeros, and whatever is wrong with A would not show
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def as_peft_has_it(model: Any) -> Any:
    plain = copy.deepcopy(model)
    changed = [m for m in plain.modules() if "forward" in vars(m) and hasattr(m, "lora_A")]
    assert len(changed) == sum(hasattr(m, "lora_A") for m in plain.modules()) > 0
    for module in changed:
        del module.forward
    return plain


def some_rows() -> TokenBatch:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (9, 14, 5)]
    return collate([token_row(ids, [True] * len(ids)) for ids in rows])


def outcome(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = LanguageModel(model)(some_rows()).logprobs
    found.sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_results_and_gradients_are_those_of_peft(adapted: Any) -> None:
    found, gradients = outcome(adapted)
    expected, expected_gradients = outcome(as_peft_has_it(adapted))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    assert all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


def test_gradients_are_the_functions() -> None:
    draw = torch.Generator().manual_seed(0)

    def table(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x, down, up = (t.requires_grad_() for t in (table(1, 5, 7), table(2, 7), table(6, 2)))
    weight, bias = table(6, 7), table(6)
    y = AdaptedLinear.apply(x, weight, bias, down, up, 0.7, torch.float64)
    torch.testing.assert_close(y, x @ weight.t() + bias + 0.7 * x @ down.t() @ up.t())
    assert torch.autograd.gradcheck(AdaptedLinear.apply, (x, weight, bias, down, up, 0.7, torch.float64))
    assert torch.autograd.gradcheck(AdaptedLinear.apply, (x, weight, None, down, up, 0.7, torch.float64))


def test_a_pass_without_gradients_gives_the_same_numbers(adapted: Any) -> None:
    """To the last bit: PPO compares the two."""
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, _ = outcome(adapted)
            with torch.no_grad():
                again = LanguageModel(adapted)(some_rows()).logprobs
        assert torch.equal(found, again)


def test_in_bf16_too(adapted: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = outcome(adapted)
        expected, expected_gradients = outcome(as_peft_has_it(adapted))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    for name, gradient in gradients.items():
        assert nn.functional.cosine_similarity(gradient.flatten(), expected_gradients[name].flatten(), dim=0) > 0.99


def test_what_is_not_plain_goes_the_way_of_peft(adapted: Any) -> None:
    for module in adapted.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    torch.manual_seed(0)
    first, _ = outcome(adapted.train())
    second, _ = outcome(adapted)
    assert (first - second).abs().max() > 1e-3
