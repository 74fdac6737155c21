"""Records to token rows, with an account of what was cut or left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhfkit.chat.template import ChatEncoder
from rlhfkit.data.batch import TokenRow, token_row
from rlhfkit.data.records import PreferenceRecord, PromptRecord, SftRecord
from rlhfkit.errors import DataError


@dataclass
class TokenReport:
    """Counts over a data set; every row is in ``rows`` and at most one of ``left_out``'s reasons."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> where

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out.setdefault(reason, []).append(where)

    def sentences(self) -> list[str]:
        """What a user should know, nothing if all is well."""
        lines = []
        if self.truncated:
            lines.append(f"{self.truncated} of {self.rows} rows were longer than --max-length and were cut")
        for reason, places in self.left_out.items():
            lines.append(f"{len(places)} of {self.rows} rows left out: {reason} (first: {places[0]})")
        return lines


@dataclass(frozen=True, slots=True)
class PairRow:
    """A prompt and its answers, best first, as token ids; every answer ends with its turn end unless cut."""

    prompt: NDArray[np.int32]
    answers: tuple[NDArray[np.int32], ...]
    margin: float


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt as token ids, with the record it came from."""

    prompt: NDArray[np.int32]
    record: PromptRecord


def tokenize_sft(
    records: Sequence[SftRecord], encoder: ChatEncoder, max_length: int, tick: Callable[[], None] = lambda: None
) -> tuple[list[TokenRow], TokenReport]:
    """Token rows for supervised fine-tuning.

    A row longer than ``max_length`` keeps its beginning: the end of the last answer, and so its turn end, is lost. A
    row with no supervised token left is left out and counted.

    Raises:
        DataError: no row is left.
    """
    report, rows = TokenReport(), []
    tokenizer = encoder.tokenizer
    for record in records:
        tick()
        report.rows += 1
        if record.text is not None:
            # Plain text: every token is learned, and that the text ends. Only a bos gives the first token a context.
            ids = [*encoder.encode_text(record.text), tokenizer.eos_token_id]
            if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
                ids = [tokenizer.bos_token_id, *ids]
            supervised = [True] * len(ids)
        else:
            encoded = encoder.encode(record.messages)
            ids, supervised = encoded.ids, encoded.supervised
        if len(ids) > max_length:
            report.truncated += 1
            ids, supervised = ids[:max_length], supervised[:max_length]
        row = token_row(ids, supervised)
        if row.targets == 0:
            report.leave_out("nothing to learn within --max-length", record.where)
            continue
        report.tokens += len(row)
        report.supervised += row.targets
        rows.append(row)
    return _not_empty(rows, report), report


def tokenize_pairs(
    records: Sequence[PreferenceRecord], encoder: ChatEncoder, max_length: int, tick: Callable[[], None] = lambda: None
) -> tuple[list[PairRow], TokenReport]:
    """Prompts and answers for the reward model.

    No pair is dropped for its length. A prompt that leaves no room is cut from the left, the same for all its answers,
    so that they are compared in the same context; an answer longer than ``max_length`` - 1 keeps its beginning.

    Raises:
        DataError: no row is left.
    """
    report, rows = TokenReport(), []
    for record in records:
        tick()
        report.rows += 1
        pairs = [encoder.encode_pair(record.prompt, answer) for answer in record.answers]
        prompt = pairs[0][0]
        answers = [ids[: max_length - 1] for _, ids in pairs]
        room = max_length - max(len(ids) for ids in answers)
        cut = len(prompt) > room or any(len(ids) > max_length - 1 for _, ids in pairs)
        report.truncated += cut
        prompt = prompt[max(0, len(prompt) - room) :]
        report.tokens += sum(len(prompt) + len(ids) for ids in answers)
        rows.append(
            PairRow(np.asarray(prompt, np.int32), tuple(np.asarray(ids, np.int32) for ids in answers), record.margin)
        )
    return _not_empty(rows, report), report


def tokenize_prompts(
    records: Sequence[PromptRecord], encoder: ChatEncoder, max_length: int, tick: Callable[[], None] = lambda: None
) -> tuple[list[PromptRow], TokenReport]:
    """Prompts for PPO. One longer than ``max_length`` is left out: cut, it would ask something else.

    Raises:
        DataError: no prompt is left.
    """
    report, rows = TokenReport(), []
    for record in records:
        tick()
        report.rows += 1
        ids = encoder.encode_prompt(record.prompt)
        if len(ids) > max_length:
            report.leave_out(f"prompt longer than {max_length} tokens", record.where)
            continue
        report.tokens += len(ids)
        rows.append(PromptRow(np.asarray(ids, np.int32), record))
    return _not_empty(rows, report), report


def _not_empty(rows: list[Any], report: TokenReport) -> list[Any]:
    if not rows:
        raise DataError(
            "no row is left to train on: " + ("; ".join(report.sentences()) or "the data is empty"),
            hint="raise --max-length, or for PPO --max-prompt-length",
        )
    return rows
