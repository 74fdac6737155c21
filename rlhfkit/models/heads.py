"""The scalar head of a reward model: found, read exactly as it was written, or begun."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.errors import ModelError
from rlhfkit.models.folder import ModelSource
from rlhfkit.models.parts import base_model

HEAD_NAMES = ("score", "classifier")  # transformers' names for the head of a sequence classifier


def reward_head(model: Any) -> nn.Module:
    """The scalar head of a sequence classifier."""
    inner = base_model(model)
    return next(getattr(inner, name) for name in HEAD_NAMES if hasattr(inner, name))


def stored_head(folder: str | Path) -> Tensor | None:
    """The weight of the reward head in a folder's safetensors files, plain or adapter; None if there is none."""
    from safetensors import safe_open

    names = [f"{name}.weight" for name in HEAD_NAMES]
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 -- the file's own list, not a mapping
                if key.removeprefix("base_model.model.") in names:
                    return weights.get_tensor(key)
    return None


def adapter_holds_head(source: ModelSource) -> bool:
    """Whether there is an adapter with a reward head in its files."""
    return source.adapter is not None and stored_head(source.adapter) is not None


def start_head(model: Any, source: ModelSource, fresh_head: bool) -> None:
    """Begin a head, where one may be new.

    Raises:
        ModelError: it may not.
    """
    if not fresh_head:
        raise no_head(source)
    # Small and dependent on width, as in Stiennon et al. 2020: first scores are near 0, first losses near ln 2.
    for module in reward_head(model).modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features + 1))


def exact_head(model: Any, source: ModelSource) -> None:
    """Hold the head in float32, as its file does: scores are compared, and bf16 keeps three digits of them.

    Raises:
        ModelError: the head is not that of the file, or not of numbers.
    """
    head: Any = reward_head(model).float()
    # With adapters peft holds the base's head and, beside it, the one that was trained.
    active = head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
    weight: Tensor = active.weight
    stored = stored_head(source.adapter or source.base)
    if stored is not None:
        if stored.shape != weight.shape:
            raise ModelError(
                f"the reward head of {source.path} has the shape {tuple(stored.shape)}, its model needs "
                f"{tuple(weight.shape)}",
                hint="the folder mixes files of two models; restore it from the original",
            )
        with torch.no_grad():
            weight.copy_(stored)
    if not bool(weight.isfinite().all()):
        raise ModelError(
            f"the reward head of {source.path} holds values that are no numbers (NaN or infinite)",
            hint=f"train it again: rlhfkit rm --model {source.base}",
        )


def no_head(source: ModelSource) -> ModelError:
    """The error of a model without a head."""
    return ModelError(
        f"{source.path} has no reward head (score.weight): its scores would be random",
        hint=f"train one with: rlhfkit rm --model {source.path}",
    )
