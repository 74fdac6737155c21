"""Weights, adapters, head and vocabulary of a model, put together for a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhfkit.config.blocks import Kernels, LoraConfig, Quantize
from rlhfkit.errors import ModelError, first_line
from rlhfkit.families.tokens import align_model
from rlhfkit.models.adapter_folders import add_lora, load_adapter, refuse_to_merge_tied
from rlhfkit.models.attention import use_packed_attention
from rlhfkit.models.converted import convert_weights
from rlhfkit.models.folder import ModelSource
from rlhfkit.models.heads import HEAD_NAMES, adapter_holds_head, exact_head, start_head
from rlhfkit.models.kernels import use_fast_layers
from rlhfkit.models.lora import use_fast_lora
from rlhfkit.models.parts import Task, base_model
from rlhfkit.models.precision import current_device
from rlhfkit.models.text_side import TextSide
from rlhfkit.models.trust import code_options, refuse_outside_paths
from rlhfkit.models.vocabulary import forbid_padding_rows, grow_vocabulary
from rlhfkit.repair.tensors import why_unreadable


@dataclass
class LoadedModel:
    """A transformers or peft model and its text side; ``notes`` say what was changed on the way."""

    model: Any
    text: TextSide
    source: ModelSource
    notes: list[str] = field(default_factory=list)
    quantize: Quantize = "none"  # storage of the base

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")


def load_model(
    source: ModelSource,
    text: TextSide,
    task: Task,
    *,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    packing: bool = True,
    kernels: Kernels = "auto",
    fresh_head: bool = False,
    device: torch.device | None = None,
) -> LoadedModel:
    """Weights for a task, with adapters as asked.

    Args:
        source: what to load.
        text: its text side; the vocabulary grows if the template added tokens.
        task: ``causal`` for policies, ``reward`` for a backbone with a scalar head.
        lora: None to use the model as it is (an adapter folder stays an adapter); rank 0 to train all weights (an
            adapter folder is merged first); rank > 0 to train adapters (an adapter folder goes on being trained).
        dtype: of the weights that do not train; weights that train are float32.
        quantize: the base's storage.
        trust_remote_code: run the model folder's own code.
        gradient_checkpointing: recompute activations.
        packing: compute lines of tokens instead of padded rows, where the architecture can.
        kernels: how norms and SwiGLU layers are computed.
        fresh_head: a reward head may be new; otherwise a missing one is an error.
        device: where a quantised base is put at once.

    Raises:
        ModelError: weights that are missing, damaged or do not fit.
        ConfigError: LoRA settings that differ from those of the adapter folder that goes on being trained.
    """
    if task == "causal":
        refuse_reward_model(source)
    if source.legacy:
        convert_weights(Path(source.base), Path(source.legacy))
    train_all = lora is not None and lora.rank == 0
    weights = torch.float32 if train_all else dtype
    model, head_is_missing = _load_base(source, task, weights, quantize, trust_remote_code, device)
    notes: list[str] = []
    if grown := grow_vocabulary(model, max(text.vocabulary, int(source.record.get("vocab_rows", 0)))):
        notes.append(grown)
    # transformers takes the pad of the config for a row that does not train; where pad == eos, that is the end of turn.
    model.get_input_embeddings().padding_idx = None
    if source.adapter is not None:
        model = load_adapter(model, source, task, trainable=lora is not None and not train_all, lora=lora)
        if train_all:
            refuse_to_merge_tied(model, source)
            model = model.merge_and_unload().requires_grad_(True)  # peft froze the base
            notes.append(f"the adapter of {source.adapter} was merged into its base; all weights train")
    elif lora is not None and lora.rank > 0:
        new_tokens = bool(grown or text.encoder.added_controls)
        model = add_lora(model, task, lora, text, train_embeddings=new_tokens, base=source.base)
    if task == "reward":
        if head_is_missing and not adapter_holds_head(source):
            start_head(model, source, fresh_head)
        exact_head(model, source)
    inner = base_model(model)
    if packing:
        use_packed_attention(inner)
    use_fast_lora(inner)
    if faster := use_fast_layers(inner, device or current_device(), kernels):
        notes.append(faster)
    align_model(text.tokens, inner)
    if task == "causal" and inner.generation_config is not None:
        rows = inner.get_input_embeddings().weight.shape[0]
        stored = int(source.config.get("vocab_size") or rows)
        if padding := forbid_padding_rows(inner.generation_config, text.vocabulary, rows, stored_rows=stored):
            notes.append(padding)
    inner.config.use_cache = False
    if gradient_checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LoadedModel(model, text, source, notes, quantize)


def refuse_reward_model(source: ModelSource) -> None:
    """Refuse one where a model has to write.

    Raises:
        ModelError: it is a reward model.
    """
    if source.is_reward_model:
        raise ModelError(
            f"{source.path} is a reward model: it scores answers and cannot write any",
            hint="give the SFT or PPO model as --model; a reward model goes to: rlhfkit ppo --reward",
        )


def _load_base(
    source: ModelSource, task: Task, dtype: torch.dtype, quantize: Quantize, trust: bool, device: torch.device | None
) -> tuple[Any, bool]:
    """The base, and whether its reward head was missing from the files."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    refuse_outside_paths(source.base)
    # weights_only said aloud: an environment variable can turn torch's own default off, and a .bin may hold code.
    options: dict[str, Any] = {"dtype": dtype, "weights_only": True}
    # A layout that is kept has a class of ours in place of the code of its folder.
    options |= code_options(source.base, trust and source.layout is None)
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    auto = AutoModelForCausalLM
    if task == "reward":
        auto, options["num_labels"] = AutoModelForSequenceClassification, 1
    try:
        model, info = auto.from_pretrained(source.base, output_loading_info=True, **options)
    except ImportError as error:
        raise ModelError(f"loading {source.base} needs a package that is missing: {first_line(error)}") from error
    except Exception as error:  # safetensors, torch and transformers each have their own kinds of "damaged"
        raise ModelError(
            f"the weights of {source.base} do not load: {type(error).__name__}: {why_unreadable(error)}",
            hint="its index may name absent shards, or a file may be cut short; see what is wrong: "
            f"rlhfkit doctor {source.base}",
        ) from error
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first pass in eval mode, and the repacked
        # ones have no backward pass: after an evaluation, all layers but the last would train on wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    missing = {k for k in info["missing_keys"] if not k.startswith(HEAD_NAMES)}
    if missing or info["mismatched_keys"]:
        names = sorted(missing) + [str(k) for k in info["mismatched_keys"]]
        raise ModelError(
            f"{source.base} lacks {len(names)} weights of a {type(model).__name__} (first: {names[0]}); "
            "they would be random",
            hint=f"the folder is incomplete or of another model; see what is wrong: rlhfkit doctor {source.base}",
        )
    return model, any(k.startswith(HEAD_NAMES) for k in info["missing_keys"])


def _quantization(quantize: Quantize, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # NF4 with double quantisation: QLoRA (Dettmers et al. 2023).
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
