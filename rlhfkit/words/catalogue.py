"""Finds the translation of a finished text, by the fixed parts of the message that it was made from.

An entry ``{path}: no such file; its folder {folder} does not exist either`` is known again in any text that has these
parts in this order; what stands in the places of ``{path}`` and ``{folder}`` is carried over, and translated where it
is a message itself. The entry with the most fixed text wins. A text that is no entry is taken apart at the joints of
lists and sentences, so ``rows.jsonl:3: the row has no prompt`` needs no entry of its own; nor does a text with an entry
at its end, like ``, 3 skipped``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice, zip_longest

PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
# Fewer letters than this say little: what stands between them may then be one word, not any text.
TELLING = 4
JOINTS = {"; ": "；", ": ": "：", ". ": "。", ", ": "，", " and ": "和", " or ": "或"}
_JOINT = re.compile(r"(\n\s*|; |: |\. |, | and | or )")
ENDINGS = " ,;:\n"  # an entry that begins so is the end of another text: ", 3 skipped"
KEPT = "kept"  # texts that are shown as they are, or to nobody; for tools/words.py
MOST_MATCHES = 5
MOST_PIECES = 40  # a text of more is a document of someone else's, not a message


@dataclass(frozen=True)
class Entry:
    """One message: its English text and its translation, with the same places."""

    text: str
    translation: str

    @cached_property
    def fixed(self) -> list[str]:
        """The parts between the places."""
        return PLACE.split(self.text)[::2]

    @cached_property
    def skeleton(self) -> str:
        """The text without the names of its places."""
        return PLACE.sub("{}", self.text)

    @cached_property
    def letters(self) -> int:
        return sum(character.isalpha() for part in self.fixed for character in part)

    @cached_property
    def longest(self) -> str:
        return max(self.fixed, key=len)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        telling = self.letters >= TELLING
        held = [r".*?" if telling else r"\S+?"] * len(self.names)
        if telling and not self.fixed[-1]:
            held[-1] = "(?s:.*)"  # what is said last may have several lines
        places = [
            f"(?P<{name}>{held[i]})" if self.names.index(name) == i else f"(?P={name})"
            for i, name in enumerate(self.names)
        ]
        parts = chain.from_iterable(zip_longest(map(re.escape, self.fixed), places, fillvalue=""))
        return re.compile("".join(parts), re.DOTALL if "\n" in self.text else 0)

    def after(self, place: str) -> Entry:
        """The same with something in front of it."""
        return Entry(f"{{{place}}}{self.text}", f"{{{place}}}{self.translation}")

    def fill(self, values: Mapping[str, str]) -> str:
        return PLACE.sub(lambda place: values[place[1]], self.translation)

    @cached_property
    def names(self) -> list[str]:
        return PLACE.findall(self.text)


class Catalogue:
    """All messages of a language."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._plain = {entry.text: entry.translation for entry in self.entries if not entry.names}
        patterns = [entry for entry in self.entries if entry.names]
        endings = (entry for entry in self.entries if entry.text[0] in ENDINGS and entry.letters >= TELLING)
        patterns += [entry.after("before_it") for entry in endings]
        self._patterns = sorted(patterns, key=lambda entry: -sum(map(len, entry.fixed)))
        self._whole = lru_cache(4096)(self._as_one_message)

    @classmethod
    def parse(cls, text: str) -> Catalogue:
        """Of a JSON file: English to translation, by the file that the message first stands in."""
        parts = json.loads(text)
        return cls(Entry(*pair) for name, part in parts.items() if name != KEPT for pair in part.items())

    def translate(self, text: str) -> str:
        """The text in this language; parts that are no message stay as they are."""
        return JOINTS.get(text) or self._shown(text, inside=False)

    def matches(self, text: str) -> Iterator[tuple[Entry, dict[str, str]]]:
        """Entries that a text with places may be made from, and what stands in them; the most telling first."""
        for entry in self._patterns:
            if entry.longest in text and (match := entry.pattern.fullmatch(text)):
                yield entry, match.groupdict()

    def _shown(self, text: str, *, inside: bool) -> str:
        whole, sure = self._whole(text, inside)
        if whole is not None and sure:
            return whole
        # No message, or perhaps several of which one has places that took in the others.
        parts = self._parts(text)
        return parts if whole is None else min(whole, parts, key=_latin)

    def _as_one_message(self, text: str, inside: bool) -> tuple[str | None, bool]:
        """The translation of a text that is one message, else None; and whether it can be nothing else.

        ``inside``: the text stands within another one, where a single word is a name sooner than a message.
        """
        if (translation := self._plain.get(text)) is not None and not (inside and " " not in text.strip()):
            return translation, True
        found: list[str] = []
        for entry, values in islice(self.matches(text), MOST_MATCHES):
            where, colon, rest = text.partition(": ")
            again = next(self.matches(rest), None) if colon and " " not in where else None
            if again and again[0] is entry:
                # A file, line or key before a message that begins with a place, and is whole without it.
                found.append(where + JOINTS[colon] + self._filled(*again))
            else:
                found.append(self._filled(entry, values))
            if not any(_JOINT.search(value) for value in values.values()):
                break
        if found:
            return min(found, key=_latin), len(found) == 1 and not _JOINT.search(text)
        if (bare := text.strip()) != text and bare and (translation := self._whole(bare, inside)[0]) is not None:
            start = text.index(bare)
            return text[:start] + translation + text[start + len(bare) :], True
        return None, False

    def _filled(self, entry: Entry, values: Mapping[str, str]) -> str:
        shown = {name: self._shown(value, inside=True) if " " in value else value for name, value in values.items()}
        return entry.fill(shown)

    def _parts(self, text: str) -> str:
        """The text taken apart at its joints, so that as little as possible of it stays English."""
        parts = _JOINT.split(text)
        if not 1 < len(parts) <= 2 * MOST_PIECES:
            return text
        # From the end: the best that can be made of what begins at each part, and whether it begins with a message.
        best: dict[int, tuple[int, str, bool]] = {len(parts) + 1: (0, "", False)}
        for start in range(len(parts) - 1, -1, -2):
            choices = []
            for end in range(start + 1, len(parts) + 1, 2):
                piece = "".join(parts[start:end])
                whole = None if end - start == len(parts) else self._whole(piece, True)[0]
                if whole is None and end > start + 1:
                    continue
                left, rest, known = best[end + 1]
                joint = parts[end] if end < len(parts) else ""
                joint = JOINTS.get(joint, joint) if whole is not None or known else joint
                shown = (piece if whole is None else whole) + joint
                choices.append((left + _latin(shown), -end, shown + rest, whole is not None))
            left, _, shown, known = min(choices)
            best[start] = (left, shown, known)
        return best[0][1]


def _latin(text: str) -> int:
    """How much of a text is not translated, or a name."""
    return sum(character.isascii() and character.isalpha() for character in text)
