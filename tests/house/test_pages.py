"""The pages in docs/: links lead somewhere, every command and option is on one, examples compute what they show, and
the Chinese pages say the same as the English ones.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from rlhfkit.cli import app
from rlhfkit.config.stages import STAGES
from rlhfkit.data.parse import parse_row
from rlhfkit.data.rows import RawRow

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH = sorted(DOCS.glob("*.md"))
README, README_ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"
TRANSLATED = [(README, README_ZH), *((page, DOCS / "zh" / page.name) for page in ENGLISH)]
FOLDERS = ("docs", "examples", "benchmarks", "templates", "rlhfkit/assets")
PAGES = sorted([README, README_ZH, *(page for folder in FOLDERS for page in (ROOT / folder).glob("**/*.md"))])
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", read(page))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and inside of each fenced block."""
    return [((match[2].split() or [""])[0], match[3]) for match in FENCE.finditer(read(page))]


def headings(page: Path) -> list[tuple[int, str]]:
    return [(len(match[1]), match[2]) for match in re.finditer(r"^(#+) +(.+?) *$", prose(page), re.MULTILINE)]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: dict[str, int] = {}
    names = set()
    for _, text in headings(page):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that lie in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match(r"[a-z]+:", target):
            yield target


def faults_of_links(page: Path) -> list[str]:
    faults = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            faults.append(f"{target}: there is no {name}")
        elif anchor and anchor not in anchors(path):
            faults.append(f"{target}: {path.name} has no such heading")
    return faults


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    assert not faults_of_links(page)


def test_a_dead_link_shows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`: three\n\n[a](#one-two-three) [b](#one) [c](none.md) ![d](none.svg) `[e](none)`\n")
    assert [fault.partition(":")[0] for fault in faults_of_links(page.resolve())] == ["#one", "none.md", "none.svg"]


# -- commands and options ---------------------------------------------------------------------------------------------


def options_of(command: Any) -> set[str]:
    shown = (p for p in command.params if not getattr(p, "hidden", False))
    return {option for p in shown for option in p.opts[:1] if option.startswith("--")}


def not_on(pages: list[str], tables: str = "") -> list[str]:
    """Commands that no page names, and options that stand on no page beside their command, nor, of a stage, in the
    tables of all keys.
    """
    missing = []
    everywhere = set.intersection(*map(options_of, COMMANDS.values()))  # such as --lang, which any page may explain
    for name, command in COMMANDS.items():
        about = [text for text in pages if re.search(rf"rlhfkit {name}\b", text)]
        if not about:
            missing.append(name)
        for option in sorted(options_of(command)):
            places = pages if option in everywhere else [*about, tables] if name in STAGES else about
            if not any(re.search(rf"{option}(?![\w-])", text) for text in places):
                missing.append(f"{name} {option}")
    return missing


@pytest.mark.parametrize("folder", [DOCS, DOCS / "zh"], ids=named)
def test_every_command_and_option_is_on_a_page(folder: Path) -> None:
    pages = [read(page) for page in sorted(folder.glob("*.md"))]
    assert not not_on(pages, tables=read(folder / "configuration.md"))


def test_a_missing_option_shows() -> None:
    missing = not_on(["rlhfkit demo --outer --seed 1 --resume", "rlhfkit sft"], tables="--lora-rank")
    assert {"demo --out", "sft --model", "merge"} <= set(missing)
    assert not {"demo", "demo --seed", "sft", "sft --lora-rank"} & set(missing)


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if any(kind == "pycon" for kind, _ in blocks(p))], ids=named)
def test_sessions_print_what_they_show(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    session = "\n".join(block for kind, block in blocks(page) if kind == "pycon")
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, named(page), 0)
    printed: list[str] = []
    result = doctest.DocTestRunner().run(test, out=printed.append)
    assert result.attempted > 20
    assert not result.failed, "".join(printed)


@pytest.mark.parametrize("page", [DOCS / "data.md", README], ids=named)
def test_rows_that_are_shown_are_rows(page: Path) -> None:
    """Each example row of a table is read as one of the stage of its section, or of its table's first column."""
    counted: dict[str, int] = {}
    stage = ""
    for line in read(page).splitlines():
        if heading := re.match(r"### `rlhfkit (\w+)`", line) or re.match(r"\| (sft|rm|ppo) \|", line):
            stage = heading[1]
        elif line.startswith("#"):
            stage = ""
        for text in re.findall(r"`(\{.*?\})`", line) if stage and line.startswith("|") else ():
            parse_row(RawRow(f"{page.name}: {line}", json.loads(text)), stage)  # type: ignore[arg-type]
            counted[stage] = counted.get(stage, 0) + 1
    assert set(counted) >= {"sft", "rm", "ppo"}
    assert sum(counted.values()) >= 8


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_of_a_page_parses(page: Path) -> None:
    for kind, block in blocks(page):
        if kind == "python":
            ast.parse(block)


def test_the_pictures_are_fresh() -> None:
    maker = loaded(DOCS / "make_pipeline.py")
    for path, words in maker.PICTURES.items():
        assert read(path) == maker.pipeline(words), "run: python docs/make_pipeline.py"


def loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- two languages ----------------------------------------------------------------------------------------------------


def code(page: Path) -> list[tuple[str, list[str]]]:
    """What is typed, without comments. Blocks of text have words, which are translated: their number counts."""
    found = []
    for kind, block in blocks(page):
        lines = [re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in block.splitlines()]
        found.append((kind, [] if kind == "text" else [line for line in lines if line]))
    return found


def rows_of_tables(page: Path) -> list[int]:
    """Cells of each row of each table."""
    return [line.replace("\\|", "").count("|") for line in prose(page).splitlines() if line.startswith("|")]


def figures(page: Path) -> list[str]:
    """Numbers with a point, and all of tables; sentences may have them in another order."""
    text = prose(page)
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return sorted(re.findall(r"(?<![\w.])\d+\.\d+", text)) + sorted(re.findall(r"(?<![\w.,])\d+(?![\w.])", tables))


@pytest.mark.parametrize(("page", "chinese"), TRANSLATED, ids=[named(page) for page, _ in TRANSLATED])
def test_both_languages_say_the_same(page: Path, chinese: Path) -> None:
    """As far as a machine sees it: the same headings, code, tables and numbers, and links to the same places."""
    assert chinese.is_file()
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(chinese)]
    assert code(page) == code(chinese)
    assert rows_of_tables(page) == rows_of_tables(chinese)
    assert figures(page) == figures(chinese)
    assert where_to(page) == where_to(chinese)


def where_to(page: Path) -> list[str]:
    """The files that a page links to, in any order, those of its language under their English names."""
    found = []
    for target in links(page):
        name = target.partition("#")[0]
        path = named((page.parent / name).resolve() if name else page)
        found.append(path.replace("docs/zh/", "docs/").replace("README.zh-CN.md", "README.md"))
    return sorted(set(found) - {"README.md"})  # each README links to the other


def test_no_chinese_page_is_without_its_english_one() -> None:
    assert {page.name for page in (DOCS / "zh").glob("*.md")} <= {page.name for page in ENGLISH}


# -- the cookbook and the quick start ---------------------------------------------------------------------------------

GPU_GIB = 24


@pytest.fixture(scope="module")
def planner() -> ModuleType:
    return loaded(ROOT / "benchmarks" / "memory_table.py")


COLUMNS = ("sft", "rm", "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("stage", COLUMNS)
@pytest.mark.parametrize("folder", ["qwen2.5-7b", "llama3-8b", "baichuan2-7b"])
def test_recipes_of_the_cookbook_fit_as_the_page_says(
    folder: str, stage: str, planner: ModuleType, tmp_path: Path
) -> None:
    """Each is planned on a folder with the model's config.json; the page's table may be off by a tenth."""
    (row,) = [line for line in read(DOCS / "cookbook.md").splitlines() if line.startswith(f"| examples/{folder} ")]
    told = float(row.split("|")[2 + COLUMNS.index(stage)])
    planned = planner.recipe_gib(tmp_path, next((ROOT / "examples" / folder).glob(f"*-{stage}.yaml")))
    assert planned == pytest.approx(told, rel=0.1)
    assert planned < GPU_GIB


@pytest.mark.slow
def test_the_quick_start_runs_as_written(tmp_path: Path) -> None:
    """All of its commands but the installation, one after the other, on the bundled model."""
    typed = [block for kind, block in blocks(DOCS / "quick-start.md") if kind == "bash" and "pip install" not in block]
    script = "set -e\n" + "\n".join(typed).replace("MODEL=rlhfkit/", f"MODEL={ROOT}/rlhfkit/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing was found that would hurt training." in done.stdout
    assert (tmp_path / "first.html").is_file()
