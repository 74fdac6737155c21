"""Layers with their gradients written out, against autograd on the plain formulas."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhfkit.errors import ConfigError
from rlhfkit.models import kernels
from rlhfkit.models.attention import _NarrowRows
from rlhfkit.models.kernels import (
    EmbeddingRows,
    RmsNorm,
    SwiGlu,
    SwiGluDown,
    chosen_kernels,
    refuse_kernels,
    use_fast_layers,
)

CPU = torch.device("cpu")


def test_rms_norm_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    y = RmsNorm.apply(x.float(), weight.float(), 1e-6, torch.float32)
    expected = weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    push = torch.randn_like(expected)
    found = torch.autograd.grad((y * push).sum(), (x, weight))
    for mine, theirs in zip(found, torch.autograd.grad((expected * push).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    norm = LlamaRMSNorm(16)
    torch.testing.assert_close(RmsNorm.apply(x.float(), norm.weight, 1e-6, torch.float32), norm(x.float()))


def test_swiglu_is_silu_times_up() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(7, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SwiGlu.apply, (gate, up))
    torch.testing.assert_close(SwiGlu.apply(gate, up), silu(gate) * up)


def test_swiglu_with_its_projection_is_the_three_in_turn() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(1, 7, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGluDown.apply, (gate, up, weight))
    assert torch.autograd.gradcheck(SwiGluDown.apply, (gate, up, weight.detach()))
    torch.testing.assert_close(SwiGluDown.apply(gate, up, weight), (silu(gate) * up) @ weight.t())


@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_rows_have_the_gradient_of_the_whole_table(padding: int | None) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, padding_idx=padding)
    ids, push = torch.tensor([[3, 1, 3], [8, 0, 1]]), torch.randn(2, 3, 4)
    (table(ids) * push).sum().backward()
    weight = table.weight.detach().clone().requires_grad_()
    rows = EmbeddingRows.apply(ids, weight, padding)
    torch.testing.assert_close(rows, table(ids))
    (rows * push).sum().backward()
    torch.testing.assert_close(weight.grad, table.weight.grad)
    # With a place for it, it is added there, and autograd is given none.
    weight.grad, weight.main_grad = None, torch.ones(9, 4)
    for _ in range(2):
        (EmbeddingRows.apply(ids, weight, padding) * push).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + 2 * table.weight.grad)
    EmbeddingRows.apply(ids, weight.detach(), padding)  # frozen


@pytest.mark.parametrize(
    ("rows", "cells", "heads", "groups"), [(3, 17, 4, 2), (1, 40, 6, 6), (70, 50, 8, 1), (2, 600, 4, 2)]
)
def test_narrow_rows_have_the_gradients_of_exact_attention(rows: int, cells: int, heads: int, groups: int) -> None:
    torch.manual_seed(0)

    def states(n: int) -> Tensor:
        return torch.randn(rows, cells, n, 16).bfloat16().transpose(1, 2).requires_grad_()

    given = states(heads), states(groups), states(groups)
    exact = [s.detach().float().requires_grad_() for s in given]
    push = torch.randn(rows, heads, cells, 16).bfloat16()
    out = _NarrowRows.apply(*given, 0.3)
    expected = scaled_dot_product_attention(*exact, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.backward(push)
    expected.backward(push.float())
    for mine, theirs in zip(given, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        error = (mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.01, f"relative error {error}"


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_with_fast_layers_is_the_same_model(tiny_model: Path, autocast: bool) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    fast = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    use_fast_layers(fast, CPU)
    changed = [name for name, module in fast.named_modules() if "forward" in vars(module)]
    assert len(changed) == 2 * 3 + 1  # two norms and one SwiGLU a layer, and the embedding
    ids = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < (0.02 if autocast else 1e-5), f"relative error {error}"


def test_plain_kernels_are_those_of_transformers(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    use_fast_layers(model, CPU, "plain")
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A liger-kernel that knows llama alone; the list fills with how it was called."""
    calls: list[dict[str, Any]] = []
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    patches._apply_liger_kernel_to_instance = lambda **given: calls.append(given)  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    return calls


def test_liger_is_taken_on_cuda_for_what_it_knows_and_never_for_the_loss(liger: list[dict[str, Any]]) -> None:
    llama = SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    stranger = SimpleNamespace(config=SimpleNamespace(model_type="baichuan"))
    assert "liger-kernel" in use_fast_layers(llama, torch.device("cuda"))
    assert liger == [{"model": llama, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert use_fast_layers(stranger, torch.device("cuda")) == ""
    assert use_fast_layers(llama, torch.device("cuda"), "plain") == ""
    assert len(liger) == 1


def test_liger_is_refused_where_it_cannot_work(liger: list[dict[str, Any]]) -> None:
    refuse_kernels("liger", torch.device("cuda"), "llama")
    refuse_kernels("auto", CPU, "baichuan")
    with pytest.raises(ConfigError, match="on CUDA, and this run is on cpu"):
        refuse_kernels("liger", CPU, "llama")
    with pytest.raises(ConfigError, match="nothing for model_type 'baichuan'"):
        refuse_kernels("liger", torch.device("cuda"), "baichuan")


def test_auto_is_one_of_the_others(liger: list[dict[str, Any]]) -> None:
    cuda = torch.device("cuda")
    assert [chosen_kernels("auto", torch.device(kind), "llama") for kind in ("cpu", "mps")] == ["fused", "plain"]
    assert [chosen_kernels("auto", cuda, name) for name in ("llama", "baichuan")] == ["liger", "plain"]
    assert chosen_kernels("plain", cuda, "llama") == "plain"
    refuse_kernels("fused", CPU, "llama")
    with pytest.raises(ConfigError, match="fused layers compute on CPUs, and this run is on cuda"):
        refuse_kernels("fused", cuda, "llama")
