"""LoRA layers in three products.

peft casts a layer's input to float32 for the adapter, which autocast casts back: two copies of the activations for each
adapted layer, kept until the backward pass, and half of the time of a decoding step.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

# Values of peft's ``init_lora_weights``. Other ways to start an adapter change the base's own weights, which its folder
# does not hold.
STARTS_BESIDE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def use_fast_lora(model: Any) -> None:
    """Give the adapted linear layers of a peft model a faster way to the same numbers."""
    for module in model.modules():
        if _is_adapted_linear(module):
            module.forward = types.MethodType(_forward, module)


class Adapter(NamedTuple):
    """What is added to a layer's result: s B A x (Hu et al. 2021)."""

    down: Tensor  # A, [rank, in]
    up: Tensor  # B, [out, rank]
    scale: float  # s


def one_plain_adapter(layer: Any) -> Adapter | None:
    """The adapter that a peft layer computes with now, if that is one and the sum above is all of it."""
    if not _is_adapted_linear(layer) or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or not _is_plain(layer, active[0]):
        return None
    return Adapter(layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight, layer.scaling[active[0]])


def _is_adapted_linear(module: Any) -> bool:
    from peft.tuners.lora.layer import Linear

    return type(module) is Linear and type(module.base_layer) is nn.Linear


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y = W x + b + s B A x with the one active adapter; whatever is more goes peft's own way."""
    found: Tensor
    adapter = None if args or kwargs else one_plain_adapter(self)
    if adapter is None:
        found = type(self).forward(self, x, *args, **kwargs)
        return found
    base, (down, up, scale) = self.base_layer, adapter
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else down.dtype
    # A base that has another forward is laid out alone for a few rows (`decoding`).
    frozen = type(base.weight) is nn.Parameter and not base.weight.requires_grad and "forward" not in vars(base)
    if frozen and (autocast or x.dtype == base.weight.dtype == dtype):
        found = AdaptedLinear.apply(x, base.weight, base.bias, down, up, scale, dtype)
        return found
    out: Tensor = base(x)
    # Without autocast the adapter has a number format of its own.
    inside = x if autocast or x.dtype == dtype else x.to(dtype)
    return out.add_(linear(linear(inside, down), up), alpha=scale)


class AdaptedLinear(torch.autograd.Function):
    """x W' + b + s (x A') B' of a frozen W. Sums are made in the place of one of their terms."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.formats, ctx.scale = (x.dtype, down.dtype, up.dtype), scale
        flat, weight, down, up = (t.to(dtype) for t in (x.flatten(0, -2), weight, down, up))
        with torch.autocast(x.device.type, enabled=False):
            out = linear(flat, weight, None if bias is None else bias.to(dtype))
            inside = linear(flat, down)
            out.addmm_(inside, up.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, inside)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, inside = ctx.saved_tensors
        of_x, of_down, of_up = ctx.formats
        wanted, scale = ctx.needs_input_grad, ctx.scale
        push = grad.flatten(0, -2).to(weight.dtype)
        narrow = push @ up
        grad_x = (push @ weight).addmm_(narrow, down, alpha=scale) if wanted[0] else None
        return (
            None if grad_x is None else grad_x.view(*grad.shape[:-1], -1).to(of_x),
            None,
            push.sum(dim=0) if wanted[2] else None,
            (narrow.t() @ flat).to(of_down).mul_(scale) if wanted[3] else None,
            # Of the two ways round, the one that CPU libraries multiply three times as fast.
            (inside.t() @ push).t().to(of_up).mul_(scale) if wanted[4] else None,
            None,
            None,
        )


def _is_plain(layer: Any, name: str) -> bool:
    weights = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    return (
        not any(isinstance(weight, DTensor) for weight in weights)  # sharded: its own module gathers it
        and type(layer.lora_dropout[name]) is nn.Identity
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
    )
