"""What trackers get beside numbers: answers as text, and distributions. Numbers and settings go through Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from rlhfkit.errors import ConfigError

EXTRAS = ("wandb", "swanlab", "mlflow")  # of our own package
QUANTILES = (0.1, 0.5, 0.9)  # of a distribution, for trackers without histograms


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what Accelerate would leave out without a word.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    installed = {LoggerType(tracker).value for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(f"run.trackers: there is no tracker '{name}'", hint=f"choose of {', '.join(known)}, none")
        if name not in installed:
            package = f"'rlhfkit[{name}]'" if name in EXTRAS else name
            raise ConfigError(f"run.trackers: {name} is not installed", hint=f"pip install {package}")


def track_samples(trackers: Iterable[Any], rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Hand answers to the trackers, as a table where they know tables, else as text."""
    if not rows:
        return
    columns = list(rows[0])
    data = [[row[column] for column in columns] for row in rows]
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.log_table("samples", columns=columns, data=data, step=step)
        elif tracker.name == "mlflow":
            import mlflow

            mlflow.log_table({c: [row[c] for row in rows] for c in columns}, f"samples/step-{step}.json")
        elif tracker.name == "swanlab":
            import swanlab

            tracker.log({"samples": [swanlab.Text(_lines(row)) for row in rows]}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log({"samples": _markdown(columns, data)}, step=step)


def track_histogram(trackers: Iterable[Any], name: str, values: Sequence[float], step: int) -> None:
    """Hand a distribution to the trackers, as a histogram where they know one, else as quantiles."""
    import numpy as np

    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_histogram(name, np.asarray(values), global_step=step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Histogram(list(values))}, step=step)
        else:
            found = np.quantile(np.asarray(values), QUANTILES)
            named = {f"{name}/p{round(100 * q)}": float(v) for q, v in zip(QUANTILES, found, strict=True)}
            tracker.log(named, step=step)


def _markdown(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *data]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def _lines(row: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in row.items())
