"""Several LoRA adapters on one base: switched without copies, and without a say in what trains.

peft's own switches (``set_adapter``, ``disable_adapter``) also turn gradients on and off, for one adapter at a time. A
policy and a value function that both train on one base need a switch that leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rlhfkit.errors import ModelError
from rlhfkit.models.folder import ModelSource
from rlhfkit.models.heads import HEAD_NAMES
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.lora import STARTS_BESIDE_THE_BASE
from rlhfkit.models.parts import base_model

POLICY, REFERENCE, REWARD, VALUE = "default", "reference", "reward", "value"


@contextmanager
def active_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Inside, a peft model computes with the adapter of this name, or as its bare base (None)."""
    layers = _switches(model)
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = _in_force(layer, name)
    try:
        yield
    finally:
        for layer, adapter, disabled in before:
            layer._active_adapter, layer._disable_adapters = adapter, disabled


def _in_force(layer: Any, name: str) -> list[str]:
    """What a layer computes with under an adapter of this name; with nothing it is the base's own."""
    own = getattr(layer, "modules_to_save", None)
    if own is None or name in own:
        return [name]
    # A trained copy of an embedding belongs to one adapter; a value function goes beside the policy's.
    return [POLICY] if name == VALUE and POLICY in own else []


def current_adapter(model: Any) -> str | None:
    """The adapter that a peft model computes with now."""
    for layer in _switches(model):
        if not hasattr(layer, "modules_to_save"):
            return None if layer._disable_adapters else str(layer.active_adapters[0])
    return None


def checkpoint_contexts(model: Any) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """For gradient checkpointing: what is computed again in the backward pass uses the adapter of the forward pass.

    The ``context_fn`` of `torch.utils.checkpoint.checkpoint`.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), active_adapter(model, current_adapter(model))

    return contexts


def fits_on(loaded: LoadedModel, source: ModelSource) -> bool:
    """Whether a reward model is a LoRA adapter and a head on the very base that a LoRA policy holds already."""
    if not loaded.is_lora or source.adapter is None or source.base != loaded.source.base:
        return False
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(source.adapter)
    trained_beside = set(settings.modules_to_save or ())
    return (
        settings.peft_type == "LORA"
        and settings.init_lora_weights in STARTS_BESIDE_THE_BASE
        and not getattr(loaded.model.peft_config[POLICY], "trainable_token_indices", None)
        and trained_beside <= set(HEAD_NAMES)
        and getattr(settings, "bias", "none") == "none"
        and not getattr(settings, "trainable_token_indices", None)
    )


def add_frozen_adapter(model: Any, folder: str, name: str) -> None:
    """Put the LoRA weights of an adapter folder beside those that a peft model has; its head stays behind.

    Raises:
        ModelError: the folder's weights are not those that its configuration describes.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    add_frozen_shape(model, folder, name)
    weights = {k: v for k, v in load_peft_weights(folder).items() if ".lora_" in k}
    set_peft_model_state_dict(model, weights, adapter_name=name)
    # A reward model has no head of the vocabulary: an adapter that has one beside it there has no weights for it.
    beside = _of_vocabulary_head(model)
    own = [
        key
        for key, p in model.named_parameters()
        if f".{name}." in f"{key}." and ".lora_" in key and id(p) not in beside
    ]
    if len(own) != len(weights):
        raise ModelError(
            f"the adapter in {folder} holds {len(weights)} LoRA weights where its configuration asks for {len(own)}",
            hint="restore the folder, or train it again",
        )


def add_frozen_shape(model: Any, folder: str, name: str) -> None:
    """Put LoRA layers of an adapter folder's settings beside those that a peft model has, without its weights."""
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    settings.modules_to_save = None
    settings.task_type = model.peft_config[POLICY].task_type
    settings.inference_mode = True
    trains = _trainable(model)
    model.add_adapter(name, settings)
    _restore(model, trains)


def add_value_adapter(model: Any, start: str) -> None:
    """A trainable adapter for a value function, starting as the adapter ``start``."""
    import copy

    trains = _trainable(model)
    settings = copy.deepcopy(model.peft_config[start])
    # It shares the policy's embedding and head, whatever of these trains with it, and starts from the weights below.
    settings.modules_to_save = settings.modules_to_tie = None
    settings.ensure_weight_tying = False
    settings.init_lora_weights = True
    settings.inference_mode = False
    model.add_adapter(VALUE, settings)
    parameters = dict(model.named_parameters())
    # A value is read before the head: what would train there never gets a gradient, for which DDP waits.
    idle = _of_vocabulary_head(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{VALUE}." in f"{name}." and ".lora_" in name:
                parameter.copy_(parameters[f"{name}.".replace(f".{VALUE}.", f".{start}.").removesuffix(".")])
                if id(parameter) not in idle:
                    trains.add(name)
    _restore(model, trains)


def _of_vocabulary_head(model: Any) -> set[int]:
    """The ids of the parameters in the layer that gives logits."""
    head = base_model(model).get_output_embeddings()
    return set(map(id, head.parameters())) if head is not None else set()


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _restore(model: Any, trains: set[str]) -> None:
    model.set_adapter(POLICY)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trains)


def _switches(model: Any) -> list[Any]:
    """The layers of all kinds in which peft looks up the active adapter."""
    modules = base_model(model).modules()
    return [m for m in modules if hasattr(m, "_active_adapter") and hasattr(m, "_disable_adapters")]
