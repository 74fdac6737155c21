"""What a run says while it runs: a progress bar on a terminal, plain lines elsewhere, nothing from other processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Screen:
    """Writes for people, on standard error: standard output is for results.

    Args:
        speaks: false on all processes but the main one.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not speaks, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._progress: Progress | None = None
        self._task: Any = None
        self._started = 0.0

    def line(self, text: str, *, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def table(self, table: Table) -> None:
        self.console.print(table)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Progress over ``total`` things of one kind; gives a function to call for each."""
        if not self.console.is_terminal or self.console.quiet:
            started = time.monotonic()
            yield lambda: None
            if (seconds := time.monotonic() - started) > 1:
                self.line(f"{what}: {total:,} in {seconds:.1f} s")
            return
        with self._bar() as progress:
            task = progress.add_task(what, total=total, words="")
            yield lambda: progress.advance(task)

    @contextmanager
    def steps(self, what: str, total: int, done: int) -> Iterator[None]:
        """Progress over optimiser steps; `step` is called after each."""
        self._started = time.monotonic()
        self._first = done
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        with self._bar() as progress:
            self._progress, self._task = progress, progress.add_task(what, total=total, completed=done, words="")
            try:
                yield
            finally:
                self._progress = None

    def step(self, step: int, total: int, metrics: Mapping[str, Any], names: tuple[str, ...], *, speak: bool) -> None:
        """Show one finished step; ``names`` are the metrics worth a place on the line."""
        words = "  ".join(f"{n} {short(metrics[n])}" for n in names if n in metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, words=words)
        elif speak:
            left = (time.monotonic() - self._started) / max(1, step - self._first) * (total - step)
            self.line(f"step {step}/{total}  {words}  left {left / 60:.1f} min")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=self.console,
        )


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
