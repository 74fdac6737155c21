"""A recipe to start from: settings that fit a memory size, and every other key with its meaning, commented out."""

from __future__ import annotations

import json
import re
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from rlhfkit.config.load import iterate_fields
from rlhfkit.config.stages import STAGES, TrlConfig
from rlhfkit.errors import ConfigError
from rlhfkit.words import tr

WIDTH = 110
ALWAYS = ("model.path", "data.train", "data.eval", "run.out", "optim.batch_size", "optim.lr", "optim.epochs")
NOT_IN_RECIPES = ("run.resume", "run.plan")  # said on the command line
DATA = {
    "sft": "data/train.jsonl",
    "rm": "data/pairs.jsonl",
    "ppo": "data/prompts.jsonl",
    "dpo": "data/pairs.jsonl",
    "kto": "data/labelled.jsonl",
    "grpo": "data/prompts.jsonl",
    "rloo": "data/prompts.jsonl",
}


@dataclass(frozen=True, slots=True)
class Form:
    """A way to hold and train a model, and the memory it takes: bytes per parameter, activations aside.

    Args:
        words: what it is called.
        trained: of the model with what training needs beside it.
        reference: of the model that the policy is held at, where there is one.
        reward: of a reward model of the same size.
        settings: dotted path -> value.
    """

    words: str
    trained: float
    reference: float
    reward: float
    settings: Mapping[str, Any]


LORA = {"lora.rank": 16, "optim.lr": 2e-4}
# Full weights: 16 bytes of weights, gradients and AdamW, 4 of the reference, 2 of a reward model in 16 bits. Adapters
# have their base as the reference; a reward model stands on a base of its own when it was not trained on the same one.
FORMS = (
    Form("all weights", 16, 4, 2, {}),
    Form("LoRA on a base in 16 bits", 2.2, 0, 2.1, LORA),
    Form("QLoRA: LoRA on a base in 4 bits", 0.75, 0, 0.65, {**LORA, "model.quantize": "4bit"}),
)
REFERENCED = ("ppo", "dpo", "kto", "rloo")  # grpo, too, once its kl_coef is above 0
REWARDED = ("ppo", "grpo", "rloo")
# GiB for activations, logits and the device's own; TRL pads rows, and holds the logits of whole answers.
SPARE, SPARE_TRL = 2.0, 4.0
RATES = {"sft": 2e-4, "rm": 1e-4, **dict.fromkeys(("dpo", "kto"), 2e-5), **dict.fromkeys(REWARDED, 1e-5)}  # of LoRA


def needed_gib(form: Form, stage: str, billions: float) -> float:
    """Memory of a model of so many billion parameters, roughly."""
    held = form.trained + form.reference * (stage in REFERENCED) + form.reward * (stage in REWARDED)
    spare = SPARE_TRL if issubclass(STAGES[stage], TrlConfig) else SPARE
    return held * billions * 1e9 / 2**30 + spare


def choose_form(stage: str, billions: float, memory_gib: float) -> Form:
    """The first form that fits: training all weights before LoRA, LoRA before QLoRA.

    Raises:
        ConfigError: none fits; says how much the smallest needs.
    """
    for form in FORMS:
        if needed_gib(form, stage, billions) <= memory_gib:
            return form
    least = needed_gib(FORMS[-1], stage, billions)
    raise ConfigError(
        f"{billions:g} billion parameters do not fit into {memory_gib:g} GiB for {stage}: "
        f"{FORMS[-1].words} needs about {least:.0f} GiB",
        hint="take a smaller model",
    )


def billions_in_name(name: str) -> float | None:
    """7 of Qwen2.5-7B, 0.135 of SmolLM2-135M; None where a name says nothing."""
    if found := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z0-9])", name.rsplit("/", 1)[-1]):
        return float(found[1]) * (1.0 if found[2] in "bB" else 1e-3)
    return None


def starter_recipe(stage: str, model: str, form: Form, *, note: str, schema: str, positions: int | None = None) -> str:
    """The recipe as YAML with comments.

    Args:
        stage: a training stage.
        model: folder or hub id.
        form: how it is held and trained.
        positions: tokens that the model has positions for, if that is known.
        note: first line, on what this is for.
        schema: file name of the JSON schema, for editors.
    """
    chosen = {
        "model.path": model, "data.train": [DATA[stage]], "data.eval": [DATA[stage].replace(".", "_heldout.")],
        "run.out": f"runs/{stage}", **form.settings,
    }  # fmt: skip
    if "lora.rank" in chosen:
        chosen["optim.lr"] = RATES[stage]
    if stage in REWARDED:
        chosen[f"{stage}.reward"] = ["runs/rm/final"]
    if positions:
        chosen |= _within(stage, positions)
    use = tr(f"# Run it:  rlhfkit {stage} THIS_FILE")
    if "run.plan" not in STAGES[stage].refused:
        use += tr(f"     See first what it needs:  rlhfkit {stage} THIS_FILE --plan")
    lines = [f"# yaml-language-server: $schema={schema}", f"# {note}", use, "", f"stage: {stage}"]
    active = {*chosen, *ALWAYS}
    fields = [f for f in iterate_fields(STAGES[stage]) if f.path != "stage" and f.path not in NOT_IN_RECIPES]
    block = None
    for field in fields:
        if field.block != block:
            block = field.block
            in_use = any(f.path in active for f in fields if f.block == block)
            lines += ["", f"{block}:" if in_use else f"# {block}:"]
        name = field.path.rpartition(".")[2]
        value = chosen.get(field.path, field.info.get_default(call_default_factory=True))
        mark = "" if field.path in active else "# "
        choices = typing.get_args(field.info.annotation) if _is_literal(field.info.annotation) else ()
        words = tr(str(field.info.description)) + (tr(f" One of {', '.join(map(str, choices))}.") if choices else "")
        lines += [f"  # {line}" for line in textwrap.wrap(words, WIDTH - 4)]
        lines.append(f"  {mark}{name}: {json.dumps(value, ensure_ascii=False) if _flow(value) else _plain(value)}")
    return "\n".join(lines) + "\n"


def _within(stage: str, positions: int) -> dict[str, Any]:
    """Lengths that a model with few positions has room for, where the defaults are longer."""
    default: Any = STAGES[stage]()
    if default.data.max_length <= positions:
        return {}
    lengths = {"data.max_length": positions}
    if (block := default.rollouts) is not None and block.max_new_tokens >= positions:
        lengths[f"{stage}.max_new_tokens"] = positions // 2
    return lengths


def json_schema(stage: str) -> dict[str, Any]:
    """Of a stage's recipes, for editors."""
    cls: type[BaseModel] = STAGES[stage]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _flow(value: Any) -> bool:
    return isinstance(value, (list, str)) or value is None or isinstance(value, bool)


def _plain(value: float) -> str:
    # YAML 1.1 reads 1e-05 as text: it wants a point.
    return yaml.safe_dump(value).splitlines()[0]
