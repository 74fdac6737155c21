"""What the training stages do alike before their loops begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhfkit.config.stages import StageConfig
from rlhfkit.data.records import Record
from rlhfkit.data.sources import load_records, mix, parse_source
from rlhfkit.data.tokenize import TokenReport
from rlhfkit.errors import ConfigError
from rlhfkit.models.folder import ModelSource, open_model
from rlhfkit.models.load import LoadedModel, Task, TextSide, load_model, load_text_side, parameter_counts
from rlhfkit.runtime.run import Run
from rlhfkit.runtime.screen import Screen


def open_text_side(config: StageConfig) -> tuple[ModelSource, TextSide]:
    """The model's folder and its text side, before any weight is read: bad data is found in seconds."""
    source = open_model(config.model.path)
    limit = source.config.get("max_position_embeddings")
    if limit and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} is more than the {limit} positions of {source.path}",
            hint=f"give --max-length {limit} or less",
        )
    text = load_text_side(
        source,
        family=config.model.family,
        template=config.model.template,
        trust_remote_code=config.model.trust_remote_code,
    )
    return source, text


def read_records(config: StageConfig, specs: Sequence[str], screen: Screen, *, mixed: bool) -> list[Any]:
    """Rows of several sources as one list; training rows are repeated by their weights."""
    stage: Any = config.stage  # a Literal in each stage's own class
    groups, report = load_records(specs, stage, on_bad_row=config.data.on_bad_row)
    for source in report.sources:
        skipped = f", {source.rows_skipped:,} skipped (first: {source.reasons[0]})" if source.rows_skipped else ""
        screen.line(f"read {source.name}: {source.rows_kept:,} rows{skipped}")
    if mixed:
        return mix(groups, [parse_source(spec).weight for spec in specs], config.run.seed)
    records: list[Record] = [record for group in groups for record in group]
    return records


def load_for_training(config: StageConfig, run: Run, source: ModelSource, text: TextSide, task: Task) -> LoadedModel:
    """The model of this stage, ready to train, with a line on what it is."""
    loaded = load_model(
        source,
        text,
        task,
        lora=config.lora,
        dtype=run.dtype,
        quantize=config.model.quantize,
        trust_remote_code=config.model.trust_remote_code,
        gradient_checkpointing=config.optim.gradient_checkpointing,
        fresh_head=config.stage == "rm",
        device=run.device,
    )
    trainable, total = parameter_counts(loaded.model)
    for note in [*text.notes, *loaded.notes]:
        run.screen.line(f"  {note}")
    run.screen.line(f"model {source.path} ({text.family.name}): {trainable:,} of {total:,} parameters train")
    return loaded


def say_report(screen: Screen, what: str, report: TokenReport) -> None:
    """Tell what tokenising did to the rows."""
    supervised = f", {report.supervised:,} supervised" if report.supervised else ""
    screen.line(f"{what}: {report.rows:,} rows, {report.tokens:,} tokens{supervised}")
    for sentence in report.sentences():
        screen.line(f"  {sentence}")
