"""Backward pass of attention in bf16 on a CPU, PyTorch's and ours, over rows of several lengths.

python benchmarks/attention.py

Alternating, in processor time of one thread, so that other work on the machine matters little.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhfkit.models.attention import _NarrowRows

TOKENS, HEADS, GROUPS, DEPTH = 768, 9, 3, 64  # a micro-batch of SmolLM2-135M
ROUNDS = 5


def states(rows: int, cells: int, heads: int) -> Tensor:
    return torch.randn(rows, cells, heads, DEPTH).bfloat16().transpose(1, 2).requires_grad_()


def seconds_backward(out: Tensor, given: tuple[Tensor, ...], push: Tensor) -> float:
    started = time.process_time()
    torch.autograd.grad(out, given, push, retain_graph=True)
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    print("| rows | cells | PyTorch (ms) | rlhfkit (ms) | ratio |\n|---|---|---|---|---|")
    for cells in (64, 128, 224, 384, 768):
        rows = TOKENS // cells
        given = (states(rows, cells, HEADS), states(rows, cells, GROUPS), states(rows, cells, GROUPS))
        push = torch.randn(rows, HEADS, cells, DEPTH).bfloat16()
        theirs = scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
        ours = _NarrowRows.apply(*given, DEPTH**-0.5)
        taken = [(seconds_backward(theirs, given, push), seconds_backward(ours, given, push)) for _ in range(ROUNDS)]
        slow, fast = (1000 * min(column) for column in zip(*taken, strict=True))
        print(f"| {rows} | {cells} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} |", flush=True)


if __name__ == "__main__":
    main()
