"""Every message of the source has its translation, with the same places, and is found again in what is shown."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from rlhfkit.words import catalogue
from rlhfkit.words.catalogue import PLACE, TELLING, Entry

TOOL = Path(__file__).parents[2] / "tools" / "words.py"
SAME = {
    "chosen", "rejected", "chosen − rejected", "rollout", "rollouts", "pickles", "tokens", "nats per token",
    "{whole}:{whole2} min", "[Errno {number}] {message}",
}  # fmt: skip
SAMPLES = ("v{}", "/my data/set-{}.json", "{},234.5")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("words_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def test_no_message_lacks_its_translation(tool: ModuleType) -> None:
    ours, _, kept = tool.read()
    missing, stale = tool.compare(tool.messages(), ours, kept)
    listed = "\n".join(f'{m.file}:{m.line}: "{m.text}"' for m in missing)
    assert not missing, f"to be filled in in {tool.CATALOGUE.name} (python tools/words.py --tidy adds them):\n{listed}"
    assert not stale, f"in no source any more (python tools/words.py --tidy drops them): {stale}"


def test_a_new_message_is_found(tool: ModuleType, tmp_path: Path) -> None:
    """As an error, in a fragment of one, in a command's help, as a single word of a table."""
    (tmp_path / "rlhfkit").mkdir()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "rlhfkit" / "new.py").write_text(
        '"""A module of ours."""\n'
        "def check(path, n):\n"
        '    """Not shown."""\n'
        "    more = f', and {n:,} of them' if n else ''\n"
        "    raise ConfigError(f'{path.name} is too new{more}: ' + str(n), hint='wait a little')\n"
        "@app.command('new')\n"
        "def new(rows: Annotated[int, typer.Option(help='Rows to take. \\\\[1|2]')]):\n"
        '    """Do what is new.\n\n    And say\n    so.\n\n    [bold]Example[/bold]\n\n      rlhfkit new x\n    """\n'
        "    table.add_column(tr('what'), style='bold red')\n"
        "    re.compile('not shown either')\n",
        encoding="utf-8",
    )
    assert [message.text for message in tool.messages(tmp_path)] == [
        ", and {n} of them",
        "{name} is too new{more}: {n}",
        "wait a little",
        "Do what is new.",
        "And say so.",
        "[bold]Example[/bold]",
        "Rows to take.",
        "what",
    ]


@pytest.mark.parametrize("language", ["zh"])
def test_translations_have_the_places_of_their_message(language: str) -> None:
    for entry in catalogue(language).entries:
        assert set(entry.names) == set(PLACE.findall(entry.translation)), entry.text
        for mark in ("[bold]", "`", "{}", "\\n"):
            assert (mark in entry.text) == (mark in entry.translation), entry.text


def test_no_two_entries_have_the_same_fixed_parts() -> None:
    counts = Counter(entry.skeleton for entry in catalogue("zh").entries)
    assert [skeleton for skeleton, count in counts.items() if count > 1] == []


def _samples(entry: Entry) -> list[dict[str, str]]:
    """What may stand in the places of an entry. Places with a space between them never hold one."""
    one_word = entry.letters < TELLING or "{} {}" in entry.skeleton
    forms = [form for form in SAMPLES if not (one_word and " " in form)]
    names = list(dict.fromkeys(entry.names))
    return [{name: form.format(i) for i, name in enumerate(names)} for form in forms]


def test_every_message_is_found_again_when_it_is_shown() -> None:
    chinese = catalogue("zh")
    wrong = []
    for entry in chinese.entries:
        if re.search(r"[a-z}]\{\}", entry.skeleton):
            continue  # the place holds an ending, or nothing: tests/words/test_catalogue.py has these
        for values in _samples(entry):
            text = PLACE.sub(lambda place, values=values: values[place[1]], entry.text)  # type: ignore[misc]
            if (shown := chinese.translate(text)) != entry.fill(values):
                wrong.append((text, shown))
    assert wrong == []


def test_translations_are_chinese() -> None:
    """No entry was filled with its own English; what has no Chinese in it is a name or a unit."""
    same = {entry.text for entry in catalogue("zh").entries if not re.search(r"[\u4e00-\u9fff：（]", entry.translation)}
    assert same == SAME


def test_punctuation_is_chinese() -> None:
    """Commas, colons and brackets next to a Chinese character are full-width."""
    for entry in catalogue("zh").entries:
        assert not re.search(r"[\u4e00-\u9fff][,;:(]|[\u4e00-\u9fff]\. ", entry.translation), entry.text
