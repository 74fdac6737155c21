"""One optimiser step from any number of micro-batches, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhfkit.config.blocks import OptimConfig, Optimizer
from rlhfkit.errors import CheckpointError, ConfigError
from rlhfkit.words import mark

T = TypeVar("T")
# Steps in a row that fp16's loss scaler may skip. It halves its scale each time, from 2^16 to 2^-14 by then: gradients
# that are still not finite were not too large for the format, and no scale will ever do.
MOST_SKIPPED = 30


class SkippedError(Exception):
    """The loss scaler has skipped that many steps in a row; whoever counts the steps says which."""


class StepResult(NamedTuple):
    loss: float
    grad_norm: float
    fault: str = ""  # what was NaN or infinite, so that the step was not taken


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
        self.accelerator = accelerator
        self.config = config
        self._sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.name, optimizer = make_optimizer(module, config, accelerator.device, sharded=self._sharded)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        # Where each weight's gradient stays in one place. DDP and shards have places of their own for them.
        self._keeps_gradients = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        # Steps once per optimiser step, on every process: it is not handed to Accelerate, which would step it
        # as many times as there are processes.
        self.scheduler = make_schedule(optimizer, config, total_steps)
        self._skipped = 0  # steps in a row, up to now

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self, micro_batches: Sequence[T], loss_of: Callable[[T], Tensor], spare: T) -> StepResult:
        """Add up the micro-batches' gradients and take one step; none if the loss or the gradient is not finite.

        Args:
            micro_batches: this process's part of the global batch; may be empty.
            loss_of: loss of one micro-batch: a sum divided by the global count.
            spare: any micro-batch, run for nothing where this process has fewer than another.

        Returns:
            The loss summed over all processes, the norm of the whole gradient before clipping, and ``fault`` where one
            of them is no number: then weights, optimiser and schedule are as they were, and the caller stops the run.

        Raises:
            SkippedError: in fp16, one step too many whose gradient is not finite.
        """
        accelerator = self.accelerator
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._reserve()
        total = torch.zeros((), device=accelerator.device)
        passes = self.lockstep(micro_batches, spare)
        if not passes:  # a process with nothing to do still takes part in adding up the gradients
            passes = [(spare, 0.0)]
        with self._kept_casts():
            for i, (micro, weight) in enumerate(passes):
                last = i == len(passes) - 1
                if deepspeed:
                    accelerator.sync_gradients = last  # its engine clips and steps by itself, in the last backward pass
                with nullcontext() if last else accelerator.no_sync(self.module):
                    loss = weight * loss_of(micro)
                    total += loss.detach()
                    if deepspeed and last and not math.isfinite(found := self._sum(total)):
                        return StepResult(found, math.nan, fault=mark("the loss"))
                    # Processes' gradients are averaged; our losses are parts of one sum.
                    accelerator.backward(loss * accelerator.num_processes)
                    # What is left of its graph lies between the places of what it kept: the next pass would find holes.
                    del loss
        norm = self._clip()
        found = self._sum(total)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        fault = "" if math.isfinite(found) else mark("the loss")
        if not fault and not math.isfinite(grad_norm):
            # With a loss scaler (fp16) an infinite gradient is how it finds its limit: it skips the step by itself.
            if accelerator.scaler is None:
                fault = mark("the gradient")
            else:
                self._skipped += 1
        elif not fault:
            self._skipped = 0
        if not fault:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        if self._skipped == MOST_SKIPPED:
            raise SkippedError
        return StepResult(found, grad_norm, fault)

    def _sum(self, value: Tensor) -> float:
        """A number added up over all processes."""
        return float(self.accelerator.reduce(value, reduction="sum"))

    def pass_over(self, steps: int) -> None:
        """Move the learning rate on by steps of the schedule that are not taken."""
        for _ in range(steps):
            self.scheduler.step()

    def _reserve(self) -> None:
        """On a CPU, put the gradients and AdamW's states side by side before the first pass, for the whole run.

        glibc keeps what is freed (`runtime/allocator.py`). Made one by one amid activations, they leave holes between
        each other that no later activation fits in: a fifth of a run's memory (docs/performance.md).
        """
        if not self._keeps_gradients:
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    # A pass backward may add to it by itself; autograd would keep one of its own until the end.
                    p.grad = p.main_grad = torch.zeros_like(p)
        if self.name == "adamw" and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    self.optimizer.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }

    def _clip(self) -> Tensor:
        """Scale the gradient down to the limit; returns its norm before."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        limit = self.config.max_grad_norm or float("inf")
        if not self._keeps_gradients:
            norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
            return norm
        # The usual function multiplies by 1 where nothing is to be clipped, which takes as long as finding the norm.
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if norm > limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    @contextmanager
    def _kept_casts(self) -> Iterator[None]:
        """Inside, the 16-bit copies that autocast makes of the weights are made once, not in each pass.

        Autocast keeps them until its outermost context ends; the module enters a context of its own at each call.
        Sharded weights are not kept: a process holds only some at one time. Nor may a loss make a pass under
        ``no_grad``: the copies it leaves behind have no gradient.
        """
        if self._sharded:
            yield
            return
        with self.accelerator.autocast(), torch.autocast(self.accelerator.device.type, enabled=False):
            yield

    def lockstep(self, micro_batches: Sequence[T], spare: T) -> list[tuple[T, float]]:
        """Micro-batches with weight 1; where weights are sharded, filled up with ``spare`` of weight 0 until every
        process makes the same number of passes, since each pass gathers weights from all of them.
        """
        passes = [(micro, 1.0) for micro in micro_batches]
        if self._sharded:
            counts = self.accelerator.gather(torch.tensor([len(passes)], device=self.accelerator.device))
            passes += [(spare, 0.0)] * (int(counts.max()) - len(passes))
        return passes

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, each process holds all weights that FSDP2 shards, and passes need no other process: they may differ
        in number, and go through any part of the module. For passes without gradients; called by all processes.
        """
        units = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        if units:
            # Or the first part that is called would take itself for the root of all.
            self.module._get_fsdp_state()._lazy_init()
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                # PyTorch's choice for a root is to keep what its pass backward begins with.
                again = unit is not self.module and self.accelerator.state.fsdp_plugin.reshard_after_forward
                unit.set_reshard_after_forward(bool(again), recurse=False)

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), "optimizer": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (stored := state.get("optimizer", self.name)) != self.name:
            raise CheckpointError(
                f"the checkpoint holds the states of {stored}, and optim.optimizer is {self.name} on this device",
                hint=f"go on where {stored} runs, or start another run with --out",
            )
        self.scheduler.load_state_dict(state["scheduler"])


def make_optimizer(
    module: nn.Module, config: OptimConfig, device: torch.device, *, sharded: bool
) -> tuple[Optimizer, torch.optim.Optimizer]:
    """AdamW for what trains in a module, and which form of it was chosen."""
    trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    # Norms, biases and heads of one row are not decayed (Loshchilov & Hutter 2019, as is usual since GPT-2).
    matrices = {id(p) for _, p in trainable if p.ndim >= 2 and p.shape[0] > 1}
    groups = [
        {"params": [p for _, p in trainable if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for _, p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
    quantized = any(type(p).__name__ in ("Params4bit", "Int8Params") for p in module.parameters())
    name = choose_optimizer(config.optimizer, device, quantized=quantized, sharded=sharded)
    return name, _adamw(name, module, [g for g in groups if g["params"]], config.lr, device)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> Any:
    """The learning rate's course over so many steps."""
    from transformers import get_scheduler

    warmup = round(config.warmup_ratio * total_steps)
    return get_scheduler(_SCHEDULES[config.scheduler], optimizer, warmup, total_steps)


def choose_optimizer(wanted: Optimizer, device: torch.device, *, quantized: bool, sharded: bool) -> Optimizer:
    """The optimiser that is meant; ``auto`` is paged and in 8 bits where a quantised base says that memory is short.

    Raises:
        ConfigError: one that would not do here what its name says.
    """
    on_cuda = device.type == "cuda"
    if wanted == "auto":
        return "paged_adamw8bit" if quantized and on_cuda and not sharded else "adamw"
    if wanted != "adamw" and sharded:
        raise ConfigError(
            f"optim.optimizer: {wanted} keeps its states in blocks that FSDP and DeepSpeed cannot shard",
            hint="leave --optimizer out: sharding divides the states of adamw among the processes",
        )
    if wanted == "paged_adamw8bit" and not on_cuda:
        raise ConfigError(
            f"optim.optimizer: paging has no effect on a {device.type} device, whose memory has no other to move into",
            hint="the same states without it: --optimizer adamw8bit",
        )
    return wanted


def _adamw(
    name: Optimizer, module: nn.Module, groups: list[dict[str, Any]], lr: float, device: torch.device
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.999)}
    if name == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=device.type in ("cuda", "cpu"))
    import bitsandbytes

    # Embeddings keep states of 32 bits, as their rows' gradients differ too much for one scale (Dettmers et al. 2022).
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()  # what an earlier run in this process told it is about weights that are gone
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            manager.override_config(layer.weight, "optim_bits", 32)
    kind = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw8bit" else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
