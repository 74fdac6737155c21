"""Checkpoints that are complete or absent, never half.

Everything is written into a hidden folder beside and renamed into place; a folder called ``step-N`` is therefore whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import nn

from rlhfkit.errors import CheckpointError

STATE = "state.json"
PARTIAL = ".partial-"


def checkpoint_folders(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit() and (p / STATE).is_file()]
    return sorted(folders, key=lambda p: int(p.name[5:]))


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write everything that resuming needs; delete all but the ``keep`` newest.

    Args:
        accelerator: its prepared models, optimisers and random states are saved.
        out: run folder.
        step: last finished step.
        state: what else is needed, as JSON.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or refuses; older checkpoints are untouched.
    """
    folder = out / "checkpoints" / f"step-{step}"
    partial = folder.with_name(f"{PARTIAL}step-{step}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            _sync(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own word for a full disk
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        older = checkpoint_folders(out)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {folder.parent}: {error}",
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


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Put models, optimisers and random states back; returns the JSON state.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        accelerator.load_state(str(folder))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be read: {type(error).__name__}: {error}",
            hint="delete this folder to go on from the checkpoint before it",
        ) from error
    return state


def save_only_what_trains(accelerator: Accelerator) -> None:
    """Have ``save_state`` leave frozen weights out: a LoRA checkpoint holds adapters, not a copy of its base.

    Sharded set-ups (FSDP, DeepSpeed) write their own format and are left alone.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return

    def before_saving(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        from safetensors.torch import save_file

        while weights:
            weights.pop()
        if accelerator.is_main_process:
            for i, model in enumerate(models):
                kept = _trainable(accelerator.unwrap_model(model))
                save_file(
                    {k: v.detach().contiguous() for k, v in kept.items()}, Path(folder) / f"trained-{i}.safetensors"
                )

    def before_loading(models: list[nn.Module], folder: str) -> None:
        from safetensors.torch import load_file

        for i in reversed(range(len(models))):
            stored = load_file(Path(folder) / f"trained-{i}.safetensors")
            wanted = _trainable(accelerator.unwrap_model(models.pop()))
            if set(stored) != set(wanted):
                raise CheckpointError("the checkpoint holds other weights than this configuration trains")
            with torch.no_grad():
                for name, parameter in wanted.items():
                    parameter.copy_(stored[name])

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_load_state_pre_hook(before_loading)


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    # named_parameters() names a tied tensor once, so tied heads are neither stored twice nor refused by safetensors.
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _sync(folder: Path) -> None:
    """Have the file system keep what was written, so that a power cut cannot leave a renamed folder of empty files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
