"""From sources to the token rows of a stage: read, parsed, made into tokens, and kept for the next run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import rlhfkit.chat
import rlhfkit.data
from rlhfkit.chat.template import ChatEncoder
from rlhfkit.data.parse import Stage
from rlhfkit.data.sources import Item, OnBad, Place, SourceReport, parse_items, refuse_unusable
from rlhfkit.data.store import Made, Store, stored, temporary, to_arrow
from rlhfkit.data.tokenize import PromptRow, TokenReport, make_rows
from rlhfkit.data.workers import in_order
from rlhfkit.errors import DataError, TemplateError

R = TypeVar("R")

STRETCH = 512  # rows that are worked on together, and a batch of the Arrow file
ALONE = 2  # stretches that are done before other processes are started

Stretch = list[Item]
Counting = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Progress over so many rows, 0 if that is not known; gives a function that takes how many more are done."""


@dataclass(frozen=True)
class Recipe:
    """How rows become token rows.

    Args:
        stage: whose rows.
        encoder: the model's.
        limit: tokens, as the stage's function in `rlhfkit.data.tokenize` takes it.
        on_bad_row: as in `load_records`.
    """

    stage: Stage
    encoder: ChatEncoder
    limit: int
    on_bad_row: OnBad

    def rows(self, name: str, stretch: Stretch) -> tuple[list[Any], SourceReport, TokenReport]:
        """The token rows of a stretch of the source ``name``, and what became of its rows."""
        source, tokens = SourceReport(name), TokenReport()
        records = parse_items(stretch, self.stage, self.on_bad_row, source)
        made: list[Any] = []
        for record in records:
            try:
                made += make_rows(self.stage, record, self.encoder, self.limit, tokens)
            except TemplateError as error:
                if self.on_bad_row == "error":
                    raise
                source.refuse(error.message)
        return made, source, tokens

    def key(self, name: str, content: str) -> str:
        """Of all that the rows of a source of this content depend on; its name stands in what is told of them."""
        libraries = [version(library) for library in ("transformers", "tokenizers")]
        parts = [_code(), libraries, self.stage, self.encoder.digest, self.limit, self.on_bad_row, name, content]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def prepare_rows(name: str, place: Place, recipe: Recipe, counting: Counting, say: Callable[[str], None]) -> Store:
    """The token rows of a source of sft or rm, from the cache if they are in it.

    Args:
        name: as the user gave it.
        place: where it is.
        recipe: what is made.
        counting: shows the progress.
        say: takes lines for the user.

    Raises:
        DataError, TemplateError: the first fault in the order of the source.
    """
    content = place.content()

    def make() -> Iterator[Made]:
        whole = SourceReport(name)
        for rows, source, tokens in work_through(place, lambda s: recipe.rows(name, s), counting, content.rows):
            whole.extend(source)
            yield Made(to_arrow(recipe.stage, rows), source, tokens)
        refuse_unusable(whole, recipe.stage)

    if content.digest is None:
        return temporary(recipe.stage, name, make)
    return stored(recipe.stage, name, recipe.key(name, content.digest), make, say)


def prepare_prompts(
    name: str, place: Place, recipe: Recipe, counting: Counting
) -> tuple[list[PromptRow], SourceReport, TokenReport]:
    """The prompts of a source. They are held, since reward functions take any column of their rows."""
    prompts: list[PromptRow] = []
    source, tokens = SourceReport(name), TokenReport()
    for rows, read, counted in work_through(place, lambda s: recipe.rows(name, s), counting, place.content().rows):
        prompts += rows
        source.extend(read)
        tokens.extend(counted)
    refuse_unusable(source, recipe.stage)
    return prompts, source, tokens


def work_through(place: Place, work: Callable[[Stretch], R], counting: Counting, expected: int) -> Iterator[R]:
    """``work`` of each stretch of a source's rows, in order and in several processes; see `in_order`.

    Args:
        place: of the source.
        work: done to a stretch.
        counting: shows the progress.
        expected: about how many rows there are, 0 if that is not known.
    """
    with counting(expected) as tick:
        for size, result in in_order(lambda s: (len(s), work(s)), _cut(place.items()), alone=ALONE):
            tick(size)
            yield result


def _cut(items: Iterator[Item]) -> Iterator[Stretch]:
    """Stretches of what is read. What stands before a fault of the whole file comes before it."""
    stretch: Stretch = []
    try:
        for item in items:
            stretch.append(item)
            if len(stretch) == STRETCH:
                yield stretch
                stretch = []
    except DataError:
        if stretch:
            yield stretch
        raise
    if stretch:
        yield stretch


def _code() -> str:
    """Of the code that makes rows, so that another version of it finds no rows of this one."""
    found = hashlib.sha256()
    for package in (rlhfkit.chat, rlhfkit.data):
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
