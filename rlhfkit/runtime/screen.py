"""What a run says while it runs: a live picture on a terminal, plain lines elsewhere, nothing from other processes."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlhfkit.runtime.records import finite
from rlhfkit.words import tr

View = Literal["auto", "plain", "quiet", "json"]
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32  # characters of a sparkline
FOOT = (("tokens_per_second", "tokens/s"), ("peak_memory_gib", "GiB"))  # shown in every stage

SECONDS_BETWEEN_LINES = 30  # where there is no bar


class Screen:
    """Writes for people, on standard error: standard output is for results.

    Args:
        speaks: false on all processes but the main one.
        view: ``auto`` is a live picture on a terminal and plain lines elsewhere; ``plain`` are lines on a terminal too;
            ``quiet`` says nothing; ``json`` writes the records of metrics.jsonl to standard output, and nothing else.
    """

    def __init__(self, speaks: bool = True, view: View = "auto") -> None:
        quiet = not speaks or view in ("quiet", "json")
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._writes_records = speaks and view == "json"
        self._moves = self.console.is_terminal and not quiet and view == "auto"
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._course: dict[str, list[float]] = {}
        self._started = 0.0

    def line(self, text: str, *, style: str | None = None) -> None:
        self.console.print(tr(text), style=style, markup=False)

    def table(self, table: Table) -> None:
        self.console.print(table)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[..., None]]:
        """Progress over ``total`` things of one kind, 0 if their number is not known. Gives a function to call for each
        of them, or with the number of several."""
        if not self._moves:
            started = spoken = time.monotonic()
            done = 0

            def count(more: int = 1) -> None:
                nonlocal done, spoken
                done += more
                if (now := time.monotonic()) - spoken > SECONDS_BETWEEN_LINES:
                    spoken = now
                    said = f"{done:,} of about {total:,}" if total else f"{done:,}"
                    self.line(f"{tr(what)}{tr(': ')}{tr(said)}")

            yield count
            if (seconds := time.monotonic() - started) > 1:
                self.line(f"{tr(what)}{tr(': ')}{tr(f'{done:,} in {seconds:.1f} s')}")
            return
        with Progress(*_COLUMNS, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(tr(what), total=total or None)
            yield lambda more=1: progress.advance(task, more)

    def record(self, row: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, for whoever reads standard output."""
        if self._writes_records:
            print(json.dumps(finite(row), ensure_ascii=False), flush=True)

    @contextmanager
    def steps(self, what: str, total: int, done: int) -> Iterator[None]:
        """Progress over optimiser steps; `step` is called after each."""
        self._started = time.monotonic()
        self._first = done
        self._course = {}
        if not self._moves:
            yield
            return
        # Not a bar's own estimate: it forgets speeds of half a minute ago, which a step may take.
        bar = Progress(*_COLUMNS, TextColumn("{task.fields[left]}"), console=self.console)
        bar.add_task(tr(what), total=total, completed=done, left="")
        self._bar = bar
        with Live(bar, console=self.console, refresh_per_second=4) as self._live:
            try:
                yield
            finally:
                self._bar = None
        self._live = None

    def step(self, step: int, total: int, metrics: Mapping[str, Any], names: tuple[str, ...], *, speak: bool) -> None:
        """Show one finished step; ``names`` are the metrics worth a place on the line."""
        # A first step warms up: it says less of the others than they do of each other.
        seconds = (time.monotonic() - self._started) / max(1, step - self._first) * (total - step)
        for name in names:
            if isinstance(metrics.get(name), (int, float)):
                self._course.setdefault(name, []).append(float(metrics[name]))
        if self._live is not None and self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=step, left=tr(f"{clock(seconds)} left") if seconds else ""
            )
            foot = "  ".join(f"{short(metrics[key])} {unit}" for key, unit in FOOT if key in metrics)
            self._live.update(Group(self._bar, _picture(self._course), Text(f"  {foot}", style="dim")))
        elif speak:
            words = "  ".join(f"{n} {short(metrics[n])}" for n in names if n in metrics)
            self.line(f"{tr(f'step {step}/{total}')}  {words}  {tr(f'{clock(seconds)} left')}")


_COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())


def _picture(course: Mapping[str, Sequence[float]]) -> Table:
    """Each metric with its last value and its course since the run was started or resumed."""
    table = Table.grid(padding=(0, 2, 0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    for name, values in course.items():
        table.add_row(name, short(values[-1]), sparkline(values))
    return table


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Values as a line of blocks, the lowest the smallest; many values are averaged to fit."""
    known = [v for v in values if v == v and abs(v) != float("inf")]
    if len(known) > width:
        cuts = [round(i * len(known) / width) for i in range(width + 1)]
        known = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    if high == low:
        return BLOCKS[3] * len(known)
    return "".join(BLOCKS[min(7, int((v - low) / (high - low) * 8))] for v in known)


def clock(seconds: float) -> str:
    """12 s, 3:05 min or 1:02 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def quiet_libraries() -> None:
    """Our own screen speaks; the libraries' bars and hints about optional kernels would tear it apart."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b")


def short(value: Any) -> str:
    """A number in four or so significant digits."""
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return str(value)
