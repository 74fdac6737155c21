"""Linear layers of a decoding step against PyTorch's own."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.models import decoding, kernels
from rlhfkit.models.decoding import weights_laid_out
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 70, bias=False)).requires_grad_(False)


@pytest.mark.parametrize("rows", [8, 16, 64])
@pytest.mark.parametrize("computed", [1, 16, 100])
def test_products_are_those_of_the_layers(rows: int, computed: int) -> None:
    model = layers()
    x = torch.randn(computed, 40)
    expected = model(x)
    with weights_laid_out(model, rows):
        assert all("forward" in vars(layer) for layer in model)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[None]), expected[None])
    assert not any("forward" in vars(layer) for layer in model)
    assert torch.equal(model(x), expected)


def test_autocast_says_the_number_format() -> None:
    model = layers()
    x = torch.randn(16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with weights_laid_out(model, 16):
            found = model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "most"), [(7, 2**20), (65, 2**20), (16, 4 * (40 * 24 + 24 * 70) - 1)])
def test_nothing_is_copied_where_it_does_not_pay(rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_BYTES", most)
    model = layers()
    with weights_laid_out(model, rows):
        assert not any("forward" in vars(layer) for layer in model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processor_without_the_format_multiplies_as_ever(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN refuses to lay out formats that a processor has no instructions for."""

    def refuse(weight: Tensor, rows: int) -> Tensor:
        if weight.dtype == torch.float32:
            return plain(weight, rows)
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw")

    plain = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    decoding._has_kernels.cache_clear()
    model = layers()
    x = torch.randn(16, 40)
    with torch.autocast("cpu", dtype):
        expected = model(x)
        with weights_laid_out(model, 16):
            assert not any("forward" in vars(layer) for layer in model)
            assert torch.equal(model(x), expected)
    with weights_laid_out(model, 16):
        assert all("forward" in vars(layer) for layer in model)
    decoding._has_kernels.cache_clear()


def test_layers_with_a_way_of_their_own_keep_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(8, 8)
    expected = model(x)
    with weights_laid_out(model, 8):
        assert [("forward" in vars(layer)) for layer in model] == [False, True]
        torch.testing.assert_close(model(x), expected)


def test_layers_are_as_before_when_a_pass_fails() -> None:
    model = layers()
    with suppress(RuntimeError), weights_laid_out(model, 8):
        model(torch.randn(8, 41))
    assert not any("forward" in vars(layer) for layer in model)


class Projections(nn.Module):
    """Three layers that are siblings by name, and may be given different inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj, self.k_proj = nn.Linear(24, 32), nn.Linear(24, 8, bias=False)
        self.v_proj = nn.Linear(24, 8)
        self.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the products that are computed, as they are."""
    widths: list[int] = []
    plain = decoding._Product._all

    def counted(self: Any, x: Tensor) -> Tensor:
        found = plain(self, x)
        widths.append(found.shape[-1])
        return found

    monkeypatch.setattr(decoding._Product, "_all", counted)
    return widths


def test_layers_that_read_the_same_are_one_product(products: list[int]) -> None:
    model = Projections()
    x, y = torch.randn(16, 1, 24), torch.randn(16, 1, 24)
    expected, again = model(x, x, x), model(y, y, y)
    with weights_laid_out(model, 16):
        torch.testing.assert_close(model(x, x, x), expected)
        torch.testing.assert_close(model(y, y, y), again)
    assert products == [48, 48]


def test_siblings_may_be_given_different_inputs() -> None:
    model = Projections()
    x, y = torch.randn(16, 24), torch.randn(16, 24)
    expected, again = model(x, y, x), model(y, y, y)
    with weights_laid_out(model, 16):
        torch.testing.assert_close(model(x, y, x), expected)
        model.q_proj(x)
        x.copy_(y)  # the same tensor, and other numbers
        torch.testing.assert_close(model.k_proj(x), again[1])


def test_results_are_let_go_with_the_last_sibling() -> None:
    model = Projections()
    with weights_laid_out(model, 16):
        x = torch.randn(16, 24)
        model(x, x, x)
        kept = model.q_proj.forward.__closure__
        products = [cell.cell_contents for cell in kept if isinstance(cell.cell_contents, decoding._Product)]
        assert [product.kept for product in products] == [None]


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    source = open_model(str(tiny_model))
    settings = LoraConfig(rank=4)
    model = load_model(source, load_text_side(source), "causal", lora=settings, dtype=torch.float32).model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 19).view(16, 1)
    found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(("autocast", "off"), [(False, 1e-5), (True, 0.02)])
def test_adapters_are_part_of_the_product(adapted: Any, products: list[int], autocast: bool, off: float) -> None:
    with adapted.disable_adapter():
        bare = logits(adapted)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = logits(adapted)
        with weights_laid_out(adapted, 16):
            found = logits(adapted)
    assert ((found - expected).norm() / expected.norm()) < off < 0.1 * (bare - expected).norm() / expected.norm()
    layers, config = adapted.config.num_hidden_layers, adapted.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    wide = heads * config.hidden_size // config.num_attention_heads + 3 * 4
    assert products.count(wide) == layers
    assert len(products) == 4 * layers + 1  # and the head
    assert logits(adapted).isfinite().all()


def test_matrices_of_adapters_are_not_laid_out_by_themselves(adapted: Any) -> None:
    adapted.add_adapter("other", adapted.peft_config["default"])
    with weights_laid_out(adapted, 16):
        apart = [n for n, m in adapted.named_modules() if ".lora_" in n and "forward" in vars(m)]
        assert any("forward" in vars(m) for m in adapted.modules())
    assert apart == []


def test_an_adapter_that_is_switched_off_is_left_out(adapted: Any, products: list[int]) -> None:
    with_adapter = logits(adapted)
    with adapted.disable_adapter():
        expected = logits(adapted)
        assert (expected - with_adapter).abs().max() > 0.01
        with weights_laid_out(adapted, 16):
            torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    assert products


def test_layers_with_adapters_are_as_before(adapted: Any) -> None:
    before = {name: vars(m).get("forward") for name, m in adapted.named_modules()}
    with weights_laid_out(adapted, 16):
        assert before != {name: vars(m).get("forward") for name, m in adapted.named_modules()}
    assert before == {name: vars(m).get("forward") for name, m in adapted.named_modules()}


def test_a_laid_out_projection_is_used_behind_swiglu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(tiny_model))
    text = load_text_side(source)
    model = load_model(source, text, "causal", lora=LoraConfig(), dtype=torch.float32, kernels="fused").model.eval()
    expected = logits(model)
    monkeypatch.setattr(kernels.SwiGluDown, "apply", None)  # which reads the weight, wherever it lies
    with pytest.raises(TypeError):
        logits(model)
    with weights_laid_out(model, 16):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
