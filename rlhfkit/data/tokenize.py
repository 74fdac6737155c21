"""Records to token rows, with an account of what was cut or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhfkit.chat.template import ChatEncoder
from rlhfkit.data.batch import TokenRow, token_row
from rlhfkit.data.parse import Stage
from rlhfkit.data.records import LabelledRecord, PreferenceRecord, PromptRecord, SftRecord, Tally
from rlhfkit.errors import DataError, TemplateError


@dataclass
class TokenReport:
    """Counts over a data set; every row is in ``rows`` and at most one of ``left_out``'s reasons."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    split: int = 0  # texts that were longer than the limit
    pieces: int = 0  # what they were split into
    left_out: dict[str, Tally] = field(default_factory=dict)  # by reason

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out.setdefault(reason, Tally()).add(where)

    def extend(self, other: TokenReport) -> None:
        """Count the rows of another report, which come after these."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.truncated += other.truncated
        self.split += other.split
        self.pieces += other.pieces
        for reason, tally in other.left_out.items():
            self.left_out.setdefault(reason, Tally()).extend(tally)

    def sentences(self) -> list[str]:
        """What a user should know, nothing if all is well."""
        lines = []
        if self.truncated:
            lines.append(f"{self.truncated} of {self.rows} rows were longer than --max-length and were cut")
        if self.split:
            lines.append(
                f"{self.split} of {self.rows} rows were plain text longer than --max-length and were split into "
                f"{self.pieces} pieces"
            )
        for reason, tally in self.left_out.items():
            lines.append(f"{tally.count} of {self.rows} rows left out: {reason} (first: {tally.first[0]})")
        return lines


@dataclass(frozen=True, slots=True)
class PairRow:
    """A prompt and its answers, best first, as token ids; every answer ends with its turn end unless cut."""

    prompt: NDArray[np.int32]
    answers: tuple[NDArray[np.int32], ...]
    margin: float


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A prompt and answers to it, as token ids, each desirable or not."""

    prompt: NDArray[np.int32]
    answers: tuple[NDArray[np.int32], ...]
    labels: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt as token ids, with the record it came from."""

    prompt: NDArray[np.int32]
    record: PromptRecord


def sft_rows(record: SftRecord, encoder: ChatEncoder, max_length: int, report: TokenReport) -> list[TokenRow]:
    """The rows of a record for supervised fine-tuning, counted in ``report``.

    A text longer than ``max_length`` is split. A conversation is one row: a longer one keeps its beginning, so that the
    end of the last answer, and with it its turn end, is lost. One with no supervised token left gives no row.
    """
    if record.text is not None:
        rows = _text_pieces(record.text, encoder, max_length)
        if len(rows) > 1:
            report.split += 1
            report.pieces += len(rows)
    else:
        encoded = encoder.encode(record.messages)
        report.truncated += len(encoded.ids) > max_length
        rows = [token_row(encoded.ids[:max_length], encoded.supervised[:max_length])]
    report.rows += 1
    rows = [row for row in rows if row.targets]
    if not rows:
        report.leave_out("nothing to learn within --max-length", record.where)
    report.tokens += sum(map(len, rows))
    report.supervised += sum(row.targets for row in rows)
    return rows


def _text_pieces(text: str, encoder: ChatEncoder, max_length: int) -> list[TokenRow]:
    """Plain text in rows of at most ``max_length`` tokens: every token is learned once, and that the text ends.

    Each piece begins as the model has always seen texts begin, with a bos if the tokenizer writes one. A later piece
    repeats the last token of the one before, which is not learned again: without it, the first token to learn would
    have nothing in front, or a bos after which texts do not go on in the middle.
    """
    bos = [] if encoder.text_bos is None else [encoder.text_bos]
    ids = [*encoder.encode_text(text), encoder.tokenizer.eos_token_id]
    pieces: list[TokenRow] = []
    start = 0
    while start < len(ids):
        context = [*bos, *ids[max(0, start - 1) : start]]
        learned = ids[start : start + max(1, max_length - len(context))]
        pieces.append(token_row([*context, *learned], [False] * len(context) + [True] * len(learned)))
        start += len(learned)
    return pieces


def pair_row(record: PreferenceRecord, encoder: ChatEncoder, max_length: int, report: TokenReport) -> PairRow:
    """A prompt and its answers for the reward model, counted in ``report``.

    No pair is dropped for its length: `fit_answers` says what is cut.
    """
    return PairRow(*_answered(record, encoder, max_length, report), record.margin)


def labelled_row(record: LabelledRecord, encoder: ChatEncoder, max_length: int, report: TokenReport) -> LabelledRow:
    """A prompt and its answers for KTO, counted in ``report``; cut as those of a pair are."""
    return LabelledRow(*_answered(record, encoder, max_length, report), record.labels)


def _answered(
    record: PreferenceRecord | LabelledRecord, encoder: ChatEncoder, max_length: int, report: TokenReport
) -> tuple[NDArray[np.int32], tuple[NDArray[np.int32], ...]]:
    pairs = [encoder.encode_pair(record.prompt, answer) for answer in record.answers]
    prompt, answers = fit_answers(pairs[0][0], [ids for _, ids in pairs], max_length)
    report.rows += 1
    report.truncated += len(prompt) < len(pairs[0][0]) or any(
        len(kept) < len(ids) for kept, (_, ids) in zip(answers, pairs, strict=True)
    )
    report.tokens += sum(len(prompt) + len(ids) for ids in answers)
    return np.asarray(prompt, np.int32), tuple(np.asarray(ids, np.int32) for ids in answers)


def fit_answers(
    prompt: Sequence[int], answers: Sequence[Sequence[int]], max_length: int
) -> tuple[Sequence[int], list[Sequence[int]]]:
    """The prompt and the answers to it within ``max_length`` tokens, each with the prompt in front.

    A prompt that leaves no room is cut from the left, the same for all its answers, so that they are compared in one
    context; an answer longer than ``max_length`` - 1 keeps its beginning.
    """
    kept = [ids[: max_length - 1] for ids in answers]
    room = max_length - max(len(ids) for ids in kept)
    return prompt[max(0, len(prompt) - room) :], kept


def prompt_row(record: PromptRecord, encoder: ChatEncoder, max_length: int, report: TokenReport) -> PromptRow | None:
    """A prompt for PPO, counted in ``report``. One longer than ``max_length`` is None: cut, it would ask something
    else."""
    ids = encoder.encode_prompt(record.prompt)
    report.rows += 1
    if len(ids) > max_length:
        report.leave_out(f"prompt longer than {max_length} tokens", record.where)
        return None
    report.tokens += len(ids)
    return PromptRow(np.asarray(ids, np.int32), record)


_MakeRow = Callable[[Any, ChatEncoder, int, TokenReport], Any]
_ROW_OF: dict[Stage, _MakeRow] = {
    "rm": pair_row,
    "kto": labelled_row,
    "score": pair_row,
    "ppo": prompt_row,
}


def make_rows(stage: Stage, record: Any, encoder: ChatEncoder, max_length: int, report: TokenReport) -> list[Any]:
    """The rows of a record as its stage uses it: none if it is left out, several of a long text, else one.

    Raises:
        TemplateError: the template refuses the conversation; names the row.
    """
    try:
        if stage == "sft":
            return list(sft_rows(record, encoder, max_length, report))
        row = _ROW_OF[stage](record, encoder, max_length, report)
        return [] if row is None else [row]
    except TemplateError as error:
        hint = f"{error.hint}; or leave such rows out with --on-bad-row skip"
        raise TemplateError(f"{record.where}: {error.message}", hint=hint) from None


def tokenize_sft(
    records: Iterable[SftRecord], encoder: ChatEncoder, max_length: int, tick: Callable[[], None] = lambda: None
) -> tuple[list[TokenRow], TokenReport]:
    """Rows of `sft_rows`.

    Raises:
        DataError: no row is left.
    """
    return _tokenize("sft", records, encoder, max_length, tick)


def tokenize_pairs(
    records: Iterable[PreferenceRecord], encoder: ChatEncoder, max_length: int, tick: Callable[[], None] = lambda: None
) -> tuple[list[PairRow], TokenReport]:
    """Rows of `pair_row`.

    Raises:
        DataError: no row is left.
    """
    return _tokenize("rm", records, encoder, max_length, tick)


def tokenize_prompts(
    records: Iterable[PromptRecord], encoder: ChatEncoder, max_length: int, tick: Callable[[], None] = lambda: None
) -> tuple[list[PromptRow], TokenReport]:
    """Rows of `prompt_row`.

    Raises:
        DataError: no prompt is left.
    """
    return _tokenize("ppo", records, encoder, max_length, tick)


def _tokenize(
    stage: Stage, records: Iterable[Any], encoder: ChatEncoder, max_length: int, tick: Callable[[], None]
) -> tuple[list[Any], TokenReport]:
    report, rows = TokenReport(), []
    for record in records:
        tick()
        rows += make_rows(stage, record, encoder, max_length, report)
    refuse_none(len(rows), report)
    return rows, report


def refuse_none(rows: int, report: TokenReport) -> None:
    """
    Raises:
        DataError: no row is left.
    """
    if not rows:
        raise DataError(
            "no row is left to train on: " + ("; ".join(report.sentences()) or "the data is empty"),
            hint="raise --max-length, or for PPO --max-prompt-length",
        )
