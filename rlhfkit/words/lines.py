"""Text whose lines may end between Chinese characters: Rich ends them at spaces alone, and cuts what is too long."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len
from rich.containers import Lines
from rich.text import Text

from rlhfkit.words import chosen, tr

NOT_FIRST = set("，。；：、！？）》”’…%,.;:!?)]}")  # on a line
NOT_LAST = set("（《“‘([{")


def shown(text: str, style: str = "") -> Text:
    """A text for people, in their language, ready for a table or a line of the screen."""
    return Text(text, style) if chosen() == "en" else Prose(tr(text), style)


class Prose(Text):
    """Text that is wrapped as Chinese is."""

    def wrap(self, console: Any, width: int, **options: Any) -> Lines:
        if options.get("no_wrap") or self.no_wrap:
            return super().wrap(console, width, **options)
        lines = Lines()
        for line in self.split(allow_blank=True):
            parts = line.divide(line_ends(line.plain, width))
            for part in parts:
                part.rstrip_end(width)
            lines.extend(parts)
        return lines


def line_ends(text: str, width: int) -> list[int]:
    """Where a text is cut into lines of at most so many cells."""
    ends: list[int] = []
    start, used = 0, 0
    last = 0  # the last place where this line may end
    for i, character in enumerate(text):
        if i > start and _may_end(text[i - 1], character):
            last = i
        wide = cell_len(character)
        if used + wide > width and character != " " and i > start:
            end = last if last > start else i
            ends.append(end)
            start, used = end, cell_len(text[end:i])
        used += wide
    return ends


def _may_end(before: str, after: str) -> bool:
    if before == " ":
        return True
    between = cell_len(before) == 2 or cell_len(after) == 2
    return between and after not in NOT_FIRST and before not in NOT_LAST and after != " "
