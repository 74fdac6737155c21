"""One optimiser step from any number of micro-batches, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rlhfkit.config.blocks import OptimConfig

T = TypeVar("T")


class StepResult(NamedTuple):
    loss: float
    grad_norm: float


class Optimisation:
    """Module, AdamW and schedule, wrapped by Accelerate.

    Losses given to `step` are sums already divided by the count of the *global* batch; how rows are cut into
    micro-batches or spread over processes then never changes the gradient.

    Args:
        accelerator: devices and processes.
        module: what trains; its ``forward`` makes the loss.
        config: learning rate and so on.
        total_steps: length of the schedule.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, config: OptimConfig, total_steps: int) -> None:
        from transformers import get_scheduler

        self.accelerator = accelerator
        self.config = config
        trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        # Norms, biases and heads of one row are not decayed (Loshchilov & Hutter 2019, as is usual since GPT-2).
        matrices = {id(p) for _, p in trainable if p.ndim >= 2 and p.shape[0] > 1}
        groups = [
            {"params": [p for _, p in trainable if id(p) in matrices], "weight_decay": config.weight_decay},
            {"params": [p for _, p in trainable if id(p) not in matrices], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=(0.9, 0.999),
            fused=accelerator.device.type == "cuda",
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        warmup = round(config.warmup_ratio * total_steps)
        # Steps once per optimiser step, on every process: it is not handed to Accelerate, which would step it
        # as many times as there are processes.
        self.scheduler = get_scheduler(_SCHEDULES[config.scheduler], optimizer, warmup, total_steps)
        self._sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self, micro_batches: Sequence[T], loss_of: Callable[[T], Tensor], spare: T) -> StepResult:
        """Add up the micro-batches' gradients and take one step.

        Args:
            micro_batches: this process's part of the global batch; may be empty.
            loss_of: loss of one micro-batch: a sum divided by the global count.
            spare: any micro-batch, run for nothing where this process has fewer than another.

        Returns:
            The loss summed over all processes, and the norm of the whole gradient before clipping.
        """
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        passes = self.lockstep(micro_batches, spare)
        if not passes:  # a process with nothing to do still takes part in adding up the gradients
            passes = [(spare, 0.0)]
        for i, (micro, weight) in enumerate(passes):
            last = i == len(passes) - 1
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                accelerator.sync_gradients = last  # its engine clips and steps by itself, in the last backward pass
            with nullcontext() if last else accelerator.no_sync(self.module):
                loss = weight * loss_of(micro)
                total += loss.detach()
                # Processes' gradients are averaged; our losses are parts of one sum.
                accelerator.backward(loss * accelerator.num_processes)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        limit = self.config.max_grad_norm or float("inf")
        norm = accelerator.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        return StepResult(float(accelerator.reduce(total, reduction="sum")), grad_norm)

    def lockstep(self, micro_batches: Sequence[T], spare: T) -> list[tuple[T, float]]:
        """Micro-batches with weight 1; where weights are sharded, filled up with ``spare`` of weight 0 until every
        process makes the same number of passes, since each pass gathers weights from all of them.
        """
        passes = [(micro, 1.0) for micro in micro_batches]
        if self._sharded:
            counts = self.accelerator.gather(torch.tensor([len(passes)], device=self.accelerator.device))
            passes += [(spare, 0.0)] * (int(counts.max()) - len(passes))
        return passes

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
