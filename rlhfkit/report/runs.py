"""What run folders say, read without any model: settings, metrics, samples, the reward model's evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhfkit.config.rewards import without_secrets
from rlhfkit.errors import ConfigError
from rlhfkit.runtime.records import json_lines

Row = dict[str, Any]
DATA_FAULTS = "data_faults.txt"  # in a run folder: a sentence on each line


@dataclass(frozen=True)
class RunRecord:
    """One run folder. ``steps`` are the lines of metrics.jsonl without an event, in order."""

    folder: Path
    name: str  # short, and different from the other runs' of the report
    stage: str
    config: dict[str, Any]
    config_text: str
    steps: list[Row]
    start: Row | None = None
    end: Row | None = None
    samples: list[Row] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None  # of a finished reward model
    data_faults: list[str] = field(default_factory=list)  # rows that were skipped, left out or cut

    def setting(self, path: str) -> Any:
        """A value of the configuration by its dotted path; None if there is none."""
        found: Any = self.config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was measured; an evaluation before training is step 0."""
        rows = [self.start, *self.steps] if self.start and key.startswith("eval_") else self.steps
        points = [(row["step"], row[key]) for row in rows if row is not None and isinstance(row.get(key), (int, float))]
        return [float(x) for x, _ in points], [float(y) for _, y in points]

    def values(self, key: str) -> list[float]:
        """Values of a metric, where it was measured."""
        return self.series(key)[1]

    def evaluations(self) -> tuple[Row, Row] | None:
        """The first and the last evaluation, if there were two."""
        rows = [self.start, *self.steps] if self.start else self.steps
        found = [row for row in rows if row is not None and any(key.startswith("eval_") for key in row)]
        return (found[0], found[-1]) if len(found) > 1 else None


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders. A folder that is no run itself, as that of a demo, gives the runs in it.

    Raises:
        ConfigError: a folder without any run in it, or one whose files cannot be read.
    """
    found: list[Path] = []
    for folder in folders:
        if folder.is_file() and len(folders) > 1:  # runs/demo/* has the last report among the runs
            continue
        inside = [folder] if _is_run(folder) else sorted(p for p in folder.glob("*") if _is_run(p))
        if not inside and _is_run(folder.parent):  # final/ or value/ of a run
            inside = [folder.parent]
        if not inside:
            what = "there is no such folder" if not folder.exists() else "there is no metrics.jsonl in it"
            raise ConfigError(f"{folder} is no run folder: {what}", hint="give what --out was: rlhfkit report runs/sft")
        found += [p for p in inside if p not in found]
    if not found:
        raise ConfigError("none of these is a run folder", hint="give what --out was: rlhfkit report runs/sft")
    runs = [_read(folder, name) for folder, name in zip(found, _names(found), strict=True)]
    order = list(dict.fromkeys(["sft", "rm", "ppo", *(run.stage for run in runs)]))
    return sorted(runs, key=lambda run: order.index(run.stage))


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def _read(folder: Path, name: str) -> RunRecord:
    path = folder / "config.resolved.yaml"
    try:
        text = without_secrets(path.read_text(encoding="utf-8"))
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="it is written when a run starts") from error
    rows = _rows(folder / "metrics.jsonl")
    events = {row["event"]: row for row in rows if "event" in row}
    evaluation, faults = folder / "evaluation.json", folder / DATA_FAULTS
    return RunRecord(
        folder=folder,
        name=name,
        stage=str(config.get("stage", "unknown")),
        config=config,
        config_text=text,
        steps=[row for row in rows if "event" not in row],
        start=events.get("start"),
        end=events.get("end"),
        samples=_rows(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else [],
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None,
        data_faults=faults.read_text(encoding="utf-8").splitlines() if faults.is_file() else [],
    )


def _rows(path: Path) -> list[Row]:
    rows = []
    for line in json_lines(path):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed, or is being written now
            continue
    return rows


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    parts = 1
    while len({p[-parts:] for p in whole}) < len(whole) and parts < max(map(len, whole)):
        parts += 1
    return ["/".join(p[-parts:]) for p in whole]
