"""Where PPO's scores come from: a reward-model folder, or a Python function of one's own."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhfkit.data.records import PromptRecord
from rlhfkit.data.sources import parse_source
from rlhfkit.errors import RewardError
from rlhfkit.models.scoring import RewardScorer


class RewardSource(Protocol):
    """Gives one number to each answer."""

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> list[float]: ...


@dataclass
class ModelReward:
    """Scores of a reward model; the answer's text goes through that model's own template."""

    scorer: RewardScorer

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> list[float]:
        return self.scorer.score([r.prompt for r in records], answers)


class FunctionReward:
    """``file.py:function``, called as ``reward(prompts, responses, **columns) -> list[float]``.

    ``prompts`` are the newest user turns, ``responses`` the answers' texts, ``columns`` lists of the rows' other
    fields (of those, a function without ``**`` gets the ones it names).

    Raises:
        RewardError: no such file or function.
    """

    def __init__(self, spec: str) -> None:
        path, _, name = spec.rpartition(":")
        self.spec = spec
        self.function = _load_function(Path(path).expanduser(), name)
        parameters = inspect.signature(self.function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in parameters} - {"prompts", "responses"}

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> list[float]:
        # A row's own "responses" is not what was sampled; the two names belong to us.
        names = sorted({name for record in records for name in record.columns} - {"prompts", "responses"})
        columns = {
            name: [record.columns.get(name) for record in records]
            for name in names
            if self._takes_all or name in self._named
        }
        prompts = [record.prompt[-1].content for record in records]
        try:
            scores = self.function(prompts=prompts, responses=list(answers), **columns)
        except Exception as error:
            raise RewardError(
                f"the reward {self.spec} raised {type(error).__name__}: {error}",
                hint=f"it was called with {len(prompts)} prompts and the columns {', '.join(columns) or '(none)'}",
            ) from error
        return _checked(self.spec, scores, len(answers))


def _load_function(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise RewardError(f"no file {path} for the reward {path}:{name}", hint="write it as path/to/file.py:function")
    name_of_module = f"rlhfkit_reward_{path.stem}_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name_of_module, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} is no Python file", hint="write it as path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name_of_module] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name_of_module]
        raise RewardError(f"{path} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise RewardError(f"{path} has no function '{name}'", hint=f"it has: {', '.join(known) or 'none'}")
    return function


def _checked(name: str, scores: Any, count: int) -> list[float]:
    try:
        values = [float(s) for s in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(f"the reward {name} returned {type(scores).__name__}, not a list of numbers") from error
    if len(values) != count:
        raise RewardError(f"the reward {name} returned {len(values)} numbers for {count} answers")
    if bad := [i for i, v in enumerate(values) if not math.isfinite(v)]:
        raise RewardError(f"the reward {name} returned {values[bad[0]]} for answer {bad[0]} of {count}")
    return values


@dataclass
class WeightedReward:
    """Several sources with weights; ``components`` of the last call are kept for the log."""

    sources: list[tuple[str, float, RewardSource]]

    def score(
        self, records: Sequence[PromptRecord], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Weighted sums, and each source's own scores by its name."""
        components: dict[str, list[float]] = {}
        totals = [0.0] * len(answers)
        for name, weight, source in self.sources:
            components[name] = _checked(name, source.score(records, answers), len(answers))
            totals = [t + weight * s for t, s in zip(totals, components[name], strict=True)]
        return totals, components


def is_function(spec: str) -> bool:
    """Whether a reward spec (its weight may still be on it) names ``file.py:function``."""
    path, _, function = spec.partition("=")[0].rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def open_rewards(
    specs: Sequence[str], *, device: torch.device, dtype: torch.dtype, micro_batch_tokens: int, trust_remote_code: bool
) -> WeightedReward:
    """Reward sources from their specs, each optionally ``=weight``.

    Raises:
        RewardError, ModelError: a source that is not there or cannot score.
    """
    sources: list[tuple[str, float, RewardSource]] = []
    for spec in specs:
        parsed = parse_source(spec)
        source: RewardSource
        if is_function(parsed.name):
            source = FunctionReward(parsed.name)
        else:
            scorer = RewardScorer(
                parsed.name,
                device=device,
                dtype=dtype,
                micro_batch_tokens=micro_batch_tokens,
                trust_remote_code=trust_remote_code,
            )
            source = ModelReward(scorer)
        sources.append((parsed.name, parsed.weight, source))
    return WeightedReward(sources)
