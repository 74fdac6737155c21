"""A corpus as a stage will use it, counted row by row: what is learned, what is lost, what would hurt.

Tokenising and cutting are those of `rlhfkit.data.tokenize`, asked for one record at a time. Of each row its length and
a hash of its text are kept, 12 bytes; of each finding the places of the first rows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhfkit.chat.messages import Conversation
from rlhfkit.chat.template import ChatEncoder
from rlhfkit.data.batch import TokenRow
from rlhfkit.data.parse import Stage
from rlhfkit.data.records import REASONS_KEPT, LabelledRecord, PreferenceRecord, Record, SftRecord, Tally
from rlhfkit.data.sources import SourceReport
from rlhfkit.data.tokenize import TokenReport, labelled_row, pair_row, prompt_row, sft_rows
from rlhfkit.errors import TemplateError

UNCUT = 2**31  # a limit that no row reaches
REFUSED = "refused_by_template"
FIRST_BIN = 32  # tokens; each bin of the histogram is twice as wide as the one before
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that rows may have.

    Args:
        key: its name among the counts.
        title: a few words for a table.
        advice: what it means and what to do.
        hurts: whether training is worse for it; ``--strict`` fails on these.
        stages: what kinds of rows may have it.
    """

    key: str
    title: str
    advice: str
    hurts: bool = True
    stages: tuple[Stage, ...] = ("sft", "rm", "kto", "ppo")


FINDINGS = (
    Finding(
        "skipped",
        "cannot be used",
        "Training stops at the first of them; with --on-bad-row skip it leaves them out.",
    ),
    Finding(
        "empty_answers",
        "empty answer",
        "They are among the rows that cannot be used. Take them out.",
        stages=("sft", "rm", "kto"),
    ),
    Finding(
        "chosen_equals_rejected",
        "chosen equal to rejected",
        "Nothing to prefer: the texts are equal (such rows cannot be used), or their tokens are once they are cut.",
        stages=("rm", "kto"),
    ),
    Finding(
        REFUSED,
        "refused by the template",
        "They are among the rows that cannot be used. Change them, or choose another --template.",
    ),
    Finding(
        "nothing_to_learn",
        "nothing to learn",
        "They are left out: no learned token is within --max-length.",
        stages=("sft",),
    ),
    Finding(
        "too_long",
        "prompt too long",
        "They are left out: a prompt that is cut would ask something else.",
        stages=("ppo",),
    ),
    Finding(
        "truncated",
        "truncated",
        "They are longer than --max-length. Raise it, or split the rows.",
        stages=("sft", "rm", "kto"),
    ),
    Finding(
        "split_texts",
        "split into pieces",
        "Texts longer than --max-length: all of their tokens are learned, but no piece sees the one before.",
        hurts=False,
        stages=("sft",),
    ),
    Finding(
        "without_eos",
        "no end of turn",
        "The answer's end-of-turn token is lost: sft learns answers that do not stop, rm scores half an answer.",
        stages=("sft", "rm", "kto"),
    ),
    Finding("double_bos", "double BOS", "The template writes one BOS too many. Choose another --template."),
    Finding(
        "special_strings_in_answers",
        "special-token strings in answers",
        "They are learned as plain text, often the leftover of another tool's template. Take them out.",
        stages=("sft", "rm", "kto"),
    ),
    Finding(
        "special_strings",
        "special-token strings in any text",
        "They stay plain text: none of them becomes a control token.",
        hurts=False,
    ),
    Finding("duplicates", "duplicate of an earlier row", "Each copy weighs as much as the first.", hurts=False),
)


@dataclass(frozen=True, slots=True)
class SeenRow:
    """One row as the model will see it.

    Args:
        where: its place, as ``file:line``.
        sequences: what goes into the model, after any cut: the conversation or the pieces of a text (sft), the prompt
            with each of its answers, best first (rm) or with a label each (kto), or the prompt (ppo). ``supervised``
            marks what is learned, in rm and kto the answers. Of a row that the stage will not use, the whole, of which
            nothing is learned; none if the template refuses it.
        length: tokens of the longest sequence before any cut, of a text before it is split; 0 if there is none.
        unused: the key of the finding that keeps the row out of training, or empty.
        reason: the same in words.
        labels: kto: of each sequence, whether its answer is desirable.
        split: whether the sequences are pieces of one text.
    """

    where: str
    sequences: tuple[TokenRow, ...]
    length: int
    unused: str = ""
    reason: str = ""
    labels: tuple[bool, ...] = ()
    split: bool = False

    @property
    def cut(self) -> int:
        """How many tokens of the longest sequence are lost."""
        return self.length - max(map(len, self.sequences)) if self.sequences and not self.split else 0


def see_row(record: Record, encoder: ChatEncoder, limit: int) -> SeenRow:
    """A record as its stage makes tokens of it.

    Args:
        record: of any stage.
        encoder: the model's.
        limit: tokens, as the stage gives them to its function in `rlhfkit.data.tokenize`.
    """
    try:
        whole = _sequences(record, encoder, UNCUT)
    except TemplateError as error:
        return SeenRow(record.where, (), 0, REFUSED, error.message)
    length = max(map(len, whole), default=0)
    sequences = _sequences(record, encoder, limit) if length > limit else whole
    if sequences:
        labels = record.labels if isinstance(record, LabelledRecord) else ()
        split = isinstance(record, SftRecord) and len(sequences) > 1
        return SeenRow(record.where, sequences, length, labels=labels, split=split)
    whole = tuple(_read_only(sequence.ids) for sequence in whole)
    if isinstance(record, SftRecord):
        return SeenRow(record.where, whole, length, "nothing_to_learn", f"nothing to learn within {limit} tokens")
    return SeenRow(record.where, whole, length, "too_long", f"the prompt is longer than {limit} tokens")


def _sequences(record: Record, encoder: ChatEncoder, limit: int) -> tuple[TokenRow, ...]:
    """What goes into the model; nothing of a row that is left out."""
    counted = TokenReport()
    if isinstance(record, SftRecord):
        return tuple(sft_rows(record, encoder, limit, counted))
    if isinstance(record, (PreferenceRecord, LabelledRecord)):
        answered: Any = labelled_row if isinstance(record, LabelledRecord) else pair_row
        row = answered(record, encoder, limit, counted)
        return tuple(
            TokenRow(np.concatenate([row.prompt, ids]), np.arange(len(row.prompt) + len(ids)) >= len(row.prompt))
            for ids in row.answers
        )
    prompt = prompt_row(record, encoder, limit, counted)
    return () if prompt is None else (_read_only(prompt.prompt),)


def _read_only(ids: NDArray[np.int32]) -> TokenRow:
    return TokenRow(ids, np.zeros(len(ids), np.bool_))


@dataclass
class SourceCount:
    """What one source brings; ``weight`` is how often its rows are used in an epoch."""

    name: str
    weight: float
    rows: int = 0
    skipped: int = 0
    tokens: int = 0
    supervised_tokens: int = 0


@dataclass
class Audit:
    """Counts over a corpus. Sources are opened with ``start``, their records given to ``add``; or other processes count
    stretches of a source, and ``extend`` takes what they found.

    Args:
        limit: as in `see_row`.

    ``rows`` are those that could be read as rows of the stage and that the template takes; others are skipped. Tokens
    are counted after any cut, of the rows that the stage will use: for rm and kto those of every answer with its
    prompt. There nothing is learned token by token, so ``supervised_tokens`` stays 0.
    """

    limit: int
    sources: list[SourceCount] = field(default_factory=list)
    found: dict[str, Tally] = field(default_factory=lambda: {finding.key: Tally() for finding in FINDINGS})
    assistant_turns: int = 0  # sft: of the rows that are used; a plain text counts as one
    turn_ends: int = 0  # sft: end-of-turn tokens that are learned
    desirable: int = 0  # kto: answers of the rows that are used
    undesirable: int = 0
    _lengths: array[int] = field(default_factory=lambda: array("I"))
    _hashes: array[int] = field(default_factory=lambda: array("Q"))

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def supervised_tokens(self) -> int:
        return sum(source.supervised_tokens for source in self.sources)

    def start(self, name: str, weight: float) -> None:
        """Open a source."""
        self.sources.append(SourceCount(name, weight))

    def skip(self, report: SourceReport) -> None:
        """Count the rows of the source opened last that cannot be used."""
        self.sources[-1].skipped += report.rows_skipped
        self.found["skipped"].extend(Tally(report.rows_skipped, report.reasons))
        self.found["empty_answers"].extend(report.empty_answers)
        self.found["chosen_equals_rejected"].extend(report.equal_answers)

    def extend(self, part: Audit) -> None:
        """Count what was counted of a stretch of the source opened last; it comes after all before."""
        source, (other,) = self.sources[-1], part.sources
        source.rows += other.rows
        source.skipped += other.skipped
        source.tokens += other.tokens
        source.supervised_tokens += other.supervised_tokens
        for key, tally in part.found.items():
            self.found[key].extend(tally)
        self.assistant_turns += part.assistant_turns
        self.turn_ends += part.turn_ends
        self.desirable += part.desirable
        self.undesirable += part.undesirable
        self._lengths.extend(part._lengths)
        self._hashes.extend(part._hashes)

    def add(self, record: Record, encoder: ChatEncoder) -> SeenRow:
        """Count one record of the source opened last.

        One that the template refuses is for the caller to count among those that cannot be used; see `skip`.
        """
        source, where = self.sources[-1], record.where
        context, answers = _texts(record)
        self._hashes.append(_hash(context, answers))
        in_answers = any(map(encoder.has_control, answers))
        if in_answers:
            self.found["special_strings_in_answers"].add(where)
        if in_answers or any(encoder.has_control(text) for _, text in context):
            self.found["special_strings"].add(where)

        row = see_row(record, encoder, self.limit)
        source.rows += row.unused != REFUSED
        self._lengths.append(row.length)
        if row.cut or (row.unused == "nothing_to_learn" and row.length > self.limit):
            self.found["truncated"].add(where)
        if row.split:
            self.found["split_texts"].add(where)
        if row.unused:
            self.found[row.unused].add(where)
            return row
        source.tokens += sum(map(len, row.sequences))
        bos = encoder.tokenizer.bos_token_id
        if any(_stand_together(sequence, bos) for sequence in row.sequences):
            self.found["double_bos"].add(where)
        if isinstance(record, SftRecord):
            self.assistant_turns += len(answers)
            for sequence in row.sequences:
                source.supervised_tokens += sequence.targets
                self.turn_ends += int(np.count_nonzero(sequence.ids[sequence.supervised] == encoder.turn_end_id))
        if isinstance(record, LabelledRecord):
            self.desirable += sum(record.labels)
            self.undesirable += len(record.labels) - sum(record.labels)
        if not isinstance(record, SftRecord) and _some_equal(row.sequences):
            self.found["chosen_equals_rejected"].add(where)
        last = row.sequences[-1:] if row.split else row.sequences
        if any(sequence.supervised.any() and not _ends(sequence, encoder) for sequence in last):
            self.found["without_eos"].add(where)
        return row

    def finish(self, places: Callable[[set[int]], Mapping[int, str]]) -> None:
        """Count duplicates, once every record of all sources was added.

        Args:
            places: asked for the places of a few records by their numbers in the order of adding, the first being 0.
        """
        if not self._hashes:
            return
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        repeats = np.sort(order[1:][hashes[order[1:]] == hashes[order[:-1]]])
        tally = self.found["duplicates"] = Tally(count=len(repeats))
        named = {int(index): int(np.flatnonzero(hashes == hashes[index])[0]) for index in repeats[:REASONS_KEPT]}
        if named:
            where = places({*named, *named.values()})
            tally.first = [f"{where[index]} (as {where[first]})" for index, first in named.items()]

    def hurting(self) -> list[Finding]:
        """What was found that training would be worse for."""
        return [finding for finding in FINDINGS if finding.hurts and self.found[finding.key].count]

    def lengths(self) -> dict[str, Any]:
        """Tokens of a row before any cut (rm: of the prompt and the longest answer): figures and a histogram.

        ``histogram`` holds [from, to, rows], both ends included; one bin ends at the limit, so what is cut or left out
        stands apart. Rows that could not be encoded are not in it.
        """
        lengths = np.frombuffer(self._lengths, dtype=np.uint32) if self._lengths else np.zeros(0, np.uint32)
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return {"histogram": []}
        longest = int(lengths.max())
        ends = sorted({*_bin_ends(longest), *([self.limit] if self.limit < longest else [])})
        counts = np.histogram(lengths, bins=[0.5, *(end + 0.5 for end in ends)])[0]
        starts = [1, *(end + 1 for end in ends)]
        return {
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 1),
            **{name: int(np.quantile(lengths, q, method="higher")) for name, q in QUANTILES.items()},
            "max": longest,
            "histogram": [[start, end, int(n)] for start, end, n in zip(starts, ends, counts, strict=False)],
        }


def _ends(sequence: TokenRow, encoder: ChatEncoder) -> bool:
    """Whether the last token ends the assistant's turn, and is learned."""
    return bool(sequence.supervised[-1]) and int(sequence.ids[-1]) == encoder.turn_end_id


def dump_record(record: Record) -> dict[str, Any]:
    """A record as an object that its stage reads back as the same record; ``where`` is added."""
    row: dict[str, Any] = {"where": record.where}
    if isinstance(record, SftRecord):
        if record.text is not None:
            return {**row, "text": record.text}
        return {**row, "messages": _dicts(record.messages)}
    row["prompt"] = _dicts(record.prompt)
    if isinstance(record, LabelledRecord):
        if len(record.answers) == 1:
            return {**row, "completion": record.answers[0], "label": record.labels[0]}
        return {**row, "chosen": record.answers[0], "rejected": record.answers[1]}
    if not isinstance(record, PreferenceRecord):
        return {**row, **record.columns, "prompt": row["prompt"]}
    if len(record.answers) == 2:
        row["chosen"], row["rejected"] = record.answers
    else:
        row["answers"] = list(record.answers)
    return {**row, "margin": record.margin} if record.margin else row


def _dicts(messages: Conversation) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]


def _texts(record: Record) -> tuple[list[tuple[str, str]], list[str]]:
    """What is only read, each text with its role, and what is learned from; a plain text is all learned."""
    if isinstance(record, (PreferenceRecord, LabelledRecord)):
        return [(m.role, m.content) for m in record.prompt], list(record.answers)
    if not isinstance(record, SftRecord):
        return [(m.role, m.content) for m in record.prompt], []
    if record.text is not None:
        return [], [record.text]
    context: list[tuple[str, str]] = [(m.role, m.content) for m in record.messages if m.role != "assistant"]
    return context, [m.content for m in record.messages if m.role == "assistant"]


def _hash(context: Sequence[tuple[str, str]], answers: Sequence[str]) -> int:
    digest = blake2b(digest_size=8)
    for role, text in [*context, *(("answer", text) for text in answers)]:
        data = text.encode()
        digest.update(f"{role} {len(data)} ".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def _stand_together(sequence: TokenRow, token: int | None) -> bool:
    if token is None:
        return False
    places = sequence.ids == token
    return bool((places[1:] & places[:-1]).any())


def _some_equal(sequences: Sequence[TokenRow]) -> bool:
    return len({sequence.ids.tobytes() for sequence in sequences}) < len(sequences)


def _bin_ends(longest: int) -> list[int]:
    return [FIRST_BIN * 2**i for i in range(1 + max(0, math.ceil(math.log2(longest / FIRST_BIN))))]
