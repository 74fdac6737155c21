"""docs/adapters.md as written: its package is put on sys.path, found, and passes the test that it prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.families.base import Family
from rlhfkit.families.conformance import byte_tokenizer
from rlhfkit.families.registry import find_family, installed_families

GUIDE = Path(__file__).parents[2] / "docs" / "adapters.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The guide's test module, with the guide's package installed."""
    adapter, test = blocks("python")
    (template,) = blocks("jinja")
    (project,) = blocks("toml")
    package, info = tmp_path / "river_adapter", tmp_path / "river_adapter-0.1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(adapter, encoding="utf-8")
    (package / "river.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "guide_test.py").write_text(test, encoding="utf-8")
    # What an installer makes of the project table: a name, a version, and the entry points.
    name, number = (re.search(rf'^{key} = "(.*)"$', project, re.MULTILINE) for key in ("name", "version"))
    entry = re.search(r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"$', project, re.MULTILINE)
    assert name
    assert number
    assert entry
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name[1]}\nVersion: {number[1]}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2]} = {entry[3]}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed_families.cache_clear()
    yield import_module("guide_test")
    installed_families.cache_clear()
    for module in ("guide_test", "river_adapter"):
        sys.modules.pop(module, None)


def test_family_of_the_guide_is_found(guide: ModuleType) -> None:
    assert find_family({"model_type": "river"}) is guide.FAMILY
    item = next(item for item in installed_families() if item.family.name == "river")
    assert (item.package, item.version) == ("river-adapter", "0.1")


def test_tests_of_the_guide_pass(guide: ModuleType) -> None:
    tests = [name for name in vars(guide) if name.startswith("test_")]
    assert tests == ["test_facts", "test_chat_format"]
    for name in tests:
        getattr(guide, name)()


def test_format_of_the_guide_is_what_it_says(guide: ModuleType) -> None:
    tokenizer = byte_tokenizer(["<|turn|>"])
    encoder = ChatEncoder(tokenizer, load_template(guide.FAMILY.template))
    assert encoder.added_controls == ("<|done|>",)
    ids = encoder.encode([Message("user", "Hello"), Message("assistant", "Hi")]).ids
    assert tokenizer.decode(ids) == "<|turn|>user\nHello<|done|><|turn|>assistant\nHi<|done|>"


def test_guide_names_every_fact_of_a_family() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert [field for field in Family.__dataclass_fields__ if field not in text] == []
