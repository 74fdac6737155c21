"""``rlhfkit inspect``: rows as the model will see them, and what would hurt training in the whole corpus.

Reads what a training run would read, in the same way, and stops before the model's weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhfkit.chat.template import ChatEncoder
from rlhfkit.config.sources import parse_source
from rlhfkit.config.stages import StageConfig
from rlhfkit.data.audit import FINDINGS, REFUSED, Audit, Finding, SeenRow, dump_record, see_row
from rlhfkit.data.batch import TokenRow
from rlhfkit.data.parse import Stage
from rlhfkit.data.prepare import Stretch, work_through
from rlhfkit.data.records import Record
from rlhfkit.data.sources import Place, SourceReport, locate, parse_items, refuse_unusable
from rlhfkit.errors import ConfigError, DataError, TemplateError
from rlhfkit.models.text_side import TextSide
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.stages.common import fit_length, open_text_side
from rlhfkit.words import mark, tr
from rlhfkit.words.lines import shown

BAR = 40  # characters of the histogram's longest bar
LONGEST_STRETCH = 1200  # characters of one stretch of text that are shown; of more, the beginning and the end
DUMP_BEGINS = b'{"where": '
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def run(config: StageConfig, *, detected: bool, rows: int, as_json: bool, dump: Path | None = None) -> list[Finding]:
    """Inspect the training data of a configuration; see the module's first lines.

    Args:
        config: of the stage that will use the rows; only its model and data count, and PPO's limits.
        detected: whether the stage was found from the rows.
        rows: how many rows are shown.
        as_json: print the counts as one JSON object instead of everything else.
        dump: where the parsed records go, as JSON lines.

    Returns:
        What was found that training would be worse for.

    Raises:
        Whatever the stage itself would raise before its first step, faults of single rows aside.
    """
    quiet_libraries()
    screen = Screen()
    config = fit_length(config)
    limit = _limit(config)
    specs = config.data.train
    if dump is not None:
        _refuse_other_file(dump)
    _, text = open_text_side(config)
    sources = [parse_source(spec) for spec in specs]
    places = [locate(source.name) for source in sources]

    audit = Audit(limit)
    reports = []
    dumped = 0
    unusable: DataError | None = None
    with _lines_to(dump) as write:
        for source, place in zip(sources, places, strict=True):
            audit.start(source.name, source.weight)
            report = SourceReport(source.name)
            work = partial(_count, config=config, encoder=text.encoder, limit=limit, dumped=dump is not None)
            counting = partial(screen.counting, f"inspecting rows of {source.name}")
            for part, read, lines in work_through(place, work, counting, place.content().rows):
                audit.extend(part)
                report.extend(read)
                write(lines)
                dumped += len(lines)
            reports.append(report)
            try:
                refuse_unusable(report, _kind(config))
            except DataError as error:
                if not as_json:
                    raise
                unusable = unusable or error  # whoever reads the counts gets them first
    audit.finish(lambda wanted: _wheres(chain.from_iterable(_records(places, config)), wanted))

    if as_json:
        print(json.dumps(counts(audit, reports, config, text)))
        if unusable is not None:
            raise unusable
        return audit.hurting()
    console = Console(highlight=False)
    _show_setting(console, config, text, detected=detected, limit=limit)
    if rows:
        console.print(_legend(config, plain=_is_plain(console)))
    for record in islice(_in_turn(_records(places, config)), rows):
        row = see_row(record, text.encoder, limit)
        console.print(row_panel(row, text.encoder, config.row_kind, plain=_is_plain(console)))
    _show_counts(console, audit, reports, config)
    if dump is not None:
        console.print(shown(f"{dumped:,} records are in {dump}"), soft_wrap=True)
    return audit.hurting()


def counts(audit: Audit, reports: Sequence[SourceReport], config: StageConfig, text: TextSide) -> dict[str, Any]:
    """Everything that was counted, for programs."""
    return {
        "stage": config.stage,
        "model": config.model.path,
        "template": text.template.name,
        "limit": audit.limit,
        "rows": audit.rows,
        "tokens": audit.tokens,
        "supervised_tokens": audit.supervised_tokens,
        "assistant_turns": audit.assistant_turns,
        "turn_ends_learned": audit.turn_ends,
        "desirable": audit.desirable,
        "undesirable": audit.undesirable,
        **{finding.key: audit.found[finding.key].count for finding in FINDINGS},
        "examples": {finding.key: audit.found[finding.key].first for finding in FINDINGS},
        "hurting": [finding.key for finding in audit.hurting()],
        "lengths": audit.lengths(),
        "sources": [vars(source) for source in audit.sources],
        "remarks": [sentence for report in reports for sentence in report.sentences()],
        "notes": text.notes,
    }


# -- what is read, and what is written --------------------------------------------------------------------------------


def _limit(config: StageConfig) -> int:
    if (block := config.rollouts) is not None and config.row_limit < 1:
        raise ConfigError(
            f"{config.data.max_length} tokens leave no room for a prompt beside {block.max_new_tokens} new ones",
            hint="lower --max-new-tokens",
        )
    return config.row_limit


def _refuse_other_file(dump: Path) -> None:
    """A slip of the hand must not replace the data by what was read of it, nor a device by a file."""
    if not dump.exists():
        return
    if not dump.is_file():
        raise DataError(f"{dump} is no regular file, so no dump can take its place", hint="give another file")
    with dump.open("rb") as file:
        head = file.read(len(DUMP_BEGINS))
    if head and head != DUMP_BEGINS:
        raise DataError(
            f"{dump} is there already, and was not written by --dump", hint="delete it, or give another file"
        )


@contextmanager
def _lines_to(path: Path | None) -> Iterator[Callable[[list[str]], None]]:
    """Gives a function that writes lines; the file is there once all were written, or not at all."""
    if path is None:
        yield lambda lines: None
        return
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            yield lambda lines: file.writelines(line + "\n" for line in lines)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _line(record: Record) -> str:
    row = dump_record(record)
    try:
        # What Parquet and the hub have beyond JSON, such as dates, becomes text.
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a column that no stage reads
        return json.dumps(row, default=str)
    except ValueError:  # NaN or an infinity, which JSON does not have
        return json.dumps(_without_nan(row), default=str)
    return line


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_without_nan(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- rows -------------------------------------------------------------------------------------------------------------


Kind = Literal["context", "control", "learned", "end"]
OPENING, CLOSING, END_MARK = "⟦", "⟧", "◀"


def stretches(sequence: TokenRow, encoder: ChatEncoder) -> list[tuple[Kind, str]]:
    """A sequence as text, cut where its kind changes: read only, control token, learned, learned end of turn."""
    controls = encoder.control_ids
    kinds: list[Kind] = []
    for token, learned in zip(sequence.ids.tolist(), sequence.supervised.tolist(), strict=True):
        if learned:
            kinds.append("end" if token == encoder.turn_end_id else "learned")
        else:
            kinds.append("control" if token in controls else "context")
    found: list[tuple[Kind, str]] = []
    end, shown = 0, 0
    for kind, run in groupby(kinds):
        end += len(list(run))
        # From the beginning each time: sentencepiece leaves out the space in front of what it decodes.
        text = str(encoder.tokenizer.decode(sequence.ids[:end].tolist(), clean_up_tokenization_spaces=False))
        found.append((kind, text[shown:]))
        shown = len(text)
    return found


def row_panel(row: SeenRow, encoder: ChatEncoder, kind: str, *, plain: bool) -> Panel:
    """One row for the screen; ``plain``: what is learned is told by marks, since colours cannot be shown."""
    parts: list[Text] = []
    for index, sequence in enumerate(row.sequences):
        name, colour = "", "green"
        if kind == "rm":
            name, colour = _answer_name(index, len(row.sequences)), "red" if index else "green"
        elif row.labels:
            name, colour = (mark("desirable"), "green") if row.labels[index] else (mark("undesirable"), "red")
        elif row.split:
            name = f"piece {index + 1} of {len(row.sequences)}"
        if name:
            parts.append(shown(name, style="bold underline"))
        parts.append(_coloured(stretches(sequence, encoder), colour, plain=plain))
    if row.unused:
        parts.append(shown(f"not used: {row.reason}", style="bold red"))
    elif row.cut:
        parts.append(shown(f"✂ {row.cut:,} of {row.length:,} tokens are cut", style="bold red"))
    words = [row.where, f"{sum(map(len, row.sequences)):,} tokens"]
    if kind == "sft" and not row.unused:
        words.append(f"{sum(sequence.targets for sequence in row.sequences):,} learned")
    return Panel(Group(*parts), title=Text(" · ".join(map(tr, words))), title_align="left", border_style="dim")


def _answer_name(index: int, number: int) -> str:
    return ("chosen", "rejected")[index] if number == 2 else f"answer {index + 1} of {number}, best first"


def _coloured(found: Sequence[tuple[Kind, str]], colour: str, *, plain: bool) -> Text:
    styles = {"context": "dim", "control": "cyan", "learned": f"bold {colour}", "end": f"bold black on {colour}"}
    text = Text()
    inside = False
    for kind, words in found:
        if plain and inside != (kind in ("learned", "end")):
            inside = not inside
            text.append(OPENING if inside else CLOSING)
        text.append(_shortened(words).translate(CONTROL_PICTURES), style=styles[kind])
        if kind == "end":
            text.append(END_MARK, style=f"bold {colour}")
    return text.append(CLOSING) if inside else text


def _shortened(words: str) -> str:
    if len(words) <= LONGEST_STRETCH:
        return words
    head, tail = words[: LONGEST_STRETCH * 2 // 3], words[-LONGEST_STRETCH // 3 :]
    left_out = tr(f"[…{len(words) - len(head) - len(tail):,} characters…]")
    return f"{head} {left_out} {tail}"


def _legend(config: StageConfig, *, plain: bool) -> Text:
    ends = {"sft": "end of turn, learned too", "rm": "its end, where its score is read"}
    pairs: list[tuple[Kind, str]] = [("context", "what the model reads"), ("control", "  control tokens  ")]
    if config.row_kind != "ppo":
        learned = "what is learned " if config.stage == "sft" else "an answer "
        pairs += [("learned", learned), ("end", ends.get(config.stage, "its end"))]
    return _coloured([(kind, tr(words)) for kind, words in pairs], "green", plain=plain)


def _is_plain(console: Console) -> bool:
    return console.color_system is None or console.no_color


def _count(
    items: Stretch, *, config: StageConfig, encoder: ChatEncoder, limit: int, dumped: bool
) -> tuple[Audit, SourceReport, list[str]]:
    """What there is to say of a stretch of a source, and its lines of a dump."""
    part, report, lines = Audit(limit), SourceReport(""), []
    part.start("", 1.0)
    records = list(parse_items(items, _kind(config), config.data.on_bad_row, report))
    part.skip(report)
    refused = SourceReport("")
    for record in records:
        row = part.add(record, encoder)
        if row.unused == REFUSED:
            if config.data.on_bad_row == "error":
                raise TemplateError(
                    f"{row.where}: {row.reason}", hint="change the row, or choose another format with --template"
                )
            refused.skip(f"{row.where}: {row.reason}")
        if dumped:
            lines.append(_line(record))
    part.skip(refused)
    report.rows_kept -= refused.rows_skipped
    report.extend(refused)
    return part, report, lines


def _records(places: Sequence[Place], config: StageConfig) -> list[Iterator[Record]]:
    """The records of each source, read anew."""
    nobody = SourceReport("")
    return [parse_items(place.items(), _kind(config), config.data.on_bad_row, nobody) for place in places]


def _kind(config: StageConfig) -> Stage:
    kind: Any = config.row_kind  # a Literal of `rlhfkit.data.parse`
    return kind


def _wheres(records: Iterable[Record], wanted: set[int]) -> dict[int, str]:
    """The places of some records, by number."""
    head = islice(records, max(wanted) + 1)
    return {number: record.where for number, record in enumerate(head) if number in wanted}


def _in_turn(groups: Sequence[Iterable[Record]]) -> Iterator[Record]:
    """The first record of each source, then the second of each, and so on."""
    return (record for same_place in zip_longest(*groups) for record in same_place if record is not None)


# -- the corpus -------------------------------------------------------------------------------------------------------


def _show_setting(console: Console, config: StageConfig, text: TextSide, *, detected: bool, limit: int) -> None:
    what = tr("prompts") if config.row_kind == "ppo" else tr("rows")
    stage = (
        f"{config.stage} data (as the rows look; say otherwise with --stage)" if detected else f"{config.stage} data"
    )
    console.print(Text(f"{tr(stage)}{tr('; ')}{tr(f'{what} of at most {limit:,} tokens')}"), soft_wrap=True)
    console.print(shown(f"model {config.model.path} ({text.family.name})"), soft_wrap=True)
    for note in text.notes:
        console.print(shown(f"  {note}"), soft_wrap=True)


def _show_counts(console: Console, audit: Audit, reports: Sequence[SourceReport], config: StageConfig) -> None:
    console.print(_source_table(audit, config))
    for source in reports:
        for reason in source.reasons:
            console.print(shown(f"  skipped {reason}", style="yellow"), soft_wrap=True)
        for sentence in source.sentences():
            console.print(shown(f"  {sentence}"), soft_wrap=True)
    console.print(_histogram(audit, config))
    if config.stage == "sft":
        words = f"{audit.turn_ends:,} ends of turn are learned, in {audit.assistant_turns:,} assistant turns"
        never = audit.assistant_turns and not audit.turn_ends
        console.print(shown(f"{words}: the model will not learn to stop" if never else words), soft_wrap=True)
    if config.stage == "kto":
        words = f"{audit.desirable:,} desirable answers, {audit.undesirable:,} undesirable ones"
        one_kind = not (audit.desirable and audit.undesirable)
        console.print(shown(f"{words}: nothing tells them apart" if one_kind else words), soft_wrap=True)
    there = [finding for finding in FINDINGS if audit.found[finding.key].count]
    if there:
        console.print(_finding_table(there, audit))
    absent = [f.title for f in FINDINGS if f not in there and config.row_kind in f.stages]
    if absent:
        console.print(shown(f"no row: {tr(', ').join(map(tr, absent))}"))
    hurting = audit.hurting()
    if hurting:
        names = tr(", ").join(tr(finding.title) for finding in hurting)
        console.print(shown(f"Would hurt training: {names}", style="bold red"))
    else:
        console.print(shown("Nothing was found that would hurt training.", style="bold green"))


def _source_table(audit: Audit, config: StageConfig) -> Table:
    table = Table(title_justify="left", show_footer=len(audit.sources) > 1)
    table.add_column(tr("source"), footer=tr("in all"), overflow="fold")
    columns: dict[str, list[int]] = {
        mark("rows"): [source.rows for source in audit.sources],
        mark("skipped"): [source.skipped for source in audit.sources],
        mark("tokens"): [source.tokens for source in audit.sources],
    }
    if config.stage == "sft":
        columns[mark("learned")] = [source.supervised_tokens for source in audit.sources]
    if any(source.weight != 1 for source in audit.sources):
        columns["rows an epoch"] = [round(source.weight * source.rows) for source in audit.sources]
    for name, values in columns.items():
        table.add_column(tr(name), footer=f"{sum(values):,}", justify="right")
    for source, *values in zip(audit.sources, *columns.values(), strict=True):
        weight = "" if source.weight == 1 else f" ×{source.weight:g}"
        table.add_row(Text(source.name + weight), *(f"{value:,}" for value in values))
    return table


def _histogram(audit: Audit, config: StageConfig) -> Group:
    lengths = audit.lengths()
    if not lengths["histogram"]:
        return Group()
    what = {"sft": "rows", "ppo": "prompts"}.get(config.row_kind, "prompts with their longest answer")
    figures = ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "median", "mean", "p90", "p99", "max"))
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    most = max(rows for _, _, rows in lengths["histogram"])
    for start, end, rows in lengths["histogram"]:
        style = "red" if start > audit.limit else "green"
        bar = "█" * round(BAR * rows / most) or ("▏" if rows else "")
        beyond = tr(" beyond the limit") if start > audit.limit and rows else ""
        table.add_row(f"{start:,}–{end:,}", f"{rows:,}", Text(bar + beyond, style=style))
    return Group(shown(f"tokens of {tr(what)}: {figures}"), table)


def _finding_table(findings: Sequence[Finding], audit: Audit) -> Table:
    table = Table(show_lines=True)
    table.add_column(tr("found"), overflow="fold", ratio=3)
    table.add_column(tr("rows"), justify="right")
    table.add_column(tr("the first"), overflow="fold", ratio=2)
    read = audit.rows + audit.found["skipped"].count
    for finding in findings:
        tally = audit.found[finding.key]
        words = shown("").append(tr(finding.title), "bold red" if finding.hurts else "bold yellow")
        words.append(f"\n{tr(finding.advice)}", "dim")
        # Rows that cannot be used stand above with what is wrong in each.
        places = tr("above") if finding.key == "skipped" else "\n".join(map(tr, tally.first))
        table.add_row(words, f"{tally.count:,}\n{_percent(tally.count, read)}", Text(places))
    return table


def _percent(part: int, whole: int) -> str:
    return "" if not whole else f"{100 * part / whole:.2g} %"
