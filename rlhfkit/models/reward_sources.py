"""Where PPO's scores come from: reward-model folders, Python functions of one's own, and servers."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import traceback
import types
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhfkit.chat.messages import last_user_text
from rlhfkit.config.blocks import Kernels
from rlhfkit.config.rewards import parse_reward, short_names
from rlhfkit.data.records import PromptRecord
from rlhfkit.errors import RewardError
from rlhfkit.models.folder import open_model
from rlhfkit.models.heads import no_head, stored_head
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.reward_http import HttpReward, check_reachable
from rlhfkit.models.scoring import RewardScorer

SIGNATURE = "def reward(prompts, responses, **columns)"
FRAMES_SHOWN = 6
LARGEST = torch.finfo(torch.float32).max  # scores are float32 from here on
FINITE = f"a score is a finite number of float32, whose largest is {LARGEST:.3g}"


class RewardSource(Protocol):
    """Gives one number to each answer; `WeightedReward` sees to it that it did."""

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> Any: ...


@dataclass
class ModelReward:
    """Scores of a reward model; the answer's text goes through that model's own template."""

    scorer: RewardScorer

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> list[float]:
        return self.scorer.score([r.prompt for r in records], answers)


class FunctionReward:
    """``file.py:function``, called as ``reward(prompts, responses, **columns) -> list[float]``.

    ``prompts`` are the newest user turns, ``responses`` the answers' texts, ``columns`` lists of the rows' other
    fields (of those, a function without ``**`` gets the ones it names), with None for a row that has no such field.

    Args:
        spec: the file and the function.
        columns: the names of the other fields of all rows that may come.

    Raises:
        RewardError: no such file or function, one that does not take these words, or one that needs another column.
    """

    def __init__(self, spec: str, columns: Collection[str] = ()) -> None:
        path, _, name = spec.rpartition(":")
        self.spec = spec
        self._file = Path(path).expanduser()
        self.function = _load_function(self._file, name)
        parameters = list(inspect.signature(self.function).parameters.values())
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters) or (
            not self._takes_all and not {"prompts", "responses"} <= set(named)
        ):
            raise RewardError(
                f"the reward {spec} takes {inspect.signature(self.function)}, and is called with prompts and responses "
                "by name",
                hint=f"write it as {SIGNATURE}",
            )
        self._named = set(named) - {"prompts", "responses"}
        # A row's own "responses" is not what was sampled; the two names belong to us.
        self._columns = sorted(set(columns) - {"prompts", "responses"})
        needed = {name for name in self._named if named[name].default is inspect.Parameter.empty}
        if absent := sorted(needed - set(self._columns)):
            listed = ", ".join(self._columns) or "none"
            raise RewardError(
                f"the reward {self.spec} needs the column {absent[0]}, which the rows do not have",
                hint=f"their other fields: {listed}; give the parameter a default, or the rows the field",
            )

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> Any:
        columns = {
            name: [record.columns.get(name) for record in records]
            for name in self._columns
            if self._takes_all or name in self._named
        }
        prompts = [last_user_text(record.prompt) for record in records]
        try:
            return self.function(prompts=prompts, responses=list(answers), **columns)
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"the reward {self.spec} raised {type(error).__name__}: {error}{self._place(error)}",
                hint=f"it was called with {len(prompts)} prompts and the columns {', '.join(columns) or '(none)'}",
            ) from error

    def _place(self, error: BaseException) -> str:
        """Where it happened, from the first line of the user's own file on."""
        frames = traceback.extract_tb(error.__traceback__)
        own = next((i for i, f in enumerate(frames) if Path(f.filename) == self._file), len(frames))
        shown = frames[own : own + FRAMES_SHOWN]
        return "".join(f"\n  {f.filename}, line {f.lineno}, in {f.name}: {f.line}" for f in shown)


def _load_function(path: Path, name: str) -> Callable[..., Any]:
    """Run the file, once and under a name of its own, and take the function out of it."""
    source = read_reward_file(path, name)
    name_of_module = f"rlhfkit_reward_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    module = types.ModuleType(name_of_module)
    module.__file__ = str(path)
    sys.modules[name_of_module] = module  # dataclasses and pickle look their module up there
    try:
        exec(source, vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name_of_module]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f":{lines[-1]}" if lines else ""
        raise RewardError(
            f"{path}{where}: running the file raised {type(error).__name__}: {error}",
            hint=f"files beside it are imported with: PYTHONPATH={path.parent}"
            if isinstance(error, ModuleNotFoundError)
            else "",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"'{name}' in {path} is a {type(function).__name__}, not a function")
    return function


def read_reward_file(path: Path, name: str) -> types.CodeType:
    """The code of a file of reward functions, compiled and not run.

    Raises:
        RewardError: no such file, no Python in it, or nothing of that name.
    """
    if not path.is_file():
        raise RewardError(f"no file {path} for the reward {path}:{name}", hint="write it as path/to/file.py:function")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
        code: types.CodeType = compile(tree, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        where = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RewardError(f"{path}{where}: this is no Python: {error}") from error
    known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    starred = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in tree.body)
    if name not in code.co_names and not starred:  # neither defined nor assigned nor imported
        raise RewardError(f"{path} has no function '{name}'", hint=f"it has: {', '.join(known) or 'none'}")
    return code


def _checked(name: str, scores: Any, records: Sequence[PromptRecord]) -> list[float]:
    """Scores of a source as floats, one for each record's answer."""
    listed = None
    if not isinstance(scores, (str, bytes, dict)) and hasattr(scores, "__iter__"):
        try:
            listed = list(scores)
        except Exception as error:  # of a generator, which computes only now
            raise RewardError(
                f"the reward {name} raised {type(error).__name__} while its numbers were read: {error}"
            ) from error
    if listed is None:
        raise RewardError(
            f"the reward {name} returned {type(scores).__name__}, not a list of numbers",
            hint="it has to return one number for each response, in their order",
        )
    if len(listed) != len(records):
        raise RewardError(
            f"the reward {name} returned {len(listed)} numbers for {len(records)} answers",
            hint="it has to return one number for each response, in their order",
        )
    values = []
    for i, (score, record) in enumerate(zip(listed, records, strict=True), start=1):
        try:
            value = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not abs(value) <= LARGEST:  # nor is a NaN
            raise RewardError(
                f"the reward {name} returned {score!r} for answer {i} of {len(records)}, to the prompt of "
                f"{record.where}",
                hint=FINITE,
            )
        values.append(value)
    return values


@dataclass
class WeightedReward:
    """Several sources with weights.

    Args:
        sources: name, weight, source.
        names: shorter ones for the log, in the same order.
    """

    sources: list[tuple[str, float, RewardSource]]
    names: list[str]

    def score(
        self, records: Sequence[PromptRecord], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Weighted sums, and each source's own scores by its name for the log.

        Raises:
            RewardError: a source that failed, or gave something other than one finite number per answer.
        """
        components: dict[str, list[float]] = {}
        totals = [0.0] * len(answers)
        for short, (name, weight, source) in zip(self.names, self.sources, strict=True):
            components[short] = _checked(name, source.score(records, answers), records)
            totals = [t + weight * s for t, s in zip(totals, components[short], strict=True)]
        for i, (total, record) in enumerate(zip(totals, records, strict=True)):
            if not abs(total) <= LARGEST:
                parts = [
                    f"{weight:g} x {components[short][i]:g} ({short})"
                    for short, (_, weight, _) in zip(self.names, self.sources, strict=True)
                ]
                raise RewardError(
                    f"the weighted sum of the rewards is {total:g} for answer {i + 1} of {len(records)}, to the prompt "
                    f"of {record.where}: {' + '.join(parts)}",
                    hint=FINITE,
                )
        return totals, components

    @property
    def described(self) -> str:
        """The sources with their weights, where these are not 1."""
        return ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight, _ in self.sources)

    @property
    def cut(self) -> list[bool]:
        """Of each answer scored last, whether a reward model saw a part of its conversation alone; empty without
        reward models."""
        seen = [source.scorer.cut for _, _, source in self.sources if isinstance(source, ModelReward)]
        return [any(each) for each in zip(*seen, strict=True)]


def check_rewards(specs: Sequence[str], timeout: float) -> None:
    """Find out before any model is loaded whether the sources are there. No user's code is run.

    Raises:
        RewardError, ModelError: one is not.
    """
    for spec in map(parse_reward, specs):
        if spec.kind == "url":
            check_reachable(spec, timeout)
        elif spec.kind == "function":
            path, _, name = spec.name.rpartition(":")
            read_reward_file(Path(path).expanduser(), name)
        else:
            judge = open_model(spec.name)
            folders = [Path(folder) for folder in (judge.adapter, judge.base) if folder]
            # (A hub id that is not fetched yet, or weights of another format, are looked at when they are loaded.)
            if any(folders[0].glob("*.safetensors")) and all(stored_head(folder) is None for folder in folders):
                raise no_head(judge)


def open_functions(specs: Sequence[str], columns: Collection[str]) -> dict[str, FunctionReward]:
    """The reward functions among some specs, by name: what is wrong with one is found before a model is loaded.

    Raises:
        RewardError: see `FunctionReward`.
    """
    names = [spec.name for spec in map(parse_reward, specs) if spec.kind == "function"]
    return {name: FunctionReward(name, columns) for name in names}


def open_rewards(
    specs: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch_tokens: int,
    trust_remote_code: bool,
    timeout: float,
    retries: int,
    packing: bool = True,
    kernels: Kernels = "auto",
    columns: Collection[str],
    functions: Mapping[str, FunctionReward],
    say: Callable[[str], None] = lambda words: None,
    policy: LoadedModel | None = None,
) -> WeightedReward:
    """Reward sources from their specs, each optionally ``=weight``.

    A reward model that is an adapter on the base of a LoRA ``policy`` is put there, and no second base is loaded.
    ``columns`` are the names of the rows' other fields, for servers; ``functions`` come from `open_functions`; ``say``
    shows a line of what is tried again.

    Raises:
        RewardError, ModelError: a source that is not there or cannot score.
    """
    parsed = [parse_reward(spec) for spec in specs]
    sources: list[tuple[str, float, RewardSource]] = []
    for spec in parsed:
        source: RewardSource
        if spec.kind == "function":
            source = functions[spec.name]
        elif spec.kind == "url":
            source = HttpReward(spec, timeout=timeout, retries=retries, columns=columns, say=say)
        else:
            source = ModelReward(
                RewardScorer(
                    spec.name,
                    device=device,
                    dtype=dtype,
                    micro_batch_tokens=micro_batch_tokens,
                    trust_remote_code=trust_remote_code,
                    packing=packing,
                    kernels=kernels,
                    policy=policy,
                )
            )
        sources.append((spec.label, spec.weight, source))
    return WeightedReward(sources, short_names(parsed))
