"""Linear layers of a decoding step against PyTorch's own."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from rlhfkit.models import decoding
from rlhfkit.models.decoding import weights_laid_out


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
