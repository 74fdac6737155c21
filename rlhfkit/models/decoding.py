"""Linear layers for the few rows of a decoding step, on CPUs.

One token of 16 answers is a product of 16 rows. The library that PyTorch multiplies with reads the weights at a quarter
of what the memory gives then, unless they lie as its kernels walk through them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FEWEST_ROWS, MOST_ROWS = 8, 64  # fewer or more are multiplied as fast without
MOST_BYTES = 2 * 2**30  # of copies: they must not be what a run dies of


@contextmanager
def weights_laid_out(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, plain linear layers of a model on a CPU multiply by copies of their weights laid out for ``rows`` rows.

    The copies are as large as the weights, in the format that is computed in; those of a large model are not made. For
    passes without gradients, and weights that nobody changes meanwhile.
    """
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and _is_plain(m)]
    size = sum(layer.weight.numel() * (autocast or layer.weight.dtype).itemsize for layer in layers)
    if not FEWEST_ROWS <= rows <= MOST_ROWS or size > MOST_BYTES or not _has_kernels():
        yield
        return
    try:
        for layer in layers:
            dtype = autocast or layer.weight.dtype
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), rows)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            layer.forward = types.MethodType(_forward(packed, bias, dtype), layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _has_kernels() -> bool:
    # The operators that torch.compile uses for frozen weights.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _is_plain(layer: nn.Linear) -> bool:
    weight, formats = layer.weight, (torch.float32, torch.bfloat16)
    held_here = weight.device.type == "cpu" and not isinstance(weight, DTensor)
    return held_here and weight.dtype in formats and "forward" not in vars(layer)


def _forward(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")
        return found

    return forward
