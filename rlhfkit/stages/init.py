"""``rlhfkit init``: writes a commented recipe and the schema that lets editors check it."""

from __future__ import annotations

import json
from pathlib import Path

from rlhfkit.config.starter import (
    DATA,
    FORMS,
    Form,
    billions_in_name,
    choose_form,
    json_schema,
    needed_gib,
    starter_recipe,
)
from rlhfkit.errors import ConfigError
from rlhfkit.families.registry import named_family
from rlhfkit.models.folder import open_model
from rlhfkit.runtime.records import replace_text
from rlhfkit.words import tr

STAGES = tuple(DATA)


def run(stage: str, *, model: str, family: str, memory_gib: float, out: Path | None, force: bool) -> tuple[Path, Path]:
    """Write a recipe; returns its path and its schema's.

    Args:
        stage: a training stage.
        model: folder or hub id; the largest of the family's that fits is taken if it is empty.
        family: whose models to choose from.
        memory_gib: what the GPU, or the machine, has.
        out: the recipe; configs/STAGE.yaml by default.
        force: write over a file that is there.

    Raises:
        ConfigError: an unknown stage or family, a model that does not fit or whose size is not known, an existing file.
    """
    if stage not in STAGES:
        raise ConfigError(f"there is no recipe for '{stage}'", hint=f"choose of {', '.join(STAGES)}")
    target = out or Path("configs") / f"{stage}.yaml"
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already", hint="give another --out, or --force to write over it")
    if model:
        billions = _billions(model)
        form = choose_form(stage, billions, memory_gib)
    else:
        model, billions, form = _largest(stage, family, memory_gib)
    schema = target.with_name(f"{stage}.schema.json")
    note = (
        f"{stage} of {model} in {memory_gib:g} GiB: {form.words}, which needs about "
        f"{needed_gib(form, stage, billions):.0f} GiB."
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(schema, json.dumps(json_schema(stage), indent=2) + "\n")
    recipe = starter_recipe(stage, model, form, note=tr(note), schema=schema.name, positions=_positions(model))
    replace_text(target, recipe)
    return target, schema


def _billions(model: str) -> float:
    """Size of a model: of a folder by its files, of a hub id by its name, of a LoRA folder by its base."""
    folder = Path(model)
    if (folder / "adapter_config.json").is_file():
        return _billions(open_model(model).base)
    if folder.is_dir():
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        config = folder / "config.json"
        kind = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        width = 4 if str(kind.get("dtype") or kind.get("torch_dtype") or "float32").endswith("float32") else 2
        if size := sum(path.stat().st_size for path in files):
            return size / width / 1e9
    if (found := billions_in_name(model)) is not None:
        return found
    raise ConfigError(
        f"how large {model} is cannot be told from its name", hint="give a local folder, or a name like Qwen2.5-7B"
    )


def _positions(model: str) -> int | None:
    """Tokens that a model folder has positions for; nothing is downloaded to find out."""
    return open_model(model).positions if Path(model).is_dir() else None


def _largest(stage: str, family: str, memory_gib: float) -> tuple[str, float, Form]:
    """The family's largest model that fits, trained in the best form that fits it."""
    starters = sorted(named_family(family).starters, key=lambda starter: -starter[1])
    if not starters:
        raise ConfigError(f"the family '{family}' names no models to start from", hint="give --model")
    for name, billions in starters:
        if needed_gib(FORMS[-1], stage, billions) <= memory_gib:
            return name, billions, choose_form(stage, billions, memory_gib)
    name, billions = starters[-1]
    choose_form(stage, billions, memory_gib)
    raise AssertionError("unreachable: nothing fits, and choose_form says so")
