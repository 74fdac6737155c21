"""One optimiser step from several micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import SftConfig
from rlhfkit.data.batch import TokenBatch, collate, token_row
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import LanguageModel
from rlhfkit.runtime.optim import Optimisation, StepResult
from rlhfkit.runtime.run import Run
from rlhfkit.runtime.start import start_run


class CountCasts(TorchDispatchMode):
    """How often a matrix of a certain shape is cast to bf16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].shape == self.shape
        return func(*args, **kwargs)


def begun(model: Path, settings: Callable[..., dict[str, Any]], sft_file: Path, **further: Any) -> Run:
    return start_run(load_config(SftConfig, flags=settings("run", data__train=[str(sft_file)], **further)))


def update_of(run: Run, folder: Path, *, gradient_checkpointing: bool = False) -> Optimisation:
    """An optimisation of a model of its own, in training mode."""
    source = open_model(str(folder))
    loaded = load_model(
        source, load_text_side(source), "causal", lora=LoraConfig(), dtype=torch.float32,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    update = Optimisation(run.accelerator, LanguageModel(loaded.model), run.config.optim, 3)
    update.module.train()
    return update


def batches() -> list[TokenBatch]:
    draw = np.random.default_rng(0)
    return [collate([token_row(draw.integers(3, 300, n).tolist(), [True] * n)]) for n in (9, 30, 14)]


def one_step(update: Optimisation) -> StepResult:
    return update.step(batches(), lambda micro: -update.module(micro).logprobs.sum() / 50, batches()[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_cast_once_a_step_and_nothing_else_changes(
    tiny_model: Path, settings: Callable[..., dict[str, Any]], sft_file: Path, checkpointing: bool
) -> None:
    run = begun(tiny_model, settings, sft_file, model__precision="bf16")
    found: list[tuple[int, dict[str, Tensor]]] = []
    for kept in (True, False):
        update = update_of(run, tiny_model, gradient_checkpointing=checkpointing)
        update._sharded = not kept  # sharded weights are cast anew in each pass
        gate = update.module.model.model.layers[0].mlp.gate_proj.weight
        with CountCasts(gate.shape) as casts:
            one_step(update)
        found.append((casts.count, {n: p.detach() for n, p in update.module.named_parameters()}))
    (once, mine), (often, theirs) = found
    assert once == 2 * 2  # gate_proj and up_proj of two layers
    assert often >= 3 * once
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("limit", [0.0, 1e9, 0.01])
def test_gradients_and_states_stay_in_one_place_and_nothing_else_changes(
    tiny_model: Path, settings: Callable[..., dict[str, Any]], sft_file: Path, limit: float
) -> None:
    run = begun(tiny_model, settings, sft_file, optim__max_grad_norm=limit)
    mine, theirs = update_of(run, tiny_model), update_of(run, tiny_model)
    theirs._keeps_gradients = False  # as with several processes
    parameters = list(mine.module.parameters())

    def places() -> list[int]:
        states = [mine.optimizer.state[p] for p in parameters]
        return [t.data_ptr() for p, s in zip(parameters, states, strict=True) for t in (p.grad, *s.values())]

    steps: list[list[int]] = []
    for _ in range(3):
        found, expected = one_step(mine), one_step(theirs)
        assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
        steps.append(places())
        assert all(not p.grad.any() for p in parameters)
    assert steps[0] == steps[1] == steps[2]
    for p, q in zip(parameters, theirs.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_gradients_and_states_are_there_before_the_first_pass(
    tiny_model: Path, settings: Callable[..., dict[str, Any]], sft_file: Path
) -> None:
    update = update_of(begun(tiny_model, settings, sft_file), tiny_model)
    seen: list[bool] = []

    def loss_of(micro: TokenBatch) -> Tensor:
        seen.append(all(p.grad is p.main_grad and p in update.optimizer.state for p in update.module.parameters()))
        return -update.module(micro).logprobs.sum() / 50

    update.step(batches(), loss_of, batches()[0])
    assert seen == [True] * 3


class Part:
    """Of a graph; what refers to it weakly does not hold it."""


class Traced(torch.autograd.Function):
    """The same number, with a part of the graph that can be followed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: list[weakref.ref[Part]]) -> Tensor:
        ctx.part = Part()
        parts.append(weakref.ref(ctx.part))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_nothing_of_a_pass_is_left_when_the_next_begins(
    tiny_model: Path, settings: Callable[..., dict[str, Any]], sft_file: Path
) -> None:
    """The nodes of a graph are small and lie between its activations, where those of the next pass should go."""
    update = update_of(begun(tiny_model, settings, sft_file), tiny_model)
    parts: list[weakref.ref[Part]] = []
    left: list[int] = []

    def loss_of(micro: TokenBatch) -> Tensor:
        left.append(sum(part() is not None for part in parts))
        return Traced.apply(-update.module(micro).logprobs.sum() / 50, parts)

    update.step(batches(), loss_of, batches()[0])
    assert len(parts) == 3
    assert left == [0, 0, 0]


@pytest.mark.parametrize("spoiled", [0, 2])
def test_a_step_without_a_number_changes_nothing(
    tiny_model: Path, settings: Callable[..., dict[str, Any]], sft_file: Path, spoiled: int
) -> None:
    """Neither weights nor the optimiser's states nor the schedule: what follows is as if it had not been."""
    run = begun(tiny_model, settings, sft_file)
    update, clean = update_of(run, tiny_model), update_of(run, tiny_model)

    def loss_of(micro: TokenBatch) -> Tensor:
        loss: Tensor = -update.module(micro).logprobs.sum() / 50
        return loss * torch.inf if len(micro.tokens.input_ids) == (9, 30, 14)[spoiled] else loss

    one_step(update), one_step(clean)
    before, lr = {n: p.clone() for n, p in update.module.named_parameters()}, update.lr
    result = update.step(batches(), loss_of, batches()[0])
    assert result.fault == "the loss"
    assert all(torch.equal(p, before[n]) for n, p in update.module.named_parameters())
    assert update.lr == lr
    assert one_step(update) == one_step(clean)
