"""Attention over packed lines of tokens, for any transformers model that takes its attention from the registry.

The tokens of a line are spread over rows, a plain causal attention runs over the rows, and the results are collected
again. Right padding under a causal mask needs no mask of its own: nobody sees what stands behind a row's end.
So the fastest kernel that PyTorch has for the device and number format applies (flash attention on CPU and CUDA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhfkit.data.packing import Layout
from rlhfkit.errors import ModelError

NAME = "rlhfkit_packed"
SCORES_AT_ONCE = 400_000  # of a pass backward in bf16 on a CPU: 1.6 MB of float32, which caches hold
QUERIES = 128  # at a time; see benchmarks/attention.py


def use_packed_attention(model: Any) -> bool:
    """Have a transformers model take packed lines, beside ordinary batches; returns whether it can.

    Args:
        model: a transformers model, not wrapped by peft.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not getattr(model, "_supports_attention_backend", False) or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def takes_packed(model: Any) -> bool:
    """Whether `use_packed_attention` was used on it."""
    return bool(model.config._attn_implementation == NAME)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. Without a ``layout`` the pass is an ordinary one and goes to its own function.

    Args:
        query: [1, heads, N, D].
        key, value: [1, key-value heads, N, D].
        layout: where the N tokens stand.
        sliding_window: how far back a token sees, itself included.

    Returns:
        [1, N, heads, D]

    Raises:
        ModelError: the model's attention has something that is not built here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    unknown = [name for name in ("softcap", "s_aux", "position_bias") if further.get(name) is not None]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    if layout is None and query.shape[2] == 1 and one_mask and dropout == 0.0 and not unknown:
        return _one_query(query, key, value, attention_mask, scaling), None
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, **further,
        )  # fmt: skip
    if unknown:
        raise ModelError(
            f"the attention of {type(module).__name__} uses {unknown[0]}, which packed rows do not know",
            hint="give --no-packing",
        )
    height, width = layout.rows.shape
    mask = None
    if sliding_window is not None and width > sliding_window:
        back = torch.arange(width, device=query.device)
        distance = back[:, None] - back[None, :]
        mask = (distance >= 0) & (distance < sliding_window)
    q, k, v = (_to_rows(states, layout) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is None and dropout == 0.0 and query.device.type == "cpu" and _narrow_with_gradient(q):
        out = _NarrowRows.apply(q, k, v, scale)
    else:
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    # [R, heads, L, D]
    cells = out.transpose(1, 2).reshape(height * width, -1)
    collected: Tensor = _Collect.apply(cells, layout)
    return collected.view(1, len(layout.cells), out.shape[1], out.shape[3]), None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """A decoding step: the query heads that share a key stand in the place of queries, so that nothing is repeated for
    each of them; transformers copies all keys and values where there is a mask.

    Args:
        query: [B, heads, 1, D].
        key, value: [B, key-value heads, L, D].
        mask: [B, 1, 1, L] or None.

    Returns:
        [B, 1, heads, D]
    """
    batch, heads, _, depth = query.shape
    groups = key.shape[1]
    stacked = query.reshape(batch, groups, heads // groups, depth)
    out = scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, out.shape[-1])


def _to_rows(states: Tensor, layout: Layout) -> Tensor:
    """[1, heads, N, D] to [R, heads, L, D]."""
    _, heads, tokens, width = states.shape
    flat = states.transpose(1, 2).reshape(tokens, heads * width)
    cells: Tensor = _Spread.apply(flat, layout)
    return cells.view(*layout.rows.shape, heads, width).transpose(1, 2)


def _narrow_with_gradient(query: Tensor) -> bool:
    """Where PyTorch's flash attention for CPUs takes several times as long in its backward pass as it should."""
    narrow = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return narrow and torch.is_grad_enabled()


class _NarrowRows(torch.autograd.Function):
    """Causal attention in bf16: PyTorch's kernel forward, batched matrix products backward.

    Dao 2022, appendix B.4, in blocks of queries with all the keys they see. Scores are float32 in both directions, as
    in the kernel.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        narrow = [states.to(torch.bfloat16) for states in (query, key, value)]
        share = query.shape[1] // key.shape[1]
        out, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            narrow[0], *(s.repeat_interleave(share, dim=1) for s in narrow[1:]), 0.0, True, scale=scale
        )
        ctx.save_for_backward(*narrow, out, log_z)
        ctx.scale, ctx.dtypes = scale, [states.dtype for states in (query, key, value)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_z = ctx.saved_tensors
        height, heads, width, depth = query.shape
        groups = key.shape[1]
        share = heads // groups
        found_q = torch.empty_like(query)
        found_k, found_v = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        grad = grad.to(query.dtype)
        correction = (grad.float() * out.float()).sum(dim=-1)  # [R, heads, L]
        step = max(1, SCORES_AT_ONCE // (heads * width * min(width, QUERIES)))
        for start in range(0, height, step):
            part = slice(start, start + step)
            n = len(query[part])
            k, v = (s[part].reshape(n * groups, width, depth) for s in (key, value))
            wide_k = k.float().transpose(1, 2)
            for first in range(0, width, QUERIES):
                end = min(first + QUERIES, width)
                block = (part, slice(None), slice(first, end))
                # The heads that share a key stand one under the other: [n * groups, share * queries, D]
                shape = (n * groups, share * (end - first), -1)
                q, g = (s[block].reshape(shape) for s in (query, grad))
                z, c = (s[block].reshape(shape) for s in (log_z, correction))
                p = torch.bmm(q.float(), wide_k[..., :end]).mul_(ctx.scale).sub_(z).exp_()
                # What a query must not see: keys after itself.
                p.view(n * groups, share, end - first, end).tril_(first)
                dp = torch.bmm(g, v[:, :end].transpose(1, 2)).float()
                ds = dp.sub_(c).mul_(p).mul_(ctx.scale).to(q.dtype)
                found_q[block] = torch.bmm(ds, k[:, :end]).view(n, heads, end - first, depth)
                seen = (part, slice(None), slice(end))
                found_k[seen] += torch.bmm(ds.transpose(1, 2), q).view(n, groups, end, depth)
                found_v[seen] += torch.bmm(p.to(g.dtype).transpose(1, 2), g).view(n, groups, end, depth)
        found = (found_q, found_k, found_v)
        return (*(f.to(dtype) for f, dtype in zip(found, ctx.dtypes, strict=True)), None)


class _Spread(torch.autograd.Function):
    """[N, C] tokens to [R * L, C] cells. The gradient of a token is the sum over its cells.

    Written out because the gradient of indexing adds up one row at a time, which on a CPU takes longer than attention.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return flat.index_select(0, layout.rows.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found = grad.index_select(0, ctx.layout.cells)
        for tokens, cells in ctx.layout.copies:
            found[tokens] += grad.index_select(0, cells)
        return found, None


class _Collect(torch.autograd.Function):
    """[R * L, C] cells to [N, C] tokens, each from its first cell."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.count = layout, len(cells)
        return cells.index_select(0, layout.cells)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found = grad.new_zeros(ctx.count, grad.shape[1])
        found[ctx.layout.cells] = grad
        return found, None
