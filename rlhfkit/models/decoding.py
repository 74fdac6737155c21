"""Linear layers for the few rows of a decoding step, on CPUs.

One token of 16 answers is a product of 16 rows. The library that PyTorch multiplies with reads the weights at a quarter
of what the memory gives then, unless they lie as its kernels walk through them; and a product with few columns (keys,
values, LoRA) takes as long to start as to compute. So layers that read the same input are laid out as one, with their
adapters' first matrices behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhfkit.models.lora import Adapter, one_plain_adapter

FEWEST_ROWS, MOST_ROWS = 8, 64  # fewer or more are multiplied as fast without
MOST_BYTES = 2 * 2**30  # of copies: they must not be what a run dies of
# Layers of one module that are given the same input, if it has all of them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


Laid = tuple[Any, nn.Linear, Adapter | None]  # what is called, its weights, what is added to its result


@contextmanager
def weights_laid_out(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, plain linear layers of a model on a CPU multiply by copies of their weights laid out for ``rows`` rows.

    So do those with one plain LoRA adapter, which stays beside its layer: a sum of both in 16 bits would lose most of
    what an adapter has learned at first. The copies are as large as the weights, in the format that is computed in;
    those of a large model are not made. For passes without gradients, while weights and the active adapter stay.
    """
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if not FEWEST_ROWS <= rows <= MOST_ROWS:
        yield
        return
    groups = _groups(model, autocast)
    size = sum(base.weight.numel() * (autocast or base.weight.dtype).itemsize for g in groups for _, base, _ in g)
    before: list[tuple[nn.Module, Any]] = []
    try:
        for group in groups if size <= MOST_BYTES else []:
            product = _Product([(base, adapter) for _, base, adapter in group], autocast, rows)
            for i, (layer, _, _) in enumerate(group):
                before.append((layer, vars(layer).get("forward")))
                layer.forward = product.part(i)
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _groups(model: nn.Module, autocast: torch.dtype | None) -> list[list[Laid]]:
    """The layers that can be laid out, those with the same input together."""
    groups: list[list[Laid]] = []
    # Matrices of adapters are part of their layer's product, or of one that is not computed now.
    matrices = (getattr(m, name) for m in model.modules() for name in ("lora_A", "lora_B") if hasattr(m, name))
    taken = {inner for m in matrices if isinstance(m, nn.Module) for inner in m.modules()}
    for module in model.modules():
        children = dict(module.named_children())
        families = [names for names in SIBLINGS if all(name in children for name in names)]
        for layers in [[children[n] for n in names] for names in families] + [[child] for child in children.values()]:
            found = [laid for layer in layers if layer not in taken and (laid := _laid(layer, autocast)) is not None]
            alike = {(base.weight.dtype, adapter and adapter.scale) for _, base, adapter in found}
            # What differs in more than the numbers is several products.
            groups += [found] if len(alike) == 1 else [[laid] for laid in found]
            for called, base, _ in found:
                taken |= {called, base}
    return groups


def _laid(layer: Any, autocast: torch.dtype | None) -> Laid | None:
    if type(layer) is nn.Linear and _is_plain(layer, autocast):
        return (layer, layer, None)
    adapter = one_plain_adapter(layer)
    if adapter is None or not _is_plain(base := layer.base_layer, autocast):
        return None
    # Without autocast an adapter computes in a format of its own, beside a base that is laid out alone.
    return (layer, base, adapter) if autocast or adapter.down.dtype == base.weight.dtype else None


class _Product:
    """Layers with the same input as one product.

    The first of them that is called computes all; the others take their columns, if they are given the same input.
    """

    def __init__(self, layers: list[tuple[nn.Linear, Adapter | None]], autocast: torch.dtype | None, rows: int) -> None:
        bases = [base for base, _ in layers]
        adapters = [adapter for _, adapter in layers if adapter is not None]
        self.dtype = autocast or bases[0].weight.dtype
        widths = [base.weight.shape[0] for base in bases]
        self.width = sum(widths)
        self.ends = torch.tensor(widths).cumsum(0).tolist()
        stacked = [base.weight.detach().to(self.dtype) for base in bases]
        stacked += [adapter.down.detach().to(self.dtype) for adapter in adapters]
        whole = torch.cat(stacked) if len(stacked) > 1 else stacked[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole, rows)
        self.bias = None
        if any(base.bias is not None for base in bases):
            self.bias = whole.new_zeros(len(whole))
            for base, end in zip(bases, self.ends, strict=True):
                if base.bias is not None:
                    self.bias[end - len(base.bias) : end] = base.bias.detach()
        self.up = torch.block_diag(*(a.up.detach().to(self.dtype).t() for a in adapters)) if adapters else None
        self.scale = adapters[0].scale if adapters else 1.0
        # The input, how often it had been changed in place, and what came of it.
        self.kept: tuple[Tensor, int, Tensor] | None = None

    def part(self, i: int) -> Callable[[Tensor], Tensor]:
        """What stands in the place of the forward method of the layer with this number."""
        start, last = self.ends[i - 1] if i else 0, i + 1 == len(self.ends)

        def forward(x: Tensor) -> Tensor:
            kept = self.kept
            if kept is None or kept[0] is not x or kept[1] != x._version:
                kept = (x, x._version, self._all(x))
            # The last one lets go: results for a line of prompts are large.
            self.kept = None if last else kept
            return kept[2][..., start : self.ends[i]]

        return forward

    def _all(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
        if self.up is not None:
            flat = found.view(-1, found.shape[-1])
            flat[:, : self.width].addmm_(flat[:, self.width :], self.up, alpha=self.scale)
        return found


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether this processor has the operators that torch.compile uses for frozen weights, in a number format."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    try:  # there is no other way to ask: formats depend on the processor, and on the library's version
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), FEWEST_ROWS)
    except RuntimeError:
        return False
    return True


def _is_plain(layer: Any, autocast: torch.dtype | None) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight, formats = layer.weight, (torch.float32, torch.bfloat16)
    held_here = weight.device.type == "cpu" and not isinstance(weight, DTensor) and weight.dtype in formats
    computed = autocast or weight.dtype
    return held_here and computed in formats and _has_kernels(computed)
