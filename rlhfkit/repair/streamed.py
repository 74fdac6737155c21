"""Models whose weights stay in their files: each layer reads its own when it computes, and lets go of them after.

So a forward pass of any model takes the memory of its largest tensor, in float32 whatever the files hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.models.adapters import active_adapter
from rlhfkit.models.heads import reward_head
from rlhfkit.models.parts import backbone, base_model
from rlhfkit.repair.folder import WeightSet
from rlhfkit.repair.tensors import load_tensor

# Stands for every parameter that is in a file. Not on the meta device, where peft would put its adapters as well.
_NOTHING = torch.zeros(())
Read = Callable[[str], Tensor]  # name of a parameter in the plain model -> its value in float32


class FileWeights:
    """Reads the tensors of a model folder, one at a time.

    Args:
        folder: where they are.
        weights: which files and tensors there are.
        tied: name of a tensor that is not in the files -> the one it is tied to.
        rows: least number of rows of the tensors named, for a vocabulary that has grown since.
    """

    def __init__(
        self,
        folder: Path,
        weights: WeightSet,
        *,
        tied: Mapping[str, str] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.folder, self.weights = folder, weights
        self.tied, self.rows = dict(tied or {}), dict(rows or {})

    def __contains__(self, name: str) -> bool:
        return name in self.weights.tensors or self.tied.get(name) in self.weights.tensors

    def stored(self, name: str) -> str:
        """Name under which a tensor is in the files."""
        return name if name in self.weights.tensors else self.tied[name]

    def read(self, name: str) -> Tensor:
        """A tensor in float32; missing rows of the vocabulary are the mean of those there."""
        stored = self.stored(name)
        value = load_tensor(self.folder, stored, self.weights.tensors[stored])
        value = value.float() if value.is_floating_point() else value
        missing = self.rows.get(name, 0) - value.shape[0] if value.dim() else 0
        if missing > 0:
            mean = value.double().mean(dim=0, keepdim=True).float()
            value = torch.cat([value, mean.expand(missing, *value.shape[1:])])
        return value


def empty(build: Callable[[], Any]) -> Any:
    """A model without data: its parameters have shapes alone, its buffers are computed."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(_NOTHING.expand(parameter.shape), requires_grad=False)
    return model.eval()


def is_empty(tensor: Tensor) -> bool:
    """Whether a parameter has no data of its own."""
    return tensor.untyped_storage().data_ptr() == _NOTHING.untyped_storage().data_ptr()


def plain_name(name: str) -> str:
    """Name of a parameter in the plain model, from its name in a peft model around it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def stream(model: nn.Module, weights: FileWeights, device: torch.device, read: Read | None = None) -> None:
    """Have every layer without data read it before its forward pass and drop it afterwards.

    Args:
        model: made by `empty`, with adapters in it or not.
        weights: where its tensors are; one that is not there stays without data.
        device: where it computes.
        read: reads in place of ``weights``.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model._apply(lambda tensor: tensor if is_empty(tensor) else tensor.to(device))
    covered: set[int] = set()
    for path, module in model.named_modules():
        # An adapter reads the weight of the layer it wraps in its own ways: both get it together.
        whole = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        places = [
            (owner, name, plain_name(f"{path}.{inner}.{name}" if inner else f"{path}.{name}"))
            for inner, owner in module.named_modules()
            if (whole or owner is module) and id(owner) not in covered
            for name, parameter in owner.named_parameters(recurse=False)
            if is_empty(parameter)
        ]
        places = [place for place in places if place[2] in weights]
        if whole:
            covered |= {id(owner) for owner in module.modules()}
        if places:
            _hook(module, places, read or weights.read, device)


def _hook(module: nn.Module, places: list[tuple[nn.Module, str, str]], read: Read, device: torch.device) -> None:
    nothing = [owner._parameters[name] for owner, name, _ in places]

    def fetch(module: nn.Module, arguments: Any) -> None:
        for owner, name, stored in places:
            owner._parameters[name] = nn.Parameter(read(stored).to(device), requires_grad=False)

    def drop(module: nn.Module, arguments: Any, result: Any) -> None:
        for (owner, name, _), parameter in zip(places, nothing, strict=True):
            owner._parameters[name] = parameter

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)


@torch.no_grad()
def outputs(model: Any, ids: Tensor, mask: Tensor, *, scores: bool, bare: bool = False) -> Tensor:
    """What a model says at every real position [N, ...]: logits, or the scores of a reward model.

    Args:
        model: transformers or peft.
        ids: text [B, T].
        mask: 1 where a token is text.
        scores: whether it is a reward model.
        bare: without its adapter; a reward head is part of it, but there is nothing to compare without one.
    """
    inner = base_model(model).eval()
    with active_adapter(model, None) if bare else nullcontext():
        if not scores:
            logits: Tensor = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits[mask.bool()].float().cpu()
        hidden = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    found: Tensor = reward_head(model)(hidden[mask.bool()])
    return found.float().cpu()
