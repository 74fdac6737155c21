"""Tokenizer, template, weights, adapters and vocabulary of a model, put together for a stage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.config.blocks import Kernels, LoraConfig, Quantize
from rlhfkit.errors import ConfigError, ModelError
from rlhfkit.families.base import Family
from rlhfkit.families.registry import find_family
from rlhfkit.families.tokens import TokenPolicy, align_model, apply_token_policy
from rlhfkit.models.attention import use_packed_attention
from rlhfkit.models.converted import bare_tokenizer, convert_weights, kept_tokenizer
from rlhfkit.models.folder import ModelSource, has_tokenizer
from rlhfkit.models.kernels import use_fast_layers
from rlhfkit.models.lora import use_fast_lora
from rlhfkit.models.precision import current_device
from rlhfkit.models.trust import code_options, refuse_outside_paths
from rlhfkit.models.vocabulary import forbid_padding_rows, grow_vocabulary, token_count, with_rows
from rlhfkit.repair.tensors import why_unreadable

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

    @property
    def vocabulary(self) -> int:
        """Ids from here on are no tokens."""
        return token_count(self.tokenizer)


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
    if source.layout is not None:
        chosen = replace(chosen, lora_targets=source.layout.lora_targets)
    tokenizer = _load_tokenizer(source, chosen, trust_remote_code)
    encoder = ChatEncoder(tokenizer, _choose_template(source, chosen, tokenizer, template))
    tokens = apply_token_policy(chosen, tokenizer, encoder, generation_eos=_generation_eos(source))
    notes = [f"converted from {source.legacy}: {source.base}"] if source.legacy else []
    if source.layout is not None:
        notes.append(f"{source.layout.name}: read and saved in its own layout, computed by a class of its adapter")
    notes.append(f"chat template: {encoder.template.name}")
    return TextSide(tokenizer, encoder, chosen, tokens, [*notes, *tokens.changes])


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
    if source.layout is not None:
        return load_template(source.layout.template)
    return load_template(family.choose_template(source.config, tokenizer.get_vocab()))


def _load_tokenizer(source: ModelSource, family: Family, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    path = source.tokenizer_path
    if Path(path).is_dir() and not has_tokenizer(path):
        raise ModelError(
            f"{path} has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json is there",
            hint="copy them from the original model with: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + path,
        )
    if (own := kept_tokenizer(source) or bare_tokenizer(family, path)) is not None:
        return own
    code = code_options(path, trust_remote_code and source.layout is None)
    try:
        return AutoTokenizer.from_pretrained(path, **code)
    except Exception as error:  # a damaged file surfaces as many kinds of error, from several libraries
        raise ModelError(
            f"the tokenizer of {path} does not load: {type(error).__name__}: {_first_line(error)}",
            hint="mend the folder with: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + path,
        ) from error


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
    if task == "causal" and source.is_reward_model:
        raise ModelError(
            f"{source.path} is a reward model: it scores answers and cannot write any",
            hint="give the SFT or PPO model as --model; a reward model goes to: rlhfkit ppo --reward",
        )
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
        model = _load_adapter(model, source, task, trainable=lora is not None and not train_all, lora=lora)
        if train_all:
            _refuse_to_merge_tied(model, source)
            model = model.merge_and_unload().requires_grad_(True)  # peft froze the base
            notes.append(f"the adapter of {source.adapter} was merged into its base; all weights train")
    elif lora is not None and lora.rank > 0:
        new_tokens = bool(grown or text.encoder.added_controls)
        model = add_lora(model, task, lora, text, train_embeddings=new_tokens, base=source.base)
    if task == "reward":
        if head_is_missing and not _adapter_holds_head(source):
            _start_head(model, source, fresh_head)
        _exact_head(model, source)
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
        raise ModelError(f"loading {source.base} needs a package that is missing: {_first_line(error)}") from error
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


def _load_adapter(model: Any, source: ModelSource, task: Task, *, trainable: bool, lora: LoraConfig | None) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training

    folder = str(source.adapter)
    if trainable and getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if task == "reward" and source.is_reward_model and not _adapter_holds_head(source):
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
        _refuse_other_lora(settings, lora, folder)
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
    return source.adapter is not None and stored_head(source.adapter) is not None


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


def _start_head(model: Any, source: ModelSource, fresh_head: bool) -> None:
    if not fresh_head:
        raise no_head(source)
    # Small and dependent on width, as in Stiennon et al. 2020: first scores are near 0, first losses near ln 2.
    for module in reward_head(model).modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features + 1))


def _exact_head(model: Any, source: ModelSource) -> None:
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


def _refuse_to_merge_tied(model: Any, source: ModelSource) -> None:
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


def vocabulary_layers(model: Any) -> list[str]:
    """The paths of the embedding and the head of a model's vocabulary, inside peft's wrapper if there is one."""
    inner = base_model(model)
    ours = [layer for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()) if layer is not None]
    return [name for name, module in model.named_modules() if any(module is layer for layer in ours)]


def _last_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).rsplit(".", 1)[-1]


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
