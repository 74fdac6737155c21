"""The parts of a transformers model, with or without peft around it."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Task = Literal["causal", "reward"]


def base_model(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def backbone(model: Any) -> Any:
    """The stack of layers without any head: maps ids to hidden states."""
    inner = base_model(model)
    return getattr(inner, inner.base_model_prefix)


def vocabulary_layers(model: Any) -> list[str]:
    """The paths of the embedding and the head of a model's vocabulary, inside peft's wrapper if there is one."""
    inner = base_model(model)
    ours = [layer for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()) if layer is not None]
    return [name for name, module in model.named_modules() if any(module is layer for layer in ours)]


def disable_dropout(model: nn.Module) -> None:
    """Make passes in training mode compute what passes in eval mode do (which would end gradient checkpointing)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 -- not declared by nn.Module


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    total = trainable = 0
    for p in model.parameters():
        count = p.numel() * (2 if type(p).__name__ == "Params4bit" else 1)  # two weights in a byte
        total += count
        trainable += count if p.requires_grad else 0
    return trainable, total
