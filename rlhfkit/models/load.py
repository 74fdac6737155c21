"""Tokenizer, template, weights, adapters and vocabulary of a model, put together for a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.config.blocks import LoraConfig, Quantize
from rlhfkit.errors import ConfigError, ModelError
from rlhfkit.families.base import Family
from rlhfkit.families.registry import find_family
from rlhfkit.families.tokens import TokenPolicy, align_model, apply_token_policy
from rlhfkit.models.folder import ModelSource, has_tokenizer

VOCABULARY_MULTIPLE = 64  # tensor cores like it; what the Qwen and Baichuan checkpoints themselves use
HEAD_NAMES = ("score", "classifier")  # transformers' names for the head of a sequence classifier
Task = Literal["causal", "reward"]


@dataclass
class TextSide:
    """Everything between text and ids."""

    tokenizer: Any
    encoder: ChatEncoder
    family: Family
    tokens: TokenPolicy
    notes: list[str] = field(default_factory=list)

    @property
    def template(self) -> Template:
        return self.encoder.template


@dataclass
class LoadedModel:
    """A transformers or peft model and its text side; ``notes`` say what was changed on the way."""

    model: Any
    text: TextSide
    source: ModelSource
    notes: list[str] = field(default_factory=list)

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")


# -- text side ---------------------------------------------------------------------------------------------------------


def load_text_side(
    source: ModelSource, *, family: str = "auto", template: str = "auto", trust_remote_code: bool = False
) -> TextSide:
    """Tokenizer, chat template and token policy of a model.

    The template is, in this order: the one asked for; the one its run recorded; the tokenizer's own; the family's.

    Raises:
        FamilyError, TemplateError, ModelError: see there; also a folder without a tokenizer.
    """
    chosen = find_family(source.config, name=family, where=source.path)
    _refuse_unsafe_remote_code(chosen, source)
    tokenizer = _load_tokenizer(source, trust_remote_code)
    encoder = ChatEncoder(tokenizer, _choose_template(source, chosen, tokenizer, template))
    tokens = apply_token_policy(chosen, tokenizer, encoder, generation_eos=_generation_eos(source))
    return TextSide(tokenizer, encoder, chosen, tokens, [f"chat template: {encoder.template.name}", *tokens.changes])


def _generation_eos(source: ModelSource) -> int | list[int] | None:
    """Where the checkpoint stops already: rollouts must end where generation will."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source.base).eos_token_id
    except OSError:  # many folders have none
        return None


def _choose_template(source: ModelSource, family: Family, tokenizer: Any, wanted: str) -> Template:
    if wanted != "auto":
        return load_template(wanted)
    if recorded := source.record.get("template"):
        return Template(recorded["name"], recorded["source"], recorded["bodies"], tuple(recorded["controls"]))
    if own := getattr(tokenizer, "chat_template", None):
        # Several named templates may come with a tokenizer; the nameless one is for plain chat.
        return Template("tokenizer", own["default"] if isinstance(own, dict) else own)
    return load_template(family.choose_template(source.config, tokenizer.get_vocab()))


def _load_tokenizer(source: ModelSource, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    path = source.tokenizer_path
    if Path(path).is_dir() and not has_tokenizer(path):
        raise ModelError(
            f"{path} has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json is there",
            hint="copy them from the original model with: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + path,
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file surfaces as many kinds of error, from several libraries
        raise ModelError(
            f"the tokenizer of {path} does not load: {type(error).__name__}: {_first_line(error)}",
            hint="mend the folder with: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + path,
        ) from error


def _refuse_unsafe_remote_code(family: Family, source: ModelSource) -> None:
    model_type = str(source.config.get("model_type", ""))
    if model_type in family.requires_conversion:
        raise ModelError(
            f"{source.path} is a '{model_type}' checkpoint whose own Python code today's transformers loads wrongly "
            "(random projections or uninitialised rotary tables, without an error)",
            hint="use the same weights in a native layout (model_type qwen2 or llama)",
        )


# -- weights -----------------------------------------------------------------------------------------------------------


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
        fresh_head: a reward head may be new; otherwise a missing one is an error.
        device: where a quantised base is put at once.

    Raises:
        ModelError: weights that are missing, damaged or do not fit.
        ConfigError: LoRA settings that differ from those of the adapter folder that goes on being trained.
    """
    if task == "causal" and source.is_reward_model:
        raise ModelError(
            f"{source.path} is a reward model: it scores answers and cannot write any",
            hint="give the SFT or PPO model as --model; a reward model goes to: rlhfkit ppo --reward",
        )
    train_all = lora is not None and lora.rank == 0
    weights = torch.float32 if train_all else dtype
    model, head_is_missing = _load_base(source, task, weights, quantize, trust_remote_code, device)
    notes: list[str] = []
    if grown := grow_vocabulary(model, max(len(text.tokenizer), int(source.record.get("vocab_rows", 0)))):
        notes.append(grown)
    if source.adapter is not None:
        model = _load_adapter(model, source, task, trainable=lora is not None and not train_all, lora=lora)
        if train_all:
            model = model.merge_and_unload().requires_grad_(True)  # peft froze the base
            notes.append(f"the adapter of {source.adapter} was merged into its base; all weights train")
    elif lora is not None and lora.rank > 0:
        new_tokens = bool(grown or text.encoder.added_controls)
        model = _add_lora(model, task, lora, text, train_embeddings=new_tokens, base=source.base)
    if task == "reward":
        if head_is_missing and not _adapter_holds_head(source):
            _start_head(model, source, fresh_head)
        _exact_head(model, source)
    inner = base_model(model)
    align_model(text.tokens, inner)
    inner.config.use_cache = False
    if gradient_checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LoadedModel(model, text, source, notes)


def _load_base(
    source: ModelSource, task: Task, dtype: torch.dtype, quantize: Quantize, trust: bool, device: torch.device | None
) -> tuple[Any, bool]:
    """The base, and whether its reward head was missing from the files."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust}
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    auto = AutoModelForCausalLM
    if task == "reward":
        auto, options["num_labels"] = AutoModelForSequenceClassification, 1
    try:
        model, info = auto.from_pretrained(source.base, output_loading_info=True, **options)
    except ImportError as error:
        raise ModelError(f"loading {source.base} needs a package that is missing: {_first_line(error)}") from error
    except Exception as error:  # safetensors, torch and transformers each have their own kinds of "damaged"
        raise ModelError(
            f"the weights of {source.base} do not load: {type(error).__name__}: {_first_line(error)}",
            hint="see what is wrong with the folder: its index may name absent shards, or a file may be cut short",
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
            hint="the folder is incomplete or of another model; restore it from the original",
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


def _add_lora(model: Any, task: Task, lora: LoraConfig, text: TextSide, *, train_embeddings: bool, base: str) -> Any:
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


def _load_adapter(model: Any, source: ModelSource, task: Task, *, trainable: bool, lora: LoraConfig | None) -> Any:
    from peft import (
        PeftConfig,
        PeftModel,
        get_peft_model,
        load_peft_weights,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )

    folder = str(source.adapter)
    if trainable and getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if task == "reward" and source.is_reward_model and not _adapter_holds_head(source):
        raise _no_head(source)
    try:
        settings = PeftConfig.from_pretrained(folder)
        if task == "reward" and settings.task_type != "SEQ_CLS":
            # An SFT adapter becomes the start of a reward adapter, which has a head to save.
            settings.task_type = "SEQ_CLS"
            heads = [name for name in HEAD_NAMES if hasattr(model, name)]
            settings.modules_to_save = [*(settings.modules_to_save or []), *heads]
            settings.inference_mode = not trainable
            model = get_peft_model(model, settings)
            started = {f"base_model.model.{name}.weight": getattr(base_model(model), name).weight for name in heads}
            set_peft_model_state_dict(model, {**started, **load_peft_weights(folder)})
        else:
            model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except Exception as error:
        raise ModelError(
            f"the adapter in {folder} does not fit its base: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if trainable and lora is not None:
        _refuse_other_lora(settings, lora, folder)
    return _trainable_in_float32(model)


def _refuse_other_lora(settings: Any, lora: LoraConfig, folder: str) -> None:
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


def _adapter_holds_head(source: ModelSource) -> bool:
    from safetensors import safe_open

    path = Path(source.adapter or "") / "adapter_model.safetensors"
    if source.adapter is None or not path.is_file():
        return False
    with safe_open(path, framework="pt") as weights:
        return any(f".{name}." in key for key in weights.keys() for name in HEAD_NAMES)  # noqa: SIM118


def _start_head(model: Any, source: ModelSource, fresh_head: bool) -> None:
    if not fresh_head:
        raise _no_head(source)
    # Small and dependent on width, as in Stiennon et al. 2020: first scores are near 0, first losses near ln 2.
    for module in reward_head(model).modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features + 1))


def _exact_head(model: Any, source: ModelSource) -> None:
    """Hold the head in float32, as its file does: scores are compared, and bf16 keeps three digits of them."""
    from safetensors import safe_open

    head = reward_head(model).float()
    if source.adapter is not None or not Path(source.base).is_dir():
        return
    for path in Path(source.base).glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            for name in HEAD_NAMES:
                if f"{name}.weight" in weights.keys():  # noqa: SIM118 -- the file's own list, not a mapping
                    with torch.no_grad():
                        head.weight.copy_(weights.get_tensor(f"{name}.weight"))  # type: ignore[operator]


def _no_head(source: ModelSource) -> ModelError:
    return ModelError(
        f"{source.path} has no reward head (score.weight): its scores would be random",
        hint=f"train one with: rlhfkit rm --model {source.path}",
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def base_model(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def backbone(model: Any) -> Any:
    """The stack of layers without any head: maps ids to hidden states."""
    inner = base_model(model)
    return getattr(inner, inner.base_model_prefix)


def reward_head(model: Any) -> nn.Module:
    """The scalar head of a sequence classifier."""
    inner = base_model(model)
    return next(getattr(inner, name) for name in HEAD_NAMES if hasattr(inner, name))


def load_frozen_adapter(model: Any, folder: str, name: str) -> None:
    """Put a second, frozen adapter beside the one that trains, which stays active."""
    model.load_adapter(folder, name, is_trainable=False)
    inner = base_model(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    # Where the embedding trains and the head is tied to it, peft gives a further adapter an embedding but no head.
    if name in getattr(embedding, "modules_to_save", {}) and name not in getattr(head, "modules_to_save", {name: None}):
        head.update(name, tied_module=embedding.modules_to_save[name])
    model.set_adapter("default")


def disable_dropout(model: nn.Module) -> None:
    """Make passes in training mode compute what passes in eval mode do (which would end gradient checkpointing)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 -- not declared by nn.Module


def grow_vocabulary(model: Any, tokens: int) -> str:
    """Give the embedding and the head at least ``tokens`` rows, a multiple of 64; never fewer than before.

    New rows start as the mean of the old ones, so that a new token is an average one and the logits of the old ones
    are not drowned (Hewitt 2021). Config and tied head stay in step.

    Returns:
        A sentence about the change, empty if there was none.
    """
    embedding = model.get_input_embeddings()
    old = embedding.weight.shape[0]
    if tokens <= old:
        return ""
    new = -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model.resize_token_embeddings(new, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for layer in {id(m): m for m in (model.get_input_embeddings(), head) if m is not None}.values():
            for values in (layer.weight, getattr(layer, "bias", None)):
                if values is not None:
                    values[old:] = values[:old].float().mean(dim=0).to(values.dtype)
    return f"vocabulary grown from {old} to {new} rows for {tokens} tokens; new rows start as the mean of the old ones"


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    total = trainable = 0
    for p in model.parameters():
        count = p.numel() * (2 if type(p).__name__ == "Params4bit" else 1)  # two weights in a byte
        total += count
        trainable += count if p.requires_grad else 0
    return trainable, total


def _last_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).rsplit(".", 1)[-1]


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
