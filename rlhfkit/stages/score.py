"""Scores of a reward model: one for each answer, and what they are worth where answers are ranked.

Rows are tokenised and cut as in training, so an answer gets the score that training gave it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rlhfkit.algo.calibration import EvaluationReport, evaluation_report, histogram
from rlhfkit.config.sources import parse_source
from rlhfkit.config.stages import ScoreConfig
from rlhfkit.data.records import PreferenceRecord
from rlhfkit.data.sources import load_records
from rlhfkit.data.tokenize import TokenReport, tokenize_pairs
from rlhfkit.errors import ConfigError, DataError, NonFiniteError, TemplateError
from rlhfkit.models.precision import DTYPES, current_device
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.runtime.records import replace_text
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.stages.common import say_source
from rlhfkit.stages.reward_report import histogram_table, report_tables
from rlhfkit.words import mark, tr

ROWS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Scores in the order of the data, and what the command prints.

    Args:
        where: the row's place, as ``file:line``.
        scores: one list a row, best answer first where answers are ranked.
        normalized: the same as (score - mean) / std of the model's record; None if it has none.
        report: figures over the pairs; None where no row has two answers.
        totals: what ``--json`` prints.
    """

    where: list[str]
    scores: list[list[float]]
    normalized: list[list[float]] | None
    report: EvaluationReport | None
    totals: dict[str, Any]


def run(config: ScoreConfig) -> ScoreResult:
    """Score as configured; the result goes to standard output, everything else to standard error.

    Raises:
        DataError: rows that hold no answer, or none at all.
        ModelError: no reward head in the model.
        NonFiniteError: a score that is no number.
    """
    started = time.perf_counter()
    quiet_libraries()
    screen = Screen()
    _refuse_output(config)
    records, skipped = _read(config, screen)

    device = current_device()
    # Not the fastest format: in float32, scores hardly depend on what they are computed beside.
    precision = "fp32" if config.precision == "auto" else config.precision
    scorer = RewardScorer(
        config.model,
        device=device,
        dtype=DTYPES[precision],
        quantize=config.quantize,
        max_length=config.max_length,
        micro_batch_tokens=config.micro_batch_tokens,
        trust_remote_code=config.trust_remote_code,
    )
    _say_model(screen, scorer, precision)

    if config.on_bad_row == "skip":
        records, refused = _without_refused(records, scorer, screen)
        skipped += refused
    scores, report = score_records(scorer, records, screen)
    normalized = _normalized(scores, scorer.loaded.source.record)
    pairs = _pair_report(scores)
    flat = torch.tensor([s for row in scores for s in row], dtype=torch.float64)
    totals: dict[str, Any] = {
        "model": config.model,
        "rows": len(records),
        "answers": len(flat),
        "skipped": skipped,
        "truncated": report.truncated,
        "tokens": report.tokens,
        "score_mean": float(flat.mean()),
        "score_std": float(flat.std(correction=0)),
        "score_min": float(flat.min()),
        "score_max": float(flat.max()),
        "precision": precision,
        "quantize": scorer.quantize,
        "max_length": scorer.max_length,
        "seconds": time.perf_counter() - started,
    }
    totals |= pairs.as_dict() if pairs else {"histogram": asdict(histogram({"scores": flat}))}
    result = ScoreResult([r.where for r in records], scores, normalized, pairs, totals)
    if config.output:
        replace_text(Path(config.output).expanduser(), "".join(_lines(result)))
        screen.line(f"{len(records):,} rows of scores in {config.output}")
    if config.json_totals:
        print(json.dumps(totals, ensure_ascii=False))
    else:
        console = Console()
        for table in _tables(result, flat):
            console.print(table)
        if len(records) > ROWS_SHOWN and not config.output:
            screen.line(f"scores of all {len(records):,} rows: --output FILE")
    return result


def score_records(
    scorer: RewardScorer, records: Sequence[PreferenceRecord], screen: Screen
) -> tuple[list[list[float]], TokenReport]:
    """Scores of each record's answers, in order, and the account of its tokens.

    Raises:
        NonFiniteError: names the first row with a score that is no number.
    """
    with screen.counting("tokenising", len(records)) as tick:
        rows, report = tokenize_pairs(records, scorer.text.encoder, scorer.max_length, tick)
    for sentence in report.sentences():
        screen.line(f"  {sentence}")
    sequences = [np.concatenate([row.prompt, answer]) for row in rows for answer in row.answers]
    with screen.counting("scoring answers", len(sequences)) as tick:
        flat = iter(scorer.score_rows(sequences, tick))
    scores = [[next(flat) for _ in row.answers] for row in rows]
    for record, values in zip(records, scores, strict=True):
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(
                f"{record.where}: the score is {next(v for v in values if not math.isfinite(v))}",
                hint="compute in another format: --precision fp32; if it stays, the weights are damaged",
            )
    return scores, report


def _read(config: ScoreConfig, screen: Screen) -> tuple[list[PreferenceRecord], int]:
    groups, report = load_records(config.data, "score", on_bad_row=config.on_bad_row)
    for source in report.sources:
        say_source(screen, source)
    records = [r for group in groups for r in group if isinstance(r, PreferenceRecord)]
    ranked = sum(len(r.answers) > 1 for r in records)
    screen.line(f"{ranked:,} rows of ranked answers, {len(records) - ranked:,} of a single one")
    return records, sum(source.rows_skipped for source in report.sources)


def _without_refused(
    records: list[PreferenceRecord], scorer: RewardScorer, screen: Screen
) -> tuple[list[PreferenceRecord], int]:
    """The records that the model's template takes, and how many it refuses; the first of these is told.

    Raises:
        DataError: none is left.
    """
    kept: list[PreferenceRecord] = []
    reasons: list[str] = []
    for record in records:
        try:
            scorer.text.encoder.encode_pair(record.prompt, record.answers[0])
        except TemplateError as error:
            reasons.append(f"{record.where}: {error.message}")
        else:
            kept.append(record)
    if not kept:
        raise DataError(
            f"no row is left to score; the first: {reasons[0]}", hint="change the rows, or use another reward model"
        )
    if reasons:
        screen.line(f"{len(reasons):,} more skipped (first: {reasons[0]})")
    return kept, len(reasons)


def _refuse_output(config: ScoreConfig) -> None:
    """Find out before the work that its result can be written, and would replace no data."""
    if not config.output:
        return
    output = Path(config.output).expanduser()
    if output.is_dir():
        raise ConfigError(f"output: {output} is a folder", hint="name a file in it: --output FOLDER/scores.jsonl")
    for spec in config.data:
        source = Path(parse_source(spec).name).expanduser()
        if source.exists() and source.resolve() in (output.resolve(), output.resolve().parent):
            raise ConfigError(
                f"output: {output} is among the data ({source}), which it would replace or join",
                hint="give another --output",
            )
    output.parent.mkdir(parents=True, exist_ok=True)


def _say_model(screen: Screen, scorer: RewardScorer, precision: str) -> None:
    source, record = scorer.loaded.source, scorer.loaded.source.record
    for note in [*scorer.text.notes, *scorer.loaded.notes]:
        screen.line(f"  {note}")
    held = f", base in {scorer.quantize}" if scorer.quantize != "none" else ""
    screen.line(
        f"reward model {source.path} ({scorer.text.family.name}): {scorer.device.type}, {precision}{held}, "
        f"at most {scorer.max_length} tokens"
    )
    if "score_mean" not in record:
        screen.line(
            "note: the folder has no record of ours; that its template is the one of its training cannot be checked, "
            "and scores cannot be normalised"
        )
    # What was otherwise in training; in each of these, scores move.
    for name, now in (("precision", precision), ("quantize", scorer.quantize), ("max_length", scorer.max_length)):
        if record.get(name, now) != now:
            screen.line(f"note: {name} was {record[name]} in training and is {now} here (docs/reward-model.md)")


def _normalized(scores: Sequence[Sequence[float]], record: dict[str, Any]) -> list[list[float]] | None:
    mean, std = record.get("score_mean"), record.get("score_std")
    if mean is None or not std:
        return None
    return [[(s - mean) / std for s in row] for row in scores]


def _pair_report(scores: Sequence[Sequence[float]]) -> EvaluationReport | None:
    """All pairs of each row's answers, the first being the better; each row weighs the same, as in training."""
    pairs = [(better, worse, len(row)) for row in scores for better, worse in combinations(row, 2)]
    if not pairs:
        return None
    chosen, rejected, answers = zip(*pairs, strict=True)
    return evaluation_report(chosen, rejected, [2.0 / (k * (k - 1)) for k in answers])


def _lines(result: ScoreResult) -> Iterator[str]:
    for i, (where, scores) in enumerate(zip(result.where, result.scores, strict=True)):
        normalized = result.normalized[i] if result.normalized else None
        row: dict[str, Any] = {"where": where}
        if len(scores) > 1:
            row |= {"scores": scores, "normalized": normalized}
        else:
            row |= {"score": scores[0], "normalized": normalized[0] if normalized else None}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _tables(result: ScoreResult, flat: torch.Tensor) -> Iterator[Table]:
    if result.report is not None:
        yield from report_tables(result.report)
        return
    rows = Table(title=tr(f"{len(result.scores):,} answers: {flat.mean():.3f} ± {flat.std(correction=0):.3f}"))
    rows.add_column(tr("row"))
    rows.add_column(tr("score"), justify="right")
    rows.add_column(tr("normalised"), justify="right")
    for i, where in enumerate(result.where[:ROWS_SHOWN]):
        normalized = f"{result.normalized[i][0]:.3f}" if result.normalized else ""
        rows.add_row(tr(where), f"{result.scores[i][0]:.4f}", normalized)
    if len(result.where) > ROWS_SHOWN:
        rows.add_row("...", "", "")
    yield rows
    yield histogram_table(histogram({mark("answers"): flat}), tr("scores"))
