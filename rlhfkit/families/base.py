"""What a model family is: facts first, one frozen dataclass per family, no torch.

An adapter package exposes one module-level ``FAMILY`` and names it in its entry points::

    [project.entry-points."rlhfkit.adapters"]
    qwen = "rlhfkit_adapters.qwen:FAMILY"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhfkit.families.legacy import LegacyLayout, Sentencepiece


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about one family of checkpoints.

    Args:
        name: what ``--family`` takes and messages show.
        title: one line for ``rlhfkit families``.
        model_types: values of ``model_type`` in config.json that this family claims.
        compatible_model_types: further values it accepts when the user asks for it by name (a converted Baichuan2
            says ``llama``).
        template: name of the default chat template, used when the tokenizer brings none.
        pad_candidates: token strings fit to be the pad, best first; the first one in the vocabulary is taken when the
            tokenizer has no pad or one equal to eos. When none is there, ``<|pad|>`` is added.
        stop_candidates: token strings that end a turn or a text in this family. Those in the vocabulary form the
            stop list of generation_config, the template's own end of turn first.
        lora_targets: names of the linear layers that ``--lora-targets auto`` adapts.
        requires_conversion: model types whose remote code is unsafe under today's transformers (random weights,
            uninitialised rotary tables): such a checkpoint is converted on its way in.
        legacy_layout: function (config.json as a dict, rows of the embedding) -> layout of a checkpoint of those types.
        bare_sentencepiece: how a folder with a ``tokenizer.model`` and no ``tokenizer.json`` is read; None leaves it to
            transformers.
        template_for: optional function (config.json as a dict, tokenizer vocabulary) -> template name, for families
            whose members use different formats.
        starters: hub ids of chat models to start from and their sizes in billions of parameters, for ``rlhfkit init``.
        notes: facts worth showing in ``rlhfkit families``.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    template: str
    pad_candidates: tuple[str, ...]
    stop_candidates: tuple[str, ...]
    lora_targets: tuple[str, ...]
    compatible_model_types: tuple[str, ...] = ()
    requires_conversion: tuple[str, ...] = ()
    legacy_layout: Callable[[Mapping[str, Any], int], LegacyLayout] | None = None
    bare_sentencepiece: Sentencepiece | None = None
    template_for: Callable[[Mapping[str, Any], Mapping[str, int]], str] | None = None
    starters: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def choose_template(self, config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str:
        """Name of the default template for a checkpoint with this config.json and vocabulary."""
        if self.template_for is not None:
            return self.template_for(config, vocabulary)
        return self.template
