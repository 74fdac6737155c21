"""LoRA layers in three products and a sum.

peft casts a layer's input to float32 for the adapter, which autocast casts back: two copies of the activations for each
adapted layer, kept until the backward pass, and half of the time of a decoding step.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


def use_fast_lora(model: Any) -> None:
    """Give the adapted linear layers of a peft model a faster way to the same numbers."""
    from peft.tuners.lora.layer import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.forward = types.MethodType(_forward, module)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y = W x + b + s B A x (Hu et al. 2021) with the one active adapter; whatever is more goes peft's own way."""
    active = [name for name in self.active_adapters if name in self.lora_A]
    plain = not (args or kwargs or self.disable_adapters or self.merged) and len(active) == 1
    if not plain or not _is_plain(self, active[0]):
        found: Tensor = type(self).forward(self, x, *args, **kwargs)
        return found
    name = active[0]
    down, up = self.lora_A[name].weight, self.lora_B[name].weight
    out: Tensor = self.base_layer(x)
    # Without autocast the adapter has a number format of its own.
    inside = x if x.dtype == down.dtype or torch.is_autocast_enabled(x.device.type) else x.to(down.dtype)
    return out.add_(linear(linear(inside, down), up), alpha=self.scaling[name])


def _is_plain(layer: Any, name: str) -> bool:
    weights = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    return (
        not any(isinstance(weight, DTensor) for weight in weights)  # sharded: its own module gathers it
        and type(layer.lora_dropout[name]) is nn.Identity
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
    )
