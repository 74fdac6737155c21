"""The evaluation of a reward model for people: figures, reliability table, histograms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.bar import Bar
from rich.table import Table

from rlhfkit.algo.calibration import EvaluationReport, Histogram, ReliabilityBin
from rlhfkit.runtime.records import replace_text
from rlhfkit.runtime.run import Run
from rlhfkit.words import mark, tr

EVALUATION = "evaluation.json"
BAR_WIDTH = 20  # characters


def write_evaluation(run: Run, report: EvaluationReport) -> None:
    """Show the last evaluation of a run, and keep it as ``evaluation.json`` in its folder."""
    if run.is_main:
        facts = {"step": run.step, "precision": run.precision, **report.as_dict()}
        replace_text(run.out / EVALUATION, json.dumps(facts, indent=2) + "\n")
    for table in report_tables(report):
        run.screen.table(table)


def report_tables(report: EvaluationReport) -> Iterator[Table]:
    """What a report says, table by table."""
    yield _figures(report)
    yield _reliability(report.reliability)
    yield histogram_table(report.histogram, tr("scores of the better and the worse answers"))


def _figures(report: EvaluationReport) -> Table:
    table = Table(title=tr(f"{report.pairs:,} pairs of {report.prompts:,.0f} prompts"))
    table.add_column(tr("figure"))
    table.add_column(tr("value"), justify="right")
    table.add_column(tr("meaning"))
    ties = f"; {report.ties:,} ties" if report.ties else ""
    for row in (
        (mark("accuracy"), f"{report.accuracy:.1%}", f"the better answer scores higher{ties}"),
        (mark("margin"), f"{report.margin:.3f} ± {report.margin_std:.3f}", "r_chosen - r_rejected, mean and spread"),
        ("log loss", f"{report.log_loss:.3f}", "0.693 is what equal scores give"),
        (mark("confidence"), f"{report.confidence:.1%}", "what accuracy the scores promise"),
        ("calibration error", f"{report.calibration_error:.3f}", "how far promise and truth are apart"),
        ("chosen", f"{report.reward_chosen:.3f} ± {report.reward_chosen_std:.3f}", "scores, mean and spread"),
        ("rejected", f"{report.reward_rejected:.3f} ± {report.reward_rejected_std:.3f}", "scores, mean and spread"),
    ):
        table.add_row(*map(tr, row))
    return table


def _reliability(bins: Sequence[ReliabilityBin]) -> Table:
    table = Table(title=tr("reliability: how often the higher score is the better answer"))
    for heading in (
        tr("predicted"), tr("pairs"), tr("mean predicted"), tr("observed"), tr("observed - predicted"),
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for b in bins:
        row = [tr(f"{b.low:.3g} to {b.high:.3g}"), f"{b.pairs:,}"]
        if b.predicted is not None and b.observed is not None:
            row += [f"{b.predicted:.3f}", f"{b.observed:.3f}", f"{b.observed - b.predicted:+.3f}"]
        table.add_row(*row)
    return table


def histogram_table(found: Histogram, title: str) -> Table:
    """Bars side by side, one column for each set of scores."""
    table = Table(title=title)
    table.add_column(tr("score"), justify="right")
    for name in found.counts:
        table.add_column(tr(name), min_width=BAR_WIDTH)
        table.add_column(tr("share"), justify="right")
    totals = {name: sum(values) for name, values in found.counts.items()}
    shares = {name: [v / totals[name] for v in values] for name, values in found.counts.items()}
    most = max(max(values) for values in shares.values())
    for i, (low, high) in enumerate(zip(found.edges[:-1], found.edges[1:], strict=True)):
        cells: list[Bar | str] = []
        for values in shares.values():
            cells += [Bar(most, 0, values[i], width=BAR_WIDTH), f"{values[i]:.1%}"]
        table.add_row(tr(f"{low:g} to {high:g}"), *cells)
    return table
