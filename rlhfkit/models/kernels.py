"""Layers computed in fewer passes over memory than written: on a CPU here, on CUDA by liger-kernel where installed.

Under autocast, transformers' RMSNorm gives float32, which each linear layer behind it casts and keeps for itself; its
own intermediate results are kept too. The forms here keep the input alone and give the format that is wanted.
"""

from __future__ import annotations

import types
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from rlhfkit.config.blocks import Kernels
from rlhfkit.errors import ConfigError


def chosen_kernels(kernels: Kernels, device: torch.device, model_type: str) -> Kernels:
    """What ``auto`` is for a model on a device."""
    if kernels != "auto":
        return kernels
    if device.type == "cuda":
        return "liger" if _liger_knows(model_type) else "plain"
    return "fused" if device.type == "cpu" else "plain"


def refuse_kernels(kernels: Kernels, device: torch.device, model_type: str) -> None:
    """Say before anything is read that kernels are wanted where they cannot work.

    Raises:
        ConfigError: they are not for this device, or liger-kernel does not know the architecture.
    """
    if kernels == "fused" and device.type != "cpu":
        raise ConfigError(
            f"optim.kernels: fused layers compute on CPUs, and this run is on {device.type}",
            hint="give --kernels auto: it is the fastest there is on every device",
        )
    if kernels != "liger":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"optim.kernels: liger-kernel computes on CUDA, and this run is on {device.type}",
            hint="leave --kernels out: auto is the fastest there is on every device",
        )
    if not _liger_knows(model_type):
        raise ConfigError(
            f"optim.kernels: the liger-kernel that is installed has nothing for model_type '{model_type}'",
            hint="leave --kernels out, or: pip install -U liger-kernel",
        )


def use_fast_layers(model: Any, device: torch.device, kernels: Kernels = "auto") -> str:
    """Give a transformers model's RMS norms, SwiGLU layers and embeddings a faster way to the same numbers.

    The last norm keeps its own on a CPU: what heads read stays in float32.

    Returns:
        A sentence if a library was taken for it, else nothing.
    """
    if kernels == "plain":
        return ""
    if device.type == "cuda":
        return _use_liger(model)
    if device.type != "cpu":
        return ""
    last = getattr(getattr(model, model.base_model_prefix, model), "norm", None)
    for module in model.modules():
        if module is not last and _is_rms_norm(module):
            module.forward = types.MethodType(_rms_norm_forward, module)
        elif _is_swiglu(module):
            module.forward = types.MethodType(_swiglu_forward, module)
        elif _is_plain_embedding(module):
            module.forward = types.MethodType(_embedding_forward, module)
    return ""


def _liger_knows(model_type: str) -> bool:
    if find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def _use_liger(model: Any) -> str:
    if not _liger_knows(model.config.model_type):
        return ""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    # The loss is computed by rlhfkit itself, for supervised tokens alone.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return "liger-kernel computes norms, rotary positions and SwiGLU"


def _is_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    named = type(module).__name__.endswith("RMSNorm")
    return named and hasattr(module, "variance_epsilon") and set(parameters) == {"weight"}


def _is_swiglu(module: nn.Module) -> bool:
    children = dict(module.named_children())
    parts = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return set(children) == parts and type(children["act_fn"]).__name__ in ("SiLU", "SiLUActivation")


def _is_plain_embedding(module: nn.Module) -> bool:
    if type(module) is not nn.Embedding:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    kind = hidden_states.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
    found: Tensor = RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, wanted)
    return found


def _swiglu_forward(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if type(down) is nn.Linear and down.bias is None and "forward" not in vars(down):
        found: Tensor = SwiGluDown.apply(gate, up, down.weight)
        return found
    return down(SwiGlu.apply(gate, up))  # with an adapter, in four bits, or laid out for a few rows (`decoding`)


def _embedding_forward(self: Any, input: Tensor) -> Tensor:
    found: Tensor = EmbeddingRows.apply(input, self.weight, self.padding_idx)
    return found


class EmbeddingRows(torch.autograd.Function):
    """Rows of a table. Where the table has a ``main_grad``, their gradients are added in there: one of the whole table,
    nearly all zeros, is neither made nor added.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (ids,) = ctx.saved_tensors
        weight, ids = ctx.weight, ids.flatten()
        rows = grad.reshape(len(ids), -1)
        if ctx.padding is not None:  # its row stays as it is
            rows = rows.masked_fill((ids == ctx.padding)[:, None], 0.0)
        main_grad = getattr(weight, "main_grad", None)
        whole = torch.zeros_like(weight) if main_grad is None else main_grad
        whole.index_add_(0, ids, rows.to(whole.dtype))
        return None, whole if main_grad is None else None, None


class RmsNorm(torch.autograd.Function):
    """y = w x / rms(x) (Zhang & Sennrich 2019), in float32 whatever comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, out: torch.dtype) -> Tensor:
        wide = x.float()
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1] + epsilon).rsqrt_()
        y = torch.empty_like(wide, dtype=out)
        if weight.dtype == torch.float32:
            torch.mul(wide * scale, weight, out=y)
        else:  # as transformers rounds: a frozen 16-bit model keeps giving its numbers
            y.copy_((wide * scale).to(x.dtype) * weight)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        grad_x = grad_weight = None
        wide = grad.float()
        if ctx.needs_input_grad[1]:
            grad_weight = (wide * normal).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = wide * weight
            mean = (scaled * normal).mean(dim=-1, keepdim=True)
            grad_x = scaled.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020), keeping its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class SwiGluDown(torch.autograd.Function):
    """SwiGLU and the projection behind it, computing their product again in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        grad = grad.to(gate.dtype)
        active = silu(gate)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            product = (active * up).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).t() @ product).to(weight.dtype)
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return None, None, grad_weight
        pushed = grad @ weight.to(grad.dtype)
        return torch.ops.aten.silu_backward(pushed * up, gate), active.mul_(pushed), grad_weight
