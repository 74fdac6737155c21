"""Writes a model that plain transformers or peft load, with what a score or an answer depends on beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rlhfkit import __version__
from rlhfkit.errors import ModelError
from rlhfkit.models.folder import RECORD
from rlhfkit.models.heads import stored_head
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.parts import base_model, vocabulary_layers
from rlhfkit.models.vocabulary import rows_of_adapter
from rlhfkit.repair.files import reason_to_copy


def save_model(
    folder: Path, accelerator: Accelerator, wrapped: nn.Module, loaded: LoadedModel, stage: str, record: dict[str, Any]
) -> None:
    """Weights, tokenizer with its chat template, and ``rlhfkit.json``. Called by all processes.

    Full weights are written in the number format the base came in; adapters and reward models in float32, in which
    they were trained: rounding the layers of a reward model moves its scores, and scores are compared.

    Args:
        folder: exists and is empty.
        accelerator: gathers what is sharded.
        wrapped: the prepared module around ``loaded.model``, which is its attribute ``model``.
        loaded: the model and its text side.
        stage: ``sft``, ``rm`` or ``ppo``.
        record: further facts for ``rlhfkit.json``.

    Raises:
        ModelError: a reward model was written without its head.
    """
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in accelerator.get_state_dict(wrapped).items() if k.startswith(prefix)}
    if not accelerator.is_main_process:
        return
    inner = base_model(loaded.model)
    dtype = inner.config.dtype
    use_cache, inner.config.use_cache = inner.config.use_cache, True
    if not loaded.is_lora:
        stored = torch.float32 if stage == "rm" else _stored_dtype(loaded)
        # Tied weights stay one tensor: cast once. Gathered from shards they come as several.
        for name, original in getattr(inner, "all_tied_weights_keys", {}).items():
            if name in state and original in state:
                state[name] = state[original]
        cast: dict[int, torch.Tensor] = {}
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = cast.setdefault(value.data_ptr(), value.to(stored))
    try:
        if loaded.is_lora:
            # PPO puts further adapters beside the one that was trained. Of a vocabulary that grew, peft would save
            # the base's embedding too, under names that it does not read.
            state = _readable_rows(state, loaded)
            loaded.model.save_pretrained(
                folder, state_dict=state, selected_adapters=["default"], save_embedding_layers=False
            )
        else:
            loaded.model.save_pretrained(folder, state_dict=state)
    finally:
        inner.config.use_cache, inner.config.dtype = use_cache, dtype
    if not loaded.is_lora:
        _tell_readers(folder / "config.json", stored)
    if stage == "rm" and stored_head(folder) is None:
        raise ModelError(
            f"the reward head was not written into {folder}: the model's scores would be random when it is loaded",
            hint="the versions installed save otherwise than those tested, which constraints.txt names",
        )
    tokenizer = loaded.text.tokenizer
    template = loaded.text.template
    tokenizer.chat_template = template.source
    tokenizer.save_pretrained(folder)
    if loaded.source.layout is not None and not loaded.is_lora:
        carry_code(Path(loaded.source.base), folder)
    if loaded.is_lora:
        inner.generation_config.save_pretrained(folder) if getattr(inner, "generation_config", None) else None
    facts = {
        "rlhfkit": __version__,
        "stage": stage,
        "family": loaded.text.family.name,
        "base": loaded.source.base,
        **({"layout": loaded.source.layout.name} if loaded.source.layout else {}),
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


def _readable_rows(state: dict[str, torch.Tensor], loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """An adapter's state whose embedding and head have the rows that peft gives the base when it loads them."""
    inner = base_model(loaded.model)
    rows = inner.get_input_embeddings().weight.shape[0]
    stored = int(loaded.source.config.get("vocab_size") or rows)
    wanted = rows_of_adapter(loaded.text.tokenizer, stored, rows)
    layers = tuple(f"{name}.modules_to_save." for name in vocabulary_layers(loaded.model))
    return {name: value[:wanted].clone() if name.startswith(layers) else value for name, value in state.items()}


def _tell_readers(path: Path, stored: torch.dtype) -> None:
    """Name the format that the weights are in: transformers writes that of the module, which trained in float32. And
    repeat the rotary base where readers before transformers 5 look: they would take 10000 without a word."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(stored).removeprefix("torch.")
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config.setdefault("rope_theta", theta)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def carry_code(original: Path, folder: Path) -> None:
    """What belongs to a checkpoint in its own layout beside its weights: vocabulary, code, terms. None of it is run."""
    for path in sorted(original.iterdir()):
        if path.is_file() and reason_to_copy(path.name) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _stored_dtype(loaded: LoadedModel) -> torch.dtype:
    name = str(loaded.source.config.get("dtype") or loaded.source.config.get("torch_dtype") or "float32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name.removeprefix("torch."), torch.float32)
