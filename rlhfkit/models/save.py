"""Writes a model that plain transformers or peft load, with what a score or an answer depends on beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rlhfkit import __version__
from rlhfkit.models.folder import RECORD
from rlhfkit.models.load import HEAD_NAMES, LoadedModel, base_model


def save_model(
    folder: Path, accelerator: Accelerator, wrapped: nn.Module, loaded: LoadedModel, stage: str, record: dict[str, Any]
) -> None:
    """Weights, tokenizer with its chat template, and ``rlhfkit.json``. Called by all processes.

    Full weights are written in the number format the base came in; adapters in float32.

    Args:
        folder: exists and is empty.
        accelerator: gathers what is sharded.
        wrapped: the prepared module around ``loaded.model``, which is its attribute ``model``.
        loaded: the model and its text side.
        stage: ``sft``, ``rm`` or ``ppo``.
        record: further facts for ``rlhfkit.json``.
    """
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in accelerator.get_state_dict(wrapped).items() if k.startswith(prefix)}
    if not accelerator.is_main_process:
        return
    inner = base_model(loaded.model)
    dtype = inner.config.dtype
    use_cache, inner.config.use_cache = inner.config.use_cache, True
    if not loaded.is_lora:
        stored = _stored_dtype(loaded)
        # Tied weights stay one tensor: cast once. A reward head stays float32, since scores are compared.
        cast: dict[int, torch.Tensor] = {}
        for name, value in state.items():
            if value.is_floating_point() and not name.startswith(HEAD_NAMES):
                state[name] = cast.setdefault(value.data_ptr(), value.to(stored))
        inner.config.dtype = stored
    try:
        loaded.model.save_pretrained(folder, state_dict=state)
    finally:
        inner.config.use_cache, inner.config.dtype = use_cache, dtype
    tokenizer = loaded.text.tokenizer
    template = loaded.text.template
    tokenizer.chat_template = template.source
    tokenizer.save_pretrained(folder)
    if loaded.is_lora:
        inner.generation_config.save_pretrained(folder) if getattr(inner, "generation_config", None) else None
    facts = {
        "rlhfkit": __version__,
        "stage": stage,
        "family": loaded.text.family.name,
        "base": loaded.source.base,
        "template": {
            "name": template.name,
            "source": template.source,
            "bodies": template.bodies,
            "controls": list(template.controls),
        },
        "vocab_rows": inner.get_input_embeddings().weight.shape[0],
        **record,
    }
    (folder / RECORD).write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _stored_dtype(loaded: LoadedModel) -> torch.dtype:
    name = str(loaded.source.config.get("dtype") or loaded.source.config.get("torch_dtype") or "float32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name.removeprefix("torch."), torch.float32)
