"""Lines end between Chinese characters, never inside a Latin word that fits, and nothing is lost."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from rlhfkit.words import speaking
from rlhfkit.words.lines import NOT_FIRST, line_ends, shown

TEXT = "计算所用的数值格式；auto 在硬件支持时为 bf16。（参见 docs/training.md，--precision）"


def lines(text: str, width: int) -> list[str]:
    cuts = [0, *line_ends(text, width), len(text)]
    return [text[a:b].rstrip(" ") for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("width", range(18, 90, 3))
def test_lines_fit_and_hold_everything(width: int) -> None:
    found = lines(TEXT, width)
    assert max(map(cell_len, found)) <= width
    assert "".join(found).replace(" ", "") == TEXT.replace(" ", "")
    assert all(line[0] not in NOT_FIRST for line in found)
    # Words are whole: each stands on one line.
    for word in ("auto", "bf16", "docs/training.md", "--precision"):
        assert any(word in line for line in found)


def test_a_word_longer_than_the_line_is_cut() -> None:
    assert lines("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert lines("", 4) == [""]


def test_lines_are_filled() -> None:
    """Rich alone would break at the two spaces and leave most of each line empty."""
    found = lines("训练保存下来的目录 SRC 训练保存下来的目录训练保存下来的目录", 20)
    assert [cell_len(line) for line in found] == [18, 20, 20]


def test_a_table_cuts_nothing_off() -> None:
    with speaking("zh"):
        table = Table()
        table.add_column("a", width=10)
        table.add_row(shown("{}: no such file or folder".format("很长的名字" * 3)))
        stream = io.StringIO()
        Console(file=stream, width=40).print(table)
    text = stream.getvalue()
    assert "…" not in text
    assert "没有这个文件或目录" in "".join(line.strip("│ ") for line in text.splitlines())
