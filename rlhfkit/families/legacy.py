"""Facts about checkpoints that came with Python code of their own, and how they become ones of transformers' classes.

A layout is a table: which tensor goes where, which key of config.json has which name. Nothing of a model folder is
run. `LegacyLayout.layer` and ``logits`` say once more, in equations, what the original code computes; a conversion is
proved by comparing them with the class of transformers on the converted weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One tensor of the original; ``{i}`` in a name stands for the number of a layer.

    Args:
        original: its name.
        native: its name in transformers' class; several names cut it into as many equal parts along its rows.
        unit_rows: the original scales every row to length one where it is used, so the native one is stored like that.
    """

    original: str
    native: tuple[str, ...]
    unit_rows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRule:
    """One key of the native config.json.

    Args:
        native: its name.
        original: names that releases of the original give it, the first one present counts.
        divide: the original's number is so many times larger.
        default: value when the original does not say; None refuses it.
    """

    native: str
    original: tuple[str, ...]
    divide: int = 1
    default: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What config.json must say, or not mention, for the mapping to be right.

    Args:
        keys: names of the key.
        value: the only value that fits.
        why: what the original computes otherwise.
    """

    keys: tuple[str, ...]
    value: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiktoken:
    """A vocabulary in tiktoken's format.

    Args:
        file: its name in the model folder.
        pattern: how text is cut before any merge.
        specials: tokens whose ids follow those of the file.
    """

    file: str
    pattern: str
    specials: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentencepiece:
    """A sentencepiece BPE model; all but the roles stands in the file itself.

    Args:
        file: its name in the model folder.
        roles: pieces that open a turn.
        adds_bos: whether the tokenizer puts a bos in front when its configuration does not say.
    """

    file: str = "tokenizer.model"
    roles: tuple[str, ...] = ()
    adds_bos: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What the equations need of the native config.json."""

    heads: int
    eps: float
    theta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyLayout:
    """One layout of the original files.

    Args:
        name: what messages call it.
        native_type, native_class: ``model_type`` and class in transformers.
        tensors: every tensor of the original.
        dropped: endings of names that hold nothing learned.
        config: where the native config.json takes its values from.
        constants: native keys that are the same for every member.
        conditions: what must hold.
        head_width: keys that may name the width of an attention head, which must be hidden size / heads.
        tokenizer: the vocabulary.
        template: name of the chat template.
        not_generation: keys of generation_config.json that only the original code reads.
        layer: (tensors of a layer under the names after its prefix, hidden states [1, T, H], shape) -> hidden states.
        logits: (normed hidden states [1, T, H], some rows of the head) -> logits.
        refused: why there is no native class for it; empty where there is one.
        classes: for such a layout, gives the adapter's own classes under the original's names: configuration, trunk,
            language model, sequence classifier. The checkpoint is not converted then: it keeps its layout.
        lora_targets: names of their linear layers.
    """

    name: str
    native_type: str
    native_class: str
    tensors: tuple[TensorRule, ...]
    config: tuple[ConfigRule, ...]
    tokenizer: Tiktoken | Sentencepiece
    template: str
    layer: Callable[[Mapping[str, Any], Any, Shape], Any]
    logits: Callable[[Any, Any], Any]
    constants: Mapping[str, Any]
    dropped: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()
    head_width: tuple[str, ...] = ()
    not_generation: tuple[str, ...] = ()
    refused: str = ""
    classes: Callable[[], tuple[Any, Any, Any, Any]] | None = None
    lora_targets: tuple[str, ...] = ()


# -- parts of the equations; torch tensors throughout ------------------------------------------------------------------


def rms_norm(hidden: Any, weight: Any, eps: float) -> Any:
    """Zhang & Sennrich 2019."""
    import torch

    return weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps))


def attention(query: Any, key: Any, value: Any, heads: int, theta: float) -> Any:
    """Causal attention with rotary positions over the two halves of each head (Su et al. 2021, as in GPT-NeoX).

    Args:
        query, key, value: [1, T, H].
    """
    import torch

    length, width = query.shape[1], query.shape[2] // heads
    split = [states.view(1, length, heads, width).transpose(1, 2) for states in (query, key, value)]
    frequency = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    angle = torch.outer(torch.arange(length).float(), frequency)
    cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)

    def turned(states: Any) -> Any:
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-second, first], dim=-1) * sin

    out = torch.nn.functional.scaled_dot_product_attention(turned(split[0]), turned(split[1]), split[2], is_causal=True)
    return out.transpose(1, 2).reshape(1, length, heads * width)
