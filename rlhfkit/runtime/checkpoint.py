"""Checkpoints that are complete or absent, never half.

Everything is written into a hidden folder beside and renamed into place; a folder called ``step-N`` is therefore whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import RNG_STATE_NAME, DistributedType, load
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhfkit.errors import CheckpointError

STATE = "state.json"
PARTIAL = ".partial-"


def checkpoint_folders(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit() and (p / STATE).is_file()]
    return sorted(folders, key=lambda p: int(p.name[5:]))


def save_checkpoint(
    accelerator: Accelerator,
    out: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Write everything that resuming needs; delete all but the ``keep`` newest.

    Args:
        accelerator: its prepared models, optimisers and random states are saved.
        out: run folder.
        step: last finished step.
        state: what else is needed, as JSON.
        keep: how many checkpoints stay.
        write: puts the files of models, optimisers and random states into a folder, where Accelerate does not hold
            them.

    Raises:
        CheckpointError: the disk is full or refuses; older checkpoints are untouched.
    """
    folder = out / "checkpoints" / f"step-{step}"
    partial = folder.with_name(f"{PARTIAL}step-{step}")
    if (folder / STATE).is_file():
        return folder  # of this very step: to take it away for one like it would leave none for a moment
    if accelerator.is_main_process:
        _sweep(out)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        write(partial) if write else _save_state(accelerator, partial)
        if accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            _sync(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own word for a full disk
        reason = f"the disk is full: {error}" if shutil.disk_usage(out).free < 2**20 else str(error)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        older = checkpoint_folders(out)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {folder.parent}: {reason}",
            hint=f"{older[-1].name} is intact; make room and go on with --resume"
            if older
            else "make room and start again",
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in checkpoint_folders(out)[:-keep]:
            # Renamed first: a deletion that is interrupted leaves no folder that looks whole.
            doomed = old.with_name(f"{PARTIAL}{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(
    accelerator: Accelerator, folder: Path, read: Callable[[Path], None] | None = None
) -> dict[str, Any]:
    """Put models, optimisers and random states back, or have ``read`` do it; returns the JSON state.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if accelerator.is_main_process:
        _sweep(folder.parent.parent)
    with readable(folder):
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if read is None and state["world"] == accelerator.num_processes:
            # Accelerate goes on without these where it cannot read them. (Further processes have none to read.)
            load(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
        read(folder) if read else _load_state(accelerator, folder)
    return state


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Inside, whatever goes wrong is a fault of a checkpoint's files.

    Raises:
        CheckpointError: it did.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be read: {type(error).__name__}: {error}",
            hint="delete this folder to go on from the checkpoint before it",
        ) from error


class RandomStates(NamedTuple):
    """Of the generators that a checkpoint holds."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]


def random_states() -> RandomStates:
    """As they are now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return RandomStates(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def restore_random_states(states: RandomStates) -> None:
    """Put them back."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    if states.cuda:
        torch.cuda.set_rng_state_all(states.cuda)


def save_only_what_trains(accelerator: Accelerator) -> None:
    """Have ``save_state`` leave frozen weights out: a LoRA checkpoint holds adapters, not a copy of its base.

    DeepSpeed writes its own format and is left alone; FSDP2 has no part in ``save_state``, see `_save_state`.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return

    def before_saving(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights.clear()
        save_trained(accelerator, models, Path(folder))

    def before_loading(models: list[nn.Module], folder: str) -> None:
        load_trained(accelerator, models, Path(folder))
        models.clear()

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_load_state_pre_hook(before_loading)


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    """The files of one process, whatever the weights are spread over: any number of processes can go on from them.

    Accelerate would write FSDP2's shards, which only FSDP2 reads.
    """
    if not accelerator.is_fsdp2:
        accelerator.save_state(str(folder))
        return
    save_trained(accelerator, accelerator._models, folder)
    optimizers = [_WholeOptimizer(o) for o in accelerator._optimizers]
    save_accelerator_state(
        str(folder), [], optimizers, [], [], accelerator.process_index, accelerator.step, accelerator.scaler
    )


def _load_state(accelerator: Accelerator, folder: Path) -> None:
    if not accelerator.is_fsdp2:
        accelerator.load_state(str(folder))
        return
    load_trained(accelerator, accelerator._models, folder)
    optimizers = [_WholeOptimizer(o) for o in accelerator._optimizers]
    load_accelerator_state(str(folder), [], optimizers, [], [], accelerator.process_index, accelerator.scaler)


def save_trained(accelerator: Accelerator, models: list[nn.Module], folder: Path) -> None:
    """Write the weights that train, each once."""
    for i, model in enumerate(models):
        # All processes take part in putting a weight together.
        kept = {k: _whole(v.detach()).contiguous() for k, v in _trainable(accelerator.unwrap_model(model)).items()}
        if accelerator.is_main_process:
            save_file(kept, folder / f"trained-{i}.safetensors")


def load_trained(accelerator: Accelerator, models: list[nn.Module], folder: Path) -> None:
    """Put them back.

    Raises:
        CheckpointError: they are not those of these models.
    """
    for i, model in enumerate(models):
        stored = load_file(folder / f"trained-{i}.safetensors")
        wanted = _trainable(accelerator.unwrap_model(model))
        if set(stored) != set(wanted):
            raise CheckpointError("the checkpoint holds other weights than this configuration trains")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(_spread_like(parameter, stored[name]))


class _WholeOptimizer:
    """An optimiser of sharded weights, saved and loaded as if they were whole."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_dict()
        whole = {i: {k: _whole(v) for k, v in values.items()} for i, values in state["state"].items()}
        return {**state, "state": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        spread = {
            i: {k: _spread_like(parameters[i], v) if v.shape == parameters[i].shape else v for k, v in values.items()}
            for i, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": spread})


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, cut up as the parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    # named_parameters() names a tied tensor once, so tied heads are neither stored twice nor refused by safetensors.
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _sweep(out: Path) -> None:
    """Remove what a killed run was writing or deleting."""
    for left in (out / "checkpoints").glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the file system keep what was written, so that a power cut cannot leave a renamed folder of empty files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
