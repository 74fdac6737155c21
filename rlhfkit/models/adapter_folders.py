"""LoRA adapters as peft's folders hold them: begun, read, and put beside each other on one base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.errors import ConfigError, ModelError
from rlhfkit.models.folder import ModelSource
from rlhfkit.models.heads import HEAD_NAMES, adapter_holds_head, no_head
from rlhfkit.models.parts import Task, base_model, vocabulary_layers
from rlhfkit.models.text_side import TextSide
from rlhfkit.models.vocabulary import with_rows
from rlhfkit.repair.tensors import why_unreadable


def add_lora(model: Any, task: Task, lora: LoraConfig, text: TextSide, *, train_embeddings: bool, base: str) -> Any:
    """Put new adapters on a model, which trains nothing else from now on.

    Raises:
        ConfigError: the model has no layers of the names asked for.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model, prepare_model_for_kbit_training

    targets = text.family.lora_targets if lora.targets == "auto" else tuple(t.strip() for t in lora.targets.split(","))
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if absent := [t for t in targets if t not in linear]:
        raise ConfigError(
            f"lora.targets: the model has no linear layer called {', '.join(absent)}",
            hint=f"it has: {', '.join(sorted(linear))}",
        )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # The head of a reward model is new and must be saved with the adapter (trl#1379). New tokens can only be learned
    # if the embedding and the head train.
    extra = [name for name in HEAD_NAMES if task == "reward" and hasattr(model, name)]
    if train_embeddings:
        extra += [_last_name(model, model.get_input_embeddings())]
        if model.get_output_embeddings() is not None and not model.config.tie_word_embeddings:
            extra += [_last_name(model, model.get_output_embeddings())]
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=0.0,  # PPO compares probabilities of one policy; noise in them is noise in the ratio
        target_modules=list(targets),
        modules_to_save=extra or None,
        ensure_weight_tying=train_embeddings and bool(model.config.tie_word_embeddings),
        task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM",
        base_model_name_or_path=base,
    )
    return _trainable_in_float32(get_peft_model(model, settings))


def adapter_settings(model: Any, folder: str, task: Task) -> tuple[Any, list[str]]:
    """Settings of an adapter folder for a model, and the heads that they gained: an SFT adapter becomes the start of a
    reward adapter, which has a head to save.
    """
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    heads: list[str] = []
    if task == "reward" and settings.task_type != "SEQ_CLS":
        settings.task_type = "SEQ_CLS"
        heads = [name for name in HEAD_NAMES if hasattr(model, name)]
        settings.modules_to_save = [*(settings.modules_to_save or []), *heads]
    return settings, heads


def load_adapter(model: Any, source: ModelSource, task: Task, *, trainable: bool, lora: LoraConfig | None) -> Any:
    """Put the adapter of a model's folder on its base.

    Args:
        model: the base.
        source: the folder.
        task: as in `load_model`.
        trainable: whether it goes on being trained.
        lora: the settings asked for, which the adapter's own have to be.

    Raises:
        ModelError: weights that are missing, damaged or do not fit.
        ConfigError: other settings were asked for.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    folder = str(source.adapter)
    if trainable and getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if task == "reward" and source.is_reward_model and not adapter_holds_head(source):
        raise no_head(source)
    try:
        settings, heads = adapter_settings(model, folder, task)
        settings.inference_mode = not trainable
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the base may have moved
            model = get_peft_model(model, settings)
        started = {f"base_model.model.{name}.weight": getattr(base_model(model), name).weight for name in heads}
        set_adapter_weights(model, folder, "default", started)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the adapter in {folder} does not fit its base: {type(error).__name__}: {why_unreadable(error)}"
        ) from error
    if trainable and lora is not None:
        refuse_other_lora(settings, lora, folder)
    if not trainable:
        model.eval()
    return _trainable_in_float32(model)


def set_adapter_weights(model: Any, folder: str, name: str, further: Mapping[str, Tensor] | None = None) -> None:
    """Fill an adapter of a peft model from a folder, whose embedding may end before the padding rows of the model's.

    Args:
        model: has an adapter with the folder's settings.
        folder: an adapter folder.
        name: of the adapter in the model.
        further: weights that the folder lacks, by the names that it would have for them.

    Raises:
        ModelError: weights are missing that the settings ask for.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = {**(further or {}), **load_peft_weights(folder)}
    rows = base_model(model).get_input_embeddings().weight.shape[0]
    for key in {f"{layer}.weight" for layer in vocabulary_layers(model)} & weights.keys():
        weights[key] = with_rows(weights[key], rows)
    found = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in found.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    if missing := sorted(key for key in missing if f".{name}." in f"{key}."):
        raise ModelError(
            f"the adapter in {folder} lacks {len(missing)} of the weights that its configuration describes (first: "
            f"{missing[0]})",
            hint="restore the folder, or train it again",
        )


def refuse_other_lora(settings: Any, lora: LoraConfig, folder: str) -> None:
    """An adapter that goes on being trained keeps its shape; settings that say otherwise would have no effect."""
    targets = None if lora.targets == "auto" else {t.strip() for t in lora.targets.split(",")}
    given = (
        ("rank", lora.rank, settings.r),
        ("alpha", lora.alpha, settings.lora_alpha),
        ("targets", targets, set(settings.target_modules)),
    )
    for name, wanted, found in given:
        if wanted is not None and wanted != found:
            raise ConfigError(
                f"lora.{name}: {wanted}, but the adapter in {folder} that would go on being trained has {name} {found}",
                hint=f"leave it as it is (--lora-rank {settings.r}), or merge it and train all weights: --lora-rank 0",
            )


def _trainable_in_float32(model: Any) -> Any:
    """Embeddings and heads that train beside adapters are copies of the base's, which may be bf16: too coarse for
    small steps."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def load_frozen_adapter(model: Any, folder: str, name: str) -> None:
    """Put a second, frozen adapter beside the one that trains, which stays active."""
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    if settings.bias != "none":
        raise ModelError(
            f"{folder} was trained with bias = '{settings.bias}': its biases are the base's own, and a policy that "
            "goes on from it would change its reference with them",
            hint=f"merge it first, and give the result as --model: rlhfkit merge {folder} MERGED",
        )
    settings.inference_mode = True
    settings.init_lora_weights = True  # PiSSA and its like would change the base a second time
    model.add_adapter(name, settings)
    set_adapter_weights(model, folder, name)
    inner = base_model(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    # Where the embedding trains and the head is tied to it, peft gives a further adapter an embedding but no head.
    if name in getattr(embedding, "modules_to_save", {}) and name not in getattr(head, "modules_to_save", {name: None}):
        head.update(name, tied_module=embedding.modules_to_save[name])
    model.set_adapter("default")


def refuse_to_merge_tied(model: Any, source: ModelSource) -> None:
    """peft merges into the one tensor that embedding and head share what was trained for one of them."""
    inner = base_model(model)
    if not getattr(inner.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return
    layers = [layer for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()) if layer is not None]
    adapted = any(getattr(layer, "lora_A", None) or getattr(layer, "lora_embedding_A", None) for layer in layers)
    copies = [getattr(layer, "modules_to_save", {}) for layer in layers]  # that trained in the place of the layers
    weights = {id(copy["default"].weight) if "default" in copy else None for copy in copies}
    if adapted or len(weights) > 1:
        raise ModelError(
            f"the adapter of {source.adapter} changes the embedding or the head, which are one tensor in "
            f"{source.base}: merged into it, either would change the other",
            hint="merge it into a model whose embedding and head are two, and give that: rlhfkit merge "
            f"{source.adapter} MERGED; or go on with --lora-rank",
        )


def _last_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).rsplit(".", 1)[-1]
