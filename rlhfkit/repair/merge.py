"""A LoRA adapter into its base: tensor by tensor, by peft's own layers, and proved by what both models say.

The model of the base is built without data. A tensor that an adapter changes is read, merged in float32 by the peft
layer that owns it and written; all others pass from file to file. Nothing ever holds the whole model, and the proof
computes layer by layer from the files as well.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.errors import ModelError, first_line
from rlhfkit.models.folder import ModelSource
from rlhfkit.models.heads import HEAD_NAMES
from rlhfkit.models.lora import STARTS_BESIDE_THE_BASE
from rlhfkit.models.parts import base_model
from rlhfkit.models.vocabulary import with_rows
from rlhfkit.repair.folder import Folder
from rlhfkit.repair.streamed import FileWeights, Read, empty, is_empty, outputs, plain_name, stream
from rlhfkit.repair.tensors import (
    NewTensor,
    copied,
    read_pieces,
    stored_dtype,
    tensor_bytes,
    torch_dtype,
    why_unreadable,
)

# Keys of adapter_config.json that are merged as peft means them, or that say nothing about the weights. Any other one
# with a value is refused by name: a variant of LoRA that nobody tried here.
_KNOWN = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
        "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
        "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
# Off by more than this share of what the adapter changes, before any rounding, a merge is wrong: a layer forgotten,
# another scale. Only sums are rounded there, in float32.
SOUND = 1e-3
# Rounding to 16 bits costs a long-trained adapter a few hundredths of its effect, and a very small one all of it. From
# half on, the merged model is no nearer to what was trained than to the base.
WORTH = 0.5
_NOTHING = 1e-5  # share of the outputs that is the rounding of sums in float32


@dataclass(frozen=True, slots=True)
class Distance:
    """Between two models on the same text, in float32: the largest difference and the root of the mean square one."""

    max: float
    rms: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Distance:
        difference = (ours - theirs).double()
        return cls(float(difference.abs().max()), float(difference.square().mean().sqrt()))


@dataclass(frozen=True, slots=True)
class Proof:
    """What the comparison found.

    Args:
        what: ``logits`` or ``scores``.
        positions: tokens of probe text they were compared at.
        size: root mean square of the adapted model's outputs.
        unrounded: the merge before it is rounded to 16 bits against base + adapter; None where nothing is rounded.
        merged: merged folder against base + adapter.
        effect: base against base + adapter: what the adapter does.
        agreement: share of positions at which both would say the same next token; None for scores.
        quantised: base + adapter as trained on a quantised base, against the same on the 16-bit base; None if the run
            trained on a base that was not quantised, or nothing says that it was.
    """

    what: str
    positions: int
    size: float
    unrounded: Distance | None
    merged: Distance
    effect: Distance
    agreement: float | None
    quantised: Distance | None

    @property
    def fault(self) -> str:
        """Why the merge must not be kept; empty when it is right."""
        if not all(map(math.isfinite, (self.merged.rms, self.effect.rms))):
            return f"the {self.what} are not finite"
        floor = _NOTHING * self.size
        exact = self.unrounded or self.merged
        if exact.rms > max(SOUND * self.effect.rms, floor):
            return (
                f"the merged {self.what} are off by up to {exact.max:.3g} before any rounding, where the adapter "
                f"changes them by up to {self.effect.max:.3g}"
            )
        if self.merged.rms > max(WORTH * self.effect.rms, floor):
            return (
                f"rounding moves the {self.what} by up to {self.merged.max:.3g}, and the adapter itself by no more "
                f"than {self.effect.max:.3g}: too little of it is left"
            )
        return ""

    @property
    def share(self) -> float:
        """How far the merged folder is off, as a share of what the adapter changes."""
        return self.merged.rms / self.effect.rms if self.effect.rms else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For ``merge.json``."""
        return asdict(self)


class Merge:
    """An adapter and its base, ready to be written as one model.

    Args:
        source: the adapter folder with its base, as `open_model` found them.
        base: the base's folder on this machine.

    Raises:
        ModelError: an adapter or base that cannot be merged, with the reason.
    """

    def __init__(self, source: ModelSource, base: Path) -> None:
        self.source, self.folder = source, Folder(base, "the base")
        self.settings = _adapter_settings(Path(str(source.adapter)))
        self.is_reward_model = self.settings.get("task_type") == "SEQ_CLS"
        self.adapter = _adapter_tensors(str(source.adapter))
        _refuse_unknown(self.settings, str(source.adapter), self.folder)
        heads = {name: t for name, t in self.adapter.items() if plain_name(name).removesuffix(".weight") in HEAD_NAMES}
        if self.is_reward_model and not heads:
            raise ModelError(
                f"{source.path} is a reward adapter without its head (score.weight): its scores would be random",
                hint="restore the folder, or train it again: rlhfkit rm",
            )
        self.labels = next((t.shape[0] for t in heads.values()), 1)
        self.config, self.plain = self._empty_model()
        self.head_name, self.embedding_name = _ends(self.plain)
        for name in self.adapter:  # an embedding beside an adapter may end before the padding rows
            if plain_name(name) in (self.embedding_name, self.head_name):
                self.adapter[name] = with_rows(self.adapter[name], self.config.vocab_size)
        self.shapes = {name: tuple(t.shape) for name, t in self.plain.state_dict().items()}
        self.base = FileWeights(base, self.folder.weights, tied=self._tied(), rows=self._rows())
        self.names = self._names()
        self.model = self._with_adapter()

    # -- building ------------------------------------------------------------------------------------------------------

    def _empty_model(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        options = {"num_labels": self.labels} if self.is_reward_model else {}
        auto = AutoModelForSequenceClassification if self.is_reward_model else AutoModelForCausalLM
        try:
            config = AutoConfig.from_pretrained(self.folder.path, trust_remote_code=False, **options)
            config.vocab_size = max(self._vocabulary(), config.vocab_size)
            return config, empty(lambda: auto.from_config(config, dtype=torch.float32))
        except Exception as error:  # no class for the type, code of the folder's own, values out of range
            raise ModelError(
                f"the base {self.folder.path} is no model that transformers builds by itself: {first_line(error)}",
                hint="merge needs a base in a native layout; see: rlhfkit doctor " + str(self.folder.path),
            ) from error

    def _vocabulary(self) -> int:
        """Rows after training: what the run recorded, or those of an embedding that the adapter holds."""
        rows = [int(self.source.record.get("vocab_rows") or 0)]
        rows += [t.shape[0] for name, t in self.adapter.items() if plain_name(name).endswith("embed_tokens.weight")]
        return max(rows)

    def _tied(self) -> dict[str, str]:
        if self.head_name and self.config.tie_word_embeddings:
            return {self.head_name: self.embedding_name}
        return {}

    def _rows(self) -> dict[str, int]:
        names = [name for name in (self.embedding_name, self.head_name) if name]
        return dict.fromkeys(names, self.config.vocab_size)

    def _names(self) -> list[str]:
        """Tensors of the merged model, in the order of the base's files; every one must be there or in the adapter."""
        wanted = set(self.shapes)
        own = {plain_name(name) for name in self.adapter if ".lora_" not in name}
        absent = sorted(name for name in wanted - own if name not in self.base)
        if absent:
            raise ModelError(
                f"the base {self.folder.path} lacks {len(absent)} weights of a {type(self.plain).__name__} "
                f"(first: {absent[0]})",
                hint="see what is wrong with it: rlhfkit doctor " + str(self.folder.path),
            )
        stored = [name for name in self.folder.weights.tensors if name in wanted]
        return stored + sorted(wanted - set(stored))

    def _with_adapter(self) -> Any:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

        try:
            settings = PeftConfig.from_pretrained(str(self.source.adapter))
            settings.inference_mode = True
            with warnings.catch_warnings():
                # That the base has another path now, and that tied weights need care: they get it here.
                warnings.simplefilter("ignore", UserWarning)
                model = get_peft_model(self.plain, settings)
            for name, parameter in model.named_parameters():
                # Biases that trained, or an embedding that peft saved beside its LoRA: the adapter's word counts.
                if name in self.adapter and is_empty(parameter):
                    parameter.data = torch.empty(parameter.shape)
            result = set_peft_model_state_dict(model, self.adapter)
        except Exception as error:
            raise ModelError(
                f"the adapter in {self.source.adapter} does not fit its base: " + " ".join(str(error).split())[:300]
            ) from error
        lost = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
        unknown = list(result.unexpected_keys)
        if lost or unknown:
            name = (lost or unknown)[0]
            raise ModelError(
                f"the adapter in {self.source.adapter} is not the one its configuration describes: {name} is "
                f"{'missing' if lost else 'not known to it'}",
                hint="restore the folder, or train it again",
            )
        return model.eval()

    # -- writing -------------------------------------------------------------------------------------------------------

    @cached_property
    def unties(self) -> bool:
        """Whether base and adapter together have a head of their own, though the base's was its embedding."""
        if not self.head_name or not self.config.tie_word_embeddings:
            return False
        changed = {self.embedding_name, self.head_name} & (self._owners.keys() | self._given.keys())
        return bool(changed) and not torch.equal(self.value(self.embedding_name), self.value(self.head_name))

    @cached_property
    def _owners(self) -> dict[str, nn.Module]:
        """Tensor -> the adapter layer that changes it."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        found: dict[str, nn.Module] = {}
        for path, module in self.model.named_modules():
            inner = None
            if isinstance(module, BaseTunerLayer):
                inner = module.get_base_layer()
            elif isinstance(module, ModulesToSaveWrapper):
                inner = module.original_module
            if inner is not None:
                for name, _ in inner.named_parameters():
                    found[plain_name(f"{path}.{name}")] = module
        return found

    @cached_property
    def _given(self) -> dict[str, nn.Parameter]:
        """Tensors of the base that the adapter's folder holds itself."""
        parameters = self.model.named_parameters()
        return {plain_name(name): p for name, p in parameters if name in self.adapter and ".lora_" not in name}

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """A tensor of the merged model, in float32."""
        start = self._given[name].data.float() if name in self._given else None
        layer: Any = self._owners.get(name)
        last = name.rsplit(".", 1)[-1]
        if hasattr(layer, "modules_to_save"):
            trained: Tensor = getattr(layer.modules_to_save[layer.active_adapters[0]], last)
            return trained.float()
        if layer is None or last != "weight":
            return self.base.read(name) if start is None else start
        inner = layer.get_base_layer()
        before = inner._parameters[last]
        try:
            value = self.base.read(name) if start is None else start.clone()
            inner._parameters[last] = nn.Parameter(value, requires_grad=False)
            layer.merge(safe_merge=True)
            merged: Tensor = inner._parameters[last].data
            return merged
        finally:
            inner._parameters[last] = before
            layer.merged_adapters.clear()

    def files(self, dtype: torch.dtype | None) -> dict[str, dict[str, NewTensor]]:
        """What is to be written: file -> tensors. ``dtype`` None keeps the base's formats."""
        tied = set() if self.unties else set(self._tied())
        embedding = self.base.weights.tensors[self.base.stored(self.embedding_name)]
        groups: dict[str, dict[str, NewTensor]] = {}
        last = self.base.weights.files[-1]
        for name in self.names:
            if name in tied:
                continue
            info = self.base.weights.tensors.get(name)
            stored = stored_dtype(dtype) if dtype else (info or embedding).dtype
            groups.setdefault(info.file if info else last, {})[name] = self._new_tensor(name, stored)
        count = len(groups)
        if count == 1:
            return {"model.safetensors": next(iter(groups.values()))}
        return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups.values())}

    def _new_tensor(self, name: str, dtype: str) -> NewTensor:
        info = self.base.weights.tensors.get(name)
        rows = self.base.rows.get(name, 0)
        if info and name not in self._owners and name not in self._given and (not rows or info.shape[0] >= rows):
            plain = copied(self.folder.path, name, info)
            if info.dtype == dtype or not torch_dtype(info.dtype).is_floating_point:
                return plain
            return NewTensor(dtype, info.shape, lambda: self._cast_pieces(name, dtype))
        # The head of a reward model stays as it was trained: scores are compared, and 16 bits keep three digits.
        own = "F32" if name.removesuffix(".weight") in HEAD_NAMES else dtype
        shape = self.shapes[name]
        return NewTensor(own, shape, lambda: [tensor_bytes(self.value(name).to(torch_dtype(own)))])

    def _cast_pieces(self, name: str, dtype: str) -> Iterator[bytes]:
        info = self.base.weights.tensors[name]
        for piece in read_pieces(self.folder.path, name, info):
            yield tensor_bytes(torch.frombuffer(bytearray(piece), dtype=torch_dtype(info.dtype)).to(torch_dtype(dtype)))

    # -- proof ---------------------------------------------------------------------------------------------------------

    def prove(
        self, merged: Path, ids: Tensor, mask: Tensor, *, quantize: str, device: torch.device, exact: bool
    ) -> Proof:
        """Compare base + adapter (peft's unmerged layers) with the merged folder, both computed in float32.

        Args:
            merged: what was written.
            ids: probe text [B, T].
            mask: 1 where a token is text.
            quantize: ``4bit`` or ``8bit`` if the adapter was trained on such a base, else ``none``.
            device: where it is computed.
            exact: whether the merged weights are float32.
        """
        ids, mask = ids.to(device), mask.to(device)
        scores = self.is_reward_model
        # First, while the adapter is where tensors are merged: on the CPU.
        before = None if exact else outputs(_merged_model(merged, device, self.value), ids, mask, scores=scores)
        reader: list[Callable[[str], Tensor]] = [self.base.read]
        stream(self.model, self.base, device, lambda name: reader[0](name))
        adapted = outputs(self.model, ids, mask, scores=scores)
        bare = outputs(self.model, ids, mask, scores=scores, bare=True)
        quantised = None
        if quantize != "none":
            reader[0] = self._quantised(quantize)
            quantised = Distance.between(outputs(self.model, ids, mask, scores=scores), adapted)
        ours = outputs(_merged_model(merged, device), ids, mask, scores=scores)
        return Proof(
            what="scores" if self.is_reward_model else "logits",
            positions=len(adapted),
            size=float(adapted.double().square().mean().sqrt()),
            unrounded=None if before is None else Distance.between(before, adapted),
            merged=Distance.between(ours, adapted),
            effect=Distance.between(bare, adapted),
            agreement=None if self.is_reward_model else float((ours.argmax(-1) == adapted.argmax(-1)).float().mean()),
            quantised=quantised,
        )

    def _quantised(self, quantize: str) -> Callable[[str], Tensor]:
        """Reads a weight as the quantised base holds it: rounded, and back in float32."""
        inner = base_model(self.model)
        heads = {id(inner.get_output_embeddings())} | {id(getattr(inner, name, None)) for name in HEAD_NAMES}
        rounded = {
            plain_name(f"{path}.weight")
            for path, module in inner.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in heads and ".lora_" not in path
        }
        return lambda name: _round_trip(self.base.read(name), quantize) if name in rounded else self.base.read(name)


def _round_trip(weight: Tensor, quantize: str) -> Tensor:
    if quantize == "8bit":  # LLM.int8(): each row by its largest value
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round() * scale
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored: Tensor = dequantize_4bit(values, state)
    return restored.float()


def _ends(model: Any) -> tuple[str, str]:
    """Names of the head (empty for a reward model) and of the embedding."""
    names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    return names[id(head)] if head is not None else "", names[id(model.get_input_embeddings())]


def _merged_model(folder: Path, device: torch.device, read: Read | None = None) -> Any:
    """The merged folder as transformers reads it, its weights streamed; ``read`` gives others in their place."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    scores = "SequenceClassification" in config.architectures[0]
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = empty(lambda: auto.from_config(config, dtype=torch.float32))
    head, embedding = _ends(model)
    tied = {head: embedding} if head and config.tie_word_embeddings else {}
    weights = FileWeights(folder, Folder(folder, "the merged folder").weights, tied=tied)
    stream(model, weights, device, read)
    return model


# -- the adapter ------------------------------------------------------------------------------------------------------


def _adapter_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return settings


def _adapter_tensors(folder: str) -> dict[str, Tensor]:
    """The adapter's tensors in float32. A pickled file goes through torch's restricted loader."""
    from peft import load_peft_weights

    try:
        found = load_peft_weights(folder, device="cpu", local_files_only=True)
    except Exception as error:  # absent, cut short, a pickle with code: each library has its own words
        raise ModelError(
            f"the adapter weights in {folder} cannot be read: {type(error).__name__}: {why_unreadable(error)}",
            hint="restore the folder, or train it again",
        ) from error
    # After a vocabulary grew, peft saves the wrapped embedding as well, under names that it does not read itself.
    doubles = [name for name in found if ".modules_to_save." in name or ".original_module." in name]
    for name in doubles:
        del found[name]
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def _refuse_unknown(settings: Mapping[str, Any], folder: str, base: Folder) -> None:
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder} is a {settings.get('peft_type')} adapter; merge knows LORA alone",
            hint="peft's merge_and_unload may know it",
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise ModelError(f"{folder} has the task {settings['task_type']}; merge knows CAUSAL_LM and SEQ_CLS")
    unknown = sorted(key for key, value in settings.items() if value and key not in _KNOWN)
    if unknown:
        raise ModelError(
            f"{folder} uses {', '.join(f'{key} = {json.dumps(settings[key])}' for key in unknown)}, which merge "
            "does not know: the result would be wrong",
            hint="peft's merge_and_unload may know it",
        )
    if settings.get("init_lora_weights", True) not in STARTS_BESIDE_THE_BASE:
        raise ModelError(
            f"{folder} was started with init_lora_weights = {settings['init_lora_weights']}, which changes the base's "
            "own weights: with the base as it is, the result would be wrong",
            hint="convert the adapter with peft's path_initial_model_for_weight_conversion, and merge that",
        )
    quantised = (base.json("config.json") or {}).get("quantization_config")
    if quantised:
        raise ModelError(
            f"the base {base.path} is quantised itself ({quantised.get('quant_method', 'unknown method')}): merging "
            "into rounded weights rounds again",
            hint="name the folder with its 16-bit weights: --base FOLDER",
        )
