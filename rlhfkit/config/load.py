"""Recipe, flags and ``--set`` to one checked configuration; the later one wins.

All faults come in one message, each with its dotted path and, for a near miss, the name that was meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlhfkit.config.blocks import Block
from rlhfkit.config.stages import (
    DpoConfig,
    GenerateConfig,
    GrpoConfig,
    KtoConfig,
    PpoConfig,
    Problem,
    RlooConfig,
    RmConfig,
    ScoreConfig,
    SftConfig,
    changed,
)
from rlhfkit.errors import ConfigError

ConfigT = TypeVar(
    "ConfigT",
    SftConfig,
    RmConfig,
    PpoConfig,
    DpoConfig,
    KtoConfig,
    GrpoConfig,
    RlooConfig,
    GenerateConfig,
    ScoreConfig,
)
RESOLVED = "config.resolved.yaml"  # a run's own recipe, in its folder
# What others call it: transformers' and TRL's arguments, LLaMA-Factory's.
WELL_KNOWN = {
    "learning_rate": "optim.lr", "num_train_epochs": "optim.epochs", "per_device_train_batch_size": "optim.batch_size",
    "train_batch_size": "optim.batch_size", "output_dir": "run.out", "model_name_or_path": "model.path",
    "lr_scheduler_type": "optim.scheduler", "cutoff_len": "data.max_length", "max_seq_length": "data.max_length",
    "dataset": "data.train", "lora_r": "lora.rank", "report_to": "run.trackers", "save_steps": "run.save_every",
    "logging_steps": "run.log_every", "eval_steps": "run.eval_every",
}  # fmt: skip
NOT_RESOLVED = ("resume", "plan")  # say how to start, not what to compute


@dataclass(frozen=True, slots=True)
class FieldPath:
    """A field of a configuration: its dotted path, its definition and the block it stands in ('' at the top)."""

    path: str
    info: FieldInfo
    block: str

    @property
    def flag(self) -> str | None:
        extra = self.info.json_schema_extra
        return str(extra["flag"]) if isinstance(extra, dict) and extra.get("flag") else None


def iterate_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[FieldPath]:
    """All leaf fields of a configuration class, blocks opened; not those that it refuses."""
    refused = getattr(cls, "refused", {})
    for name, info in cls.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner = iterate_fields(info.annotation, f"{prefix}{name}.")
            yield from (field for field in inner if field.path not in refused)
        else:
            yield FieldPath(f"{prefix}{name}", info, prefix.rstrip("."))


def load_config(
    cls: type[ConfigT],
    *,
    recipe: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    not_needed: Collection[str] = (),
) -> ConfigT:
    """The configuration of a stage.

    Args:
        cls: the stage's configuration class.
        recipe: path of a YAML recipe, or its bare name (see `find_recipe`).
        flags: dotted path -> value, as given on the command line.
        sets: ``a.b=c`` strings.
        not_needed: dotted paths of fields and blocks that the stage needs and the caller does not: that they are
            missing, or do not go with others, is passed over.

    Raises:
        ConfigError: every fault found, in one message.
    """
    faults: list[str] = []
    said = {*(flags or {}), *(text.partition("=")[0].strip() for text in sets)}
    raw = read_recipe(recipe) if recipe else {}
    stage = cls.model_fields["stage"].default
    if raw.get("stage", stage) != stage:
        raise ConfigError(
            f"{recipe}: this recipe is for stage '{raw['stage']}', not '{stage}'",
            hint=f"rlhfkit {raw['stage']} {recipe}",
        )
    for path, value in (flags or {}).items():
        _assign(raw, path, value, faults)
    for text in sets:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            faults.append(f"--set {text}: write it as a.b=value")
            continue
        try:
            _assign(raw, path.strip(), yaml.safe_load(value), faults)
        except yaml.YAMLError:
            faults.append(f"--set {text}: the value is no YAML")

    faults += [f"{path}: {why}" for path, why in cls.refused.items() if _take_out(raw, path)]
    config, field_faults = _validate(cls, raw)
    faults += [f"{path}: {words}" for path, words in field_faults]
    if config is not None:
        # A faulty field stands at its default here; what follows from that is no fault of its own.
        passed_over = [path for path, _ in field_faults] + list(not_needed)
        # In a run's own recipe stands what was taken for ``auto``; beside it, what is given alone is meant.
        meant = None if recipe and Path(recipe).name == RESOLVED else config
        found = config.problems() + _without_effect(config, said, meant)
        problems = [p for p in found if not any(_overlap(p[0], path) for path in passed_over)]
        faults += [f"{path}: {words}" for path, words in problems]
    if faults or config is None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        where = f" (recipe {recipe})" if recipe else ""
        raise ConfigError(
            f"{count} in the configuration{where}:\n" + "\n".join(f"  {fault}" for fault in faults),
            hint=f"all options: rlhfkit {stage} --help",
        )
    return config


def _without_effect(config: Block, said: Collection[str], meant: Block | None) -> list[Problem]:
    """Keys that change nothing beside the others. A default is a fault only where it was asked for (``said``); another
    value also where it stands in ``meant``.
    """
    found = []
    for path, why in config.without_effect.items():
        block, _, name = path.rpartition(".")
        if path in said or (meant is not None and changed(getattr(meant, block) if block else meant, name)):
            found.append((path, why))
    return found


def find_recipe(name: str) -> Path:
    """A recipe by path, or by bare name in configs/ and examples/ of the working directory.

    Raises:
        ConfigError: none or several found.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    stem = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    candidates = [Path("configs") / stem, *sorted(Path("examples").glob(f"**/{stem}"))]
    found = [p for p in candidates if p.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"several recipes are called '{name}': {', '.join(map(str, found))}", hint="give the path of one"
        )
    known = sorted({p.stem for folder in ("configs", "examples") for p in Path(folder).glob("**/*.yaml")})
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"looked for {name}, configs/{stem} and examples/**/{stem}"
    raise ConfigError(f"no recipe called '{name}'", hint=hint)


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    path = find_recipe(name)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(
            f"{where}: this is no YAML: {error.problem}{context}",
            hint="blocks are indented with blanks, never tabs; see examples/ and: rlhfkit init",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not a mapping of blocks", hint="see examples/")
    return raw


class OnceLoader(yaml.SafeLoader):
    """YAML in which a key stands once: of two blocks of one name the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def dump_config(config: BaseModel, chosen: Mapping[str, Any] | None = None) -> str:
    """A configuration as a YAML recipe that repeats the run.

    Args:
        config: as it was given.
        chosen: dotted path -> what was taken where the configuration left the choice (``auto``).
    """
    data = config.model_dump(mode="json")
    for path, value in (chosen or {}).items():
        block, _, name = path.partition(".")
        data[block][name] = value
    for name in NOT_RESOLVED:
        data.get("run", {}).pop(name, None)
    for path in getattr(config, "refused", {}):
        block, _, name = path.partition(".")
        data.get(block, {}).pop(name, None)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two dumped configurations differ."""
    paths: list[str] = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            paths += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            paths.append(f"{prefix}{key}")
    return paths


def _assign(raw: dict[str, Any], path: str, value: Any, faults: list[str]) -> None:
    *blocks, leaf = path.split(".")
    target = raw
    for block in blocks:
        inner = target.setdefault(block, {})
        if not isinstance(inner, dict):
            faults.append(f"{path}: '{block}' is a value, not a block")
            return
        target = inner
    target[leaf] = value


def _take_out(raw: dict[str, Any], path: str) -> bool:
    """Remove a key; says whether it was there."""
    block, _, name = path.partition(".")
    values = raw.get(block)
    return isinstance(values, dict) and values.pop(name, raw) is not raw


def _validate(cls: type[ConfigT], raw: dict[str, Any]) -> tuple[ConfigT | None, list[Problem]]:
    """The configuration, and its faults field by field.

    With faulty fields put back to their defaults the rest is still checked, so that one message names everything.
    """
    try:
        return cls.model_validate(raw), []
    except ValidationError as error:
        faults = []
        repaired = _copy(raw)
        for fault in error.errors():
            at = ".".join(str(part) for part in fault["loc"])
            paths = _leaves(at, fault["input"]) if fault["type"] == "extra_forbidden" else [at]
            faults += [(path, _words(cls, path, fault)) for path in paths]
            _drop(repaired, fault["loc"])
        try:
            return cls.model_validate(repaired), faults
        except ValidationError:
            return None, faults


def _leaves(path: str, value: Any) -> list[str]:
    """The dotted paths of what stands in a block."""
    if not isinstance(value, dict) or not value:
        return [path]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{path}.{key}", inner)]


def _overlap(path: str, other: str) -> bool:
    """Whether one dotted path is the other or within it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _words(cls: type[Block], path: str, fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        message = "a block of keys belongs here, not a value" if fault["type"] == "model_type" else str(fault["msg"])
        message = message[0].lower() + message[1:]
        found = fault.get("input")
        return message if isinstance(found, dict) else f"{message} (found {found!r})"
    paths = [field.path for field in iterate_fields(cls)]
    leaf = path.rsplit(".", 1)[-1]
    flags = {(field.flag or "").removeprefix("--").replace("-", "_"): field.path for field in iterate_fields(cls)}
    meant = [p for p in paths if p.rsplit(".", 1)[-1] == leaf] or [flags[leaf]] if leaf in flags else []
    meant = meant or difflib.get_close_matches(path, paths, n=2, cutoff=0.75)
    meant = meant or ([WELL_KNOWN[leaf]] if WELL_KNOWN.get(leaf) in paths else [])
    if not meant:
        blocks = sorted({p.partition(".")[0] for p in paths if "." in p})
        meant = difflib.get_close_matches(path, blocks, n=1, cutoff=0.75)
    if not meant:
        leaves = {p.rsplit(".", 1)[-1]: p for p in paths}
        meant = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.75)]
    return f"unknown key; did you mean {' or '.join(meant)}?" if meant else "unknown key"


def _copy(raw: Any) -> Any:
    return {k: _copy(v) for k, v in raw.items()} if isinstance(raw, dict) else raw


def _drop(raw: dict[str, Any], loc: Sequence[int | str]) -> None:
    """Remove the value at ``loc``, or the nearest thing above it that a mapping holds."""
    target: Any = raw
    for part in loc[:-1]:
        if not isinstance(target, dict) or not isinstance(target.get(str(part)), dict):
            if isinstance(target, dict):
                target.pop(str(part), None)
            return
        target = target[str(part)]
    if isinstance(target, dict):
        target.pop(str(loc[-1]), None)
