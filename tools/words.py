"""Compares what rlhfkit says with the catalogue of translations, rlhfkit/words/zh.json.

    python tools/words.py           lists messages without a translation, ready to be filled in, and stale entries
    python tools/words.py --tidy    puts both right in the file: adds the missing with an empty translation, drops the
                                    stale, and sorts all by where they stand in the code

Messages are found in the source: every string or f-string of the two packages that reads like prose, the words passed
to ``tr``, ``shown`` and ``mark``, and the docstrings of commands. Texts that nobody is shown, or that are shown as they
are, stand under ``kept``.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhfkit.words.catalogue import KEPT, PLACE, Entry

ROOT = Path(__file__).parents[1]
CATALOGUE = ROOT / "rlhfkit" / "words" / "zh.json"
# In English on purpose: the card is a file for the hub, the conformance checks speak to authors of adapters, and the
# mathematics raises what only a caller of the Python API can cause. What Typer says stands under `theirs`.
NOT_SHOWN = (
    "rlhfkit/report/card.py",
    "rlhfkit/families/conformance.py",
    "rlhfkit/algo",
    "rlhfkit/words/command_line.py",
)
# Two words, or one and a place that is filled in.
PROSE = re.compile(r"\S +\S*[A-Za-z]{2}|[A-Za-z]{2}.*[ :].*\{\}|\{\}.*[ :].*[A-Za-z]{2}")
WORD = re.compile(r"[A-Za-z]{2}")
SHOWN_BY_JINJA = re.compile(r"""\b(?:tr\("|raise_exception\(')([^"']+)["']\)""")
COMMAND = re.compile(r"(rlhfkit|pip|git|sed) (-C \S+ )?[a-z-]+ ")
THEIRS = "theirs"  # what Typer, Click, pydantic, the JSON parser and the system say


@dataclass(frozen=True)
class Message:
    text: str
    file: str
    line: int


def messages(root: Path = ROOT) -> list[Message]:
    """Every text of the packages that may be shown, in the order of files and lines, each once."""
    found: dict[str, Message] = {}
    for package in ("rlhfkit", "adapters"):
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(NOT_SHOWN):
                for message in sorted(_of_file(path, name), key=lambda m: m.line):
                    found.setdefault(PLACE.sub("{}", message.text), message)
    for path in sorted([*(root / "rlhfkit" / "assets").glob("*.jinja"), *(root / "templates").glob("*.jinja")]):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for text in filter(WORD.search, SHOWN_BY_JINJA.findall(line)):
                found.setdefault(text, Message(text, path.relative_to(root).as_posix(), number))
    return list(found.values())


def _of_file(path: Path, name: str) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = _silent(tree)
    said = {id(arg) for call in _calls(tree, "tr", "mark", "shown") for arg in call.args}
    # Names of checks, titles and labels of curves: single words, among names of metrics.
    calls = _calls(tree, "Panel", "Finding", "Check")
    values = (value for call in calls for value in (*call.args, *(k.value for k in call.keywords if k.arg == "x")))
    labels = (part for value in values for part in ast.walk(value))
    said |= {id(part) for part in labels if _is_word(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and _is_command(node) and (doc := ast.get_docstring(node)):
            for paragraph in paragraphs(doc):
                yield Message(paragraph, name, node.lineno)
        if id(node) in silent:
            continue
        if (text := template(node)) is None:
            continue
        for part in ast.walk(node):
            if part is not node and isinstance(part, (ast.Constant, ast.JoinedStr)) and _is_piece(node, part):
                silent.add(id(part))
        text = text.partition(" \\[")[0]  # what an option may be: shown as it is
        parts = PLACE.sub("{}", text)
        if (
            WORD.search(PLACE.sub("", text))
            and not COMMAND.match(f"{text} ")
            and (id(node) in said or PROSE.search(parts))
        ):
            for paragraph in paragraphs(text) if "\n\n" in text else [text]:
                yield Message(paragraph, name, node.lineno)


def _is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and "_" not in str(node.value))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a help text, each on one line; command lines and what is only marked are left out."""
    blocks = (" ".join(block.split()) for block in inspect.cleandoc(text).split("\n\n"))
    return [block for block in blocks if block and not block.startswith("rlhfkit ")]


def template(node: ast.AST) -> str | None:
    """A string, an f-string or a sum of these as one text with named places; None for anything else."""
    if not (pieces := _flat(node)) or not any(isinstance(piece, str) for piece in pieces):
        return None
    named: dict[str, str] = {}
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        source = ast.unparse(piece)
        if source not in named:
            stem = _name(piece) or "value"
            name, number = stem, 2
            while name in named.values():
                name, number = f"{stem}{number}", number + 1
            named[source] = name
        text += "{" + named[source] + "}"
    return text


def _flat(node: ast.AST) -> list[str | ast.expr]:
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [
            str(v.value) if isinstance(v, ast.Constant) else v.value if isinstance(v, ast.FormattedValue) else ""
            for v in node.values
        ]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_flat(side) or [side] for side in (node.left, node.right)]
        return sides[0] + sides[1] if any(_flat(side) for side in (node.left, node.right)) else []
    return []


def _is_piece(whole: ast.AST, part: ast.AST) -> bool:
    """Whether a string is a part of a larger one, not an argument inside one of its places."""
    if isinstance(whole, ast.JoinedStr):
        return part in whole.values or any(
            part is spec for v in whole.values if isinstance(v, ast.FormattedValue) for spec in ast.walk(v)
            if v.format_spec is not None and spec in set(ast.walk(v.format_spec))
        )  # fmt: skip
    if isinstance(whole, ast.BinOp):
        return any(part is side or _is_piece(side, part) for side in (whole.left, whole.right))
    return False


def _name(node: ast.expr) -> str:
    """A place's name for the translator: the variable, attribute or function that fills it."""
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Attribute):
        name = "type" if node.attr == "__name__" else node.attr
    elif isinstance(node, ast.Subscript):
        key = node.slice
        name = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else _name(node.value)
    elif isinstance(node, ast.Call):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)
        inner = function in ("join", "len", "str", "repr", "sum", "max", "min", "list", "sorted", "some", "first_line")
        name = _name(node.args[0]) if inner and node.args else function
    elif isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        name = _name(node.generators[0].iter)
    elif isinstance(node, (ast.BoolOp,)):
        name = _name(node.values[0])
    elif isinstance(node, ast.BinOp):
        name = _name(node.left)
    else:
        name = ""
    return re.sub(r"[^a-z0-9_]", "", str(name).lower()).strip("_0123456789")


def _silent(tree: ast.AST) -> set[int]:
    """Strings that are no messages: docstrings, styles, patterns, mistakes of the code."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(id(node.value))
        elif (
            (isinstance(node, ast.keyword) and node.arg in ("style", "loc", "message"))
            or isinstance(node, ast.Assert)
            or (isinstance(node, ast.Call) and _callee(node) in ("compile", *_OURS_ALONE))
        ):
            found.update(map(id, ast.walk(node)))
    return found


_OURS_ALONE = ("AssertionError", "ImportError", "TypeError", "IndexError")  # mistakes of the code, not of its user


def _calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _callee(node) in names:
            yield node


def _callee(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _is_command(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Call) and _callee(d) in ("command", "as_command") for d in function.decorator_list)


# -- the file ----------------------------------------------------------------------------------------------------------


def read(path: Path = CATALOGUE) -> tuple[list[Entry], list[Entry], list[str]]:
    """Our messages, those of libraries, and the texts that are kept."""
    parts = json.loads(path.read_text(encoding="utf-8"))
    kept = parts.pop(KEPT)
    theirs = [Entry(*pair) for pair in parts.pop(THEIRS).items()]
    return [Entry(*pair) for part in parts.values() for pair in part.items()], theirs, kept


def write(found: list[Message], ours: list[Entry], theirs: list[Entry], kept: list[str]) -> None:
    """The file anew: messages of the source in its order, with the translations there are."""
    known = {entry.skeleton: entry for entry in ours}
    parts: dict[str, object] = {}
    for message in found:
        entry = known.get(PLACE.sub("{}", message.text)) or Entry(message.text, "")
        part = parts.setdefault(message.file, {})
        assert isinstance(part, dict)
        part[entry.text] = entry.translation
    parts |= {THEIRS: {entry.text: entry.translation for entry in theirs}, KEPT: kept}
    CATALOGUE.write_text(json.dumps(parts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def compare(found: list[Message], ours: list[Entry], kept: list[str]) -> tuple[list[Message], list[str]]:
    """Messages without a translation, and texts of the catalogue that no source has."""
    known = {entry.skeleton for entry in ours if entry.translation}
    silent = {PLACE.sub("{}", text) for text in kept}
    said = {PLACE.sub("{}", message.text) for message in found}
    missing = [m for m in found if (key := PLACE.sub("{}", m.text)) not in known and key not in silent]
    texts = [*(entry.text for entry in ours), *kept]
    return missing, [text for text in texts if PLACE.sub("{}", text) not in said]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tidy", action="store_true", help="write the file anew")
    tidy = parser.parse_args().tidy
    found = messages()
    ours, theirs, kept = read()
    missing, stale = compare(found, ours, kept)
    if tidy:
        silent = {PLACE.sub("{}", text) for text in kept}
        shown = [message for message in found if PLACE.sub("{}", message.text) not in silent]
        write(shown, ours, theirs, [text for text in kept if text not in stale])
    for message in missing:
        print(f'{message.file}:{message.line}\n  {json.dumps(message.text, ensure_ascii=False)}: "",')
    for text in stale:
        print(f"in no source any more: {json.dumps(text, ensure_ascii=False)}")
    print(f"{len(missing)} without a translation, {len(stale)} stale", file=sys.stderr)
    return int(bool(missing or (stale and not tidy)))


if __name__ == "__main__":
    sys.exit(main())
