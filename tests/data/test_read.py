"""Reading files: every format gives the same rows, every fault names its place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlhfkit.data import table_rows, text
from rlhfkit.data.read import content_of, read_rows
from rlhfkit.data.rows import RawRow, Remark
from rlhfkit.errors import DataError

ROWS = [{"prompt": "你好，世界", "response": 'a "b", c;\td'}, {"prompt": "two\nlines", "response": "x"}]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,response\n"你好，世界","a ""b"", c;\td"\n"two\nlines",x\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fields(path: Path) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(path)]


def places(path: Path) -> list[str]:
    return [row.where.removeprefix(str(path)) for row in read_rows(path)]


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return caught.value


def message(path: Path) -> str:
    """The refusal's message, with the path shortened to its name."""
    return refusal(path).message.replace(f"{path.parent}/", "")


def parquet_bytes(folder: Path, rows: list[dict[str, Any]], **options: Any) -> bytes:
    path = folder / "made.tmp"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    content = path.read_bytes()
    path.unlink()
    return content


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSON_LINES),
        ("lines-called.json", JSON_LINES),
        ("no-suffix", JSON_LINES),
        ("crlf.jsonl", JSON_LINES.replace("\n", "\r\n")),
        ("blank-lines.jsonl", "\n" + JSON_LINES.replace("\n", "\n \n")),
        ("bom.jsonl", "\ufeff" + JSON_LINES),
        ("no-last-newline.jsonl", JSON_LINES.rstrip()),
        ("rows.json", json.dumps(ROWS, ensure_ascii=False)),
        ("indented.json", json.dumps(ROWS, indent=2)),
        ("array-called.jsonl", json.dumps(ROWS)),
        ("bom.json", "\ufeff " + json.dumps(ROWS)),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("wrapped-indented.json", json.dumps({"data": ROWS}, indent=1)),
        ("comma.csv", CSV),
        ("bom.csv", "\ufeff" + CSV),
        ("semicolon.csv", CSV.replace(",response", ";response").replace('界",', '界";').replace('es",', 'es";')),
        ("pipe.csv", CSV.replace(",response", "|response").replace('界",', '界"|').replace('es",', 'es"|')),
        ("tab.csv", CSV.replace(",response", "\tresponse").replace('界",', '界"\t').replace('es",', 'es"\t')),
        ("tab.tsv", CSV.replace(",response", "\tresponse").replace('界",', '界"\t').replace('es",', 'es"\t')),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    data = gzip.compress(content.encode()) if packed else content.encode()
    path = write(tmp_path, f"{name}.gz" if packed else name, data)
    assert fields(path) == ROWS


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    assert fields(write(tmp_path, "rows.jsonl", gzip.compress(JSON_LINES.encode()))) == ROWS


def test_crlf_inside_quotes_is_kept_and_at_line_ends_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", 'prompt,response\r\n"a\r\nb",c\r\n')
    assert fields(path) == [{"prompt": "a\r\nb", "response": "c"}]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_parquet_is_read_over_all_row_groups(tmp_path: Path, packed: bool) -> None:
    rows = [{"prompt": str(i), "turns": [{"role": "user", "content": "x"}]} for i in range(5)]
    content = parquet_bytes(tmp_path, rows, row_group_size=2)
    path = write(tmp_path, "rows.parquet", gzip.compress(content) if packed else content)
    assert fields(path) == rows
    assert places(path) == [f": row {i}" for i in range(1, 6)]


def test_places_are_lines_and_for_arrays_row_numbers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(write(tmp_path, "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')) == [":2", ":4"]
    array = '[\n{"a": 1},\n\n {"a": "x\\n",\n"b": 3}, {"a": 4}\n,{"a": [\n]}\n]'
    lines = [":2 (row 1)", ":4 (row 2)", ":5 (row 3)", ":6 (row 4)"]
    for size in (1, 3, 1000):
        monkeypatch.setattr(text, "_CHUNK_BYTES", size)
        assert places(write(tmp_path, "a.json", array)) == lines
        wrapped = '{"version": [1,\n{}], "none": null\n, "rows"\n: ' + array + ', "more": "x"}'
        assert places(write(tmp_path, "w.json", wrapped)) == [f":{int(at[1]) + 3}{at[2:]}" for at in lines]
    # The line is the one on which the row begins, also after cells that hold line breaks.
    assert places(write(tmp_path, "a.csv", 'a,b\n"1\n2",3\n\n4,5\n')) == [":2", ":5"]


def test_the_line_separator_of_unicode_ends_no_line(tmp_path: Path) -> None:
    assert fields(write(tmp_path, "a.jsonl", '{"a": "x\u2028y\u0085z"}\n')) == [{"a": "x\u2028y\u0085z"}]


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a": \n{"a": 5}\n')
    rows = read_rows(path)
    assert next(rows) == RawRow(f"{path}:1", {"a": 1})
    assert [next(rows).fields["a"], next(rows).fields["a"]] == [2, 3]
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        next(rows)


def test_json_lines_are_never_held_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", ('{"a": "' + "x" * 2_000 + '"}\n') * 4_000)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 4_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 8


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_row_of_a_megabyte_is_a_row(tmp_path: Path, name: str) -> None:
    rows = [{"a": "好" * 350_000 + str(i), "b": "x"} for i in range(3)]
    lines = {
        "a.json": json.dumps(rows, ensure_ascii=False),
        "a.csv": "a,b\n" + "".join(f"{row['a']},x\n" for row in rows),
    }.get(name, "".join(json.dumps(row) + "\n" for row in rows))
    assert fields(write(tmp_path, name, gzip.compress(lines.encode(), 1) if name.endswith("gz") else lines)) == rows


@pytest.mark.parametrize("start", ["[", "\ufeff \n[\n"])
def test_a_json_array_is_never_held_whole(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_CHUNK_BYTES", 1 << 16)
    items = ",".join(['{"a": "' + "好" * 700 + '"}'] * 4_000)
    path = write(tmp_path, "a.json", start + items + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 4_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 8


HARD = [
    {"a": '你好 \u2028 \\ " ] } , [ {', "b": [1, -2.5e-7, True, None, {}, [], {"é": "😀" * 9}]},
    {"a": "x" * 90, "b": 12345678901234567890},
    {"messages": [{"role": "user", "content": "]"}] * 4},
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 61])
@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_an_array_is_the_same_wherever_its_pieces_end(
    tmp_path: Path, size: int, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.dumps(HARD, **form)
    path = write(tmp_path, "a.json", "\ufeff" + whole)
    monkeypatch.setattr(text, "_CHUNK_BYTES", size)
    assert fields(path) == HARD
    # A cut anywhere is a fault in the line of the cut; a number alone may end where it was cut.
    for end in range(len(whole) - 1, 10, -7):
        write(tmp_path, "a.json", whole[:end])
        place = f"a.json:{whole.count(chr(10), 0, end) + 1}"
        found = message(path)
        assert found.startswith(place) or "Unterminated" in found
        assert ": the file ends inside the array, at row " in found or "not valid JSON" in found


def test_a_fault_far_into_an_array_has_its_line_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_CHUNK_BYTES", 100)
    rows = [json.dumps({"a": "x" * 50}) for _ in range(30)]
    path = write(tmp_path, "a.json", "[" + ",\n".join(rows) + ',\n{"a": 1, "b": oops}]')
    assert message(path) == "a.json:31: not valid JSON at column 15: Expecting value; the parser saw 'oops}]'"
    path = write(tmp_path, "b.json", "[" + ",".join(rows) + ', {"a": oops}]')
    column = 1 + sum(len(row) + 1 for row in rows) + len(' {"a": ') + 1
    assert message(path).startswith(f"b.json:1: not valid JSON at column {column}: Expecting value;")
    path = write(tmp_path, "c.json", ("[" + ",\n".join(rows)).encode() + b',\n{"a": "\xff"}]')
    assert message(path).startswith("c.json:31: not UTF-8: byte 0xff at offset ")
    offset = int(message(path).split("offset ")[1].split(";")[0])
    assert path.read_bytes()[offset] == 0xFF


def test_a_lone_object_with_the_fields_of_a_row_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert fields(write(tmp_path, "one.json", json.dumps(row))) == [row]


def test_an_object_with_two_lists_of_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "two.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}')
    assert message(path) == "two.json: an object with several lists of rows: train, test"


def test_csv_cells_have_no_length_limit(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert fields(write(tmp_path, "a.csv", f"a,b\n{long},y\n")) == [{"a": long, "b": "y"}]


def test_separators_inside_quoted_column_names_do_not_count(tmp_path: Path) -> None:
    assert fields(write(tmp_path, "a.csv", '"a, b, c";d\nx,y;z\n')) == [{"a, b, c": "x,y", "d": "z"}]


def test_one_column_is_not_split_at_commas_of_a_tsv(tmp_path: Path) -> None:
    assert fields(write(tmp_path, "a.tsv", "text\na, b; c\n")) == [{"text": "a, b; c"}]


def test_the_unnamed_index_column_of_pandas_is_left_out(tmp_path: Path) -> None:
    assert fields(write(tmp_path, "a.csv", ",a,b\n0,x,y\n,,\n")) == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        # Where double quotes are in use, single ones are text.
        ("a,b\n'x','y'\n\"1, 2\",z\n", [{"a": "'x'", "b": "'y'"}, {"a": "1, 2", "b": "z"}]),
        ("\"a\",b\n'x','y'\n", [{"a": "'x'", "b": "'y'"}]),
        ("a,b\n'tis so,it isn't\ndogs',x\n", [{"a": "'tis so", "b": "it isn't"}, {"a": "dogs'", "b": "x"}]),
        # Inside quotes all of this is text.
        ('a,b\n"x, ""y"", z"," ""y"" "\n', [{"a": 'x, "y", z', "b": ' "y" '}]),
        ('a,b\n"x\n ""y""",z\n', [{"a": 'x\n "y"', "b": "z"}]),
        ('a,b\nan "x" , y\n', [{"a": 'an "x" ', "b": " y"}]),
    ],
)
def test_quotes_that_belong_to_a_text(tmp_path: Path, content: str, rows: list[dict[str, Any]]) -> None:
    assert fields(write(tmp_path, "a.csv", content)) == rows


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b\n1,2\n,\n\n3,4\n,\n", [(3, table_rows.EMPTY_ROW), (6, table_rows.EMPTY_ROW)]),
        ("a,b\n1,2\n3,4", [(3, table_rows.NO_LAST_BREAK)]),
        ('a,b\n1,2\n3,"4"', []),
        ("a,b\n1,2\n3,4\n", []),
    ],
)
def test_what_is_no_fault_is_told(tmp_path: Path, content: str, told: list[tuple[int, str]]) -> None:
    path = write(tmp_path, "a.csv", content)
    remarks: list[Remark] = []
    rows = list(read_rows(path, on_remark=remarks.append))
    assert [row.fields for row in rows] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert remarks == [Remark(f"{path}:{line}", what) for line, what in told]


# --- folders and paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "中', ":2: the last line is cut short: not valid JSON at column 12"),
        ("a.csv", "prompt,response\na,b\nc,中", ":3: the last line is cut short: it ends inside a character"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": "中', ":2: the file ends inside the array, at row 2: not valid JSON"),
    ],
)
def test_a_file_may_end_inside_a_character(tmp_path: Path, name: str, content: str, told: str, cut: int) -> None:
    """Where it is in UTF-8 all the same, and the row before is whole."""
    path = write(tmp_path, name, content.encode()[:-cut])
    assert message(path).startswith(name + told)
    if name != "a.json":
        assert len(list(read_rows(path, lambda error: None))) == 1


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_in_the_middle_is_no_row(tmp_path: Path, mark: str) -> None:
    """Of files that were put together."""
    path = write(tmp_path, "a.csv", f"{mark}prompt,response\na,b\n{mark}prompt,response\nc,d\n")
    assert message(path) == "a.csv:3: the header stands here again"
    assert [row.fields["prompt"] for row in read_rows(path, lambda error: None)] == ["a", "c"]


def test_a_parquet_column_stands_once(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in "abc"]
    parquet.write_table(
        pyarrow.Table.from_arrays(columns, names=["prompt", "response", "response"]), tmp_path / "a.parquet"
    )
    assert message(tmp_path / "a.parquet").endswith('the header names the column "response" twice')


def test_a_folder_gives_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path, "b.json", '[{"a": 2}]')
    write(tmp_path, "a.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    write(tmp_path, "c.csv", "a\n3\n")
    write(tmp_path, ".hidden.jsonl", "broken")
    write(tmp_path, "README.md", "words")
    (tmp_path / "nested.jsonl").mkdir()
    assert fields(tmp_path) == [{"a": 1}, {"a": 2}, {"a": "3"}]
    assert next(read_rows(tmp_path)).where == f"{tmp_path / 'a.jsonl.gz'}:1"


def test_folders_in_a_folder_are_read_too(tmp_path: Path) -> None:
    for place, number in (("b/x.jsonl", 2), ("b/in/x.jsonl", 1), ("a.jsonl", 0), ("c.jsonl", 3), (".git/x.jsonl", 9)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, place, f'{{"a": {number}}}\n')
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    assert fields(tmp_path) == [{"a": 0}, {"a": 1}, {"a": 2}, {"a": 3}]
    assert [row.where for row in read_rows(tmp_path)][1] == f"{tmp_path}/b/in/x.jsonl:1"
    before = content_of(tmp_path)
    (tmp_path / "b" / "x.jsonl").rename(tmp_path / "b" / "y.jsonl")
    assert content_of(tmp_path) != before


def test_a_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file in this folder or below; it holds nothing"):
        read_rows(tmp_path)
    write(tmp_path, "README.md", "words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"it holds README\.md, empty"):
        read_rows(tmp_path)


@pytest.mark.parametrize("split", ["", "train"])
def test_a_folder_of_save_to_disk_is_named(tmp_path: Path, split: str) -> None:
    (tmp_path / split).mkdir(exist_ok=True)
    write(tmp_path, "dataset_dict.json", "{}")
    write(tmp_path / split, "data-00000-of-00001.arrow", b"x")
    write(tmp_path / split, "state.json", "{}")
    with pytest.raises(DataError, match=r"as Dataset\.save_to_disk writes it\n.*load_from_disk"):
        read_rows(tmp_path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "train_zh.jsonl", "")
    write(tmp_path, "other.csv", "")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "train-zh.json")
    assert caught.value.message == f"{tmp_path}/train-zh.json: no such file or folder"
    assert caught.value.hint == f"near it in {tmp_path}: train_zh.jsonl"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its folder .*/gone does not exist either"):
        read_rows(tmp_path / "gone" / "a.jsonl")


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\ufeff \n\n", "a.jsonl: the file is empty"),
        # mtime=0: the names of tests hold these bytes, and the processes that share them have to agree on them.
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz: the file is empty"),
        ("a.json", "[ ]", "a.json: the file holds no rows"),
        ("a.csv", "a,b\n", "a.csv: the file holds no rows"),
        ("a.txt", "hello\n", "a.txt: unknown format; the file begins with 'hello'"),
        ("a.xlsx", b"PK\x03\x04rest", "a.xlsx: a zip archive or an Excel workbook"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "a.jsonl: a Git LFS pointer, not the data"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "xy',
            "a.jsonl:2: the last line is cut short: "
            "not valid JSON at column 7: Unterminated string starting at; the parser saw '\"xy'",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": tr',
            "a.jsonl:2: the last line is cut short: not valid JSON at column 7: Expecting value; the parser saw 'tr'",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "b"\n',
            "a.jsonl:2: the last line is cut short: "
            "not valid JSON at column 10: Expecting ',' delimiter; the text ends there",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a" 1}\n{"a": 1}\n',
            "a.jsonl:2: not valid JSON at column 6: Expecting ':' delimiter; the parser saw '1}'",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a":\n2}\n',
            "a.jsonl:2: the object does not end on this line; JSON lines hold one whole object on each line",
        ),
        (
            "a.jsonl",
            '{\n  "a": 1\n}\n{\n  "a": 2\n}\n',
            "a.jsonl:1: an object spans several lines (to line 3); JSON lines hold one whole object on each line",
        ),
        (
            "a.json",
            '{"data": [\n{"a": 1},\n{"a": ',
            "a.json:3: the file ends inside an object: "
            "not valid JSON at column 7: Expecting value; the text ends there",
        ),
        (
            "a.json",
            '[{"a": 1},\n{"a": "x',
            "a.json:2: the file ends inside the array, at row 2: "
            "not valid JSON at column 7: Unterminated string starting at; the parser saw '\"x'",
        ),
        (
            "a.json",
            '[{"a": 1}\n{"a": 2}]',
            "a.json:2: not valid JSON at column 1: Expecting ',' or ']'; the parser saw '{\"a\": 2}]'",
        ),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "a.json:2: more text after the end of the array: '[{\"a\": 2}]'"),
        ("a.json", '[{"a": 1}, 5]', "a.json:1 (row 2): the row is a number, not an object"),
        ("a.json", '{"data": [{"a": 1}, null]}', "a.json:1 (row 2): the row is null, not an object"),
        ("a.jsonl", '{"a": 1}\n["b"]\n', "a.jsonl:2: the row is a list, not an object"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}\n', 'a.jsonl:1: field "a" stands twice in one object'),
        ("a.json", '[{"m": {"b": 1, "b": 1}}]', 'a.json:1 (row 1): field "b" stands twice in one object'),
        ("a.jsonl", '{"a": NaN}\n', "a.jsonl:1: NaN is not a JSON value"),
        ("a.json", '[{"a": 1}, {"a": [-Infinity]}]', "a.json:1 (row 2): -Infinity is not a JSON value"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n{}\n", "a.jsonl:1: the JSON is nested too deeply"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv:2: the row has 3 cells, the header 2 (a, b)"),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', "a.csv:3: not valid CSV: a double quote opened in this row is never closed"),
        ("a.csv", "a,b\r1,2\r3,4\r", "a.csv:1: a carriage return without a line feed, outside double quotes"),
        ("a.csv", "a,b\n1,2\r\n3,x\ry\n", "a.csv:3: a carriage return without a line feed, outside double quotes"),
        ("a.csv", "sep=;\na;b\n1;2\n", "a.csv:1: a line that tells Excel the separator, and no header"),
        *(
            ("a.csv", content, f"a.csv:{place} is in single quotes, which CSV takes as part of the text")
            for content, place in (
                ("a,b\n'1, 2',3\n", '2: column "a"'),
                ("a,b\nx,'y'\n", '2: column "b"'),
                ("a,b\nx,y\n'x, y'\n", '3: column "a"'),
                ("a;b\nx; 'y z' \n", '2: column "b"'),
                ("'a','b'\nx,y\n", "1: column 1"),
            )
        ),
        *(
            (
                name,
                content,
                f"{name}:{place} has a blank before its opening double quote, which makes the quotes part of the text",
            )
            for name, content, place in (
                ("a.csv", 'a,b\nx, "y"\n', '2: column "b"'),
                ("a.csv", 'a,b\nx, "y, z"\n', '2: column "b"'),
                ("a.csv", 'a,b\n"x, ""1""",y\n  "x",y\n', '3: column "a"'),
                ("a.csv", 'a,b\nx, "y\nz"\n', '2: column "b"'),
                ("a.tsv", 'a\tb\nx\t "y"\n', '2: column "b"'),
                ("a.csv", 'a, "b"\nx,y\n', "1: column 2"),
                ("a.csv", ',a\n0, "y"\n', '2: column "a"'),
            )
        ),
        ("a.csv", "a,b\n1,2\n3", "a.csv:3: the last line is cut short: the row has 1 cells, the header 2 (a, b)"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: the row has 1 cells, the header 2 (a, b)"),
        ("a.csv", 'a,b\n"1 \\"2\\"",3\n', "a.csv:2: not valid CSV: ',' expected after '\"'"),
        ("a.jsonl", '{"a": 1}, \n{"a": 2}\n', "a.jsonl:1: not valid JSON at column 9: Extra data; the parser saw ','"),
        (
            "a.jsonl",
            '{"a": 1}\r{"a": 2}\r',
            "a.jsonl:1: not valid JSON at column 10: Extra data; the parser saw '{\"a\": 2}'",
        ),
        ("a.csv", "a,b,a\n1,2,3\n", 'a.csv:1: the header names the column "a" twice'),
        ("a.csv", "a,,b\n1,2,3\n", "a.csv:1: column 2 of the header has no name"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet: damaged Parquet file: Parquet magic bytes not found in"),
        ("a.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0)[:-12], "a.jsonl.gz: the gzip data ends too early"),
    ],
)
def test_faults_say_where_and_what(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    found = message(write(tmp_path, name, content))
    assert found.startswith(expected) if name == "a.parquet" else found == expected


def test_a_text_as_header_is_no_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f"{'word ' * 30},y\n1,2\n")
    assert message(path).startswith("a.csv:1: the first row is no header: a column would be called 'word word")


def test_objects_over_several_lines_come_with_the_command_that_mends_them(tmp_path: Path) -> None:
    path = write(tmp_path, "my rows.jsonl", '{\n"a": 1\n}\n')
    assert refusal(path).hint == f"rewrite it: jq -c . '{path}' > '{tmp_path}/lines-my rows.jsonl'"


# --- bad rows that can be left out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n3\n{"a": NaN}\n{"a": 1, "a": 1}\n{"a": 2}\n{"a"'),
        ("a.json", '[{"a": 1}, 2, 3, {"a": NaN}, {"a": 1, "a": 1}, {"a": 2}, null]'),
        ("a.csv", "a,b\n1,x\n1\n1\n1\n1,2,3\n2,x\n1\n"),
    ],
)
def test_bad_rows_go_to_the_callback_and_reading_goes_on(tmp_path: Path, name: str, content: str) -> None:
    bad: list[DataError] = []
    rows = list(read_rows(write(tmp_path, name, content), bad.append))
    assert [int(row.fields["a"]) for row in rows] == [1, 2]
    assert len(bad) == 5
    assert all(str(tmp_path / name) in error.message for error in bad)


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "content", "place", "guess"),
    [
        ("gb18030", '{"a": "x"}\n{"a": "中文，你好"}\n', "a.jsonl:2: not UTF-8: byte 0xd6 at offset 18", "GB18030"),
        ("utf-16", '[{"a": "中文"}]', "a.jsonl:1: not UTF-8: byte 0xff at offset 0", "UTF-16"),
        ("utf-16-le", '[{"a": "中文"}]', "a.jsonl:1: not UTF-8: byte 0x00 at offset 1", "UTF-16LE"),
        ("utf-16-be", '[{"a": "中文"}]', "a.jsonl:1: not UTF-8: byte 0x00 at offset 0", "UTF-16BE"),
    ],
)
def test_other_encodings_are_named_with_the_command(
    tmp_path: Path, encoding: str, content: str, place: str, guess: str
) -> None:
    path = write(tmp_path, "a.jsonl", content.encode(encoding))
    assert message(path) == f"{place}; the file decodes as {guess}"
    assert refusal(path).hint == f"convert it: iconv -f {guess} -t UTF-8 {path} > {tmp_path}/utf8-a.jsonl"


def test_the_command_for_a_packed_file_unpacks_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv.gz", gzip.compress("问题,回答\n你好,再见\n".encode("gb18030")))
    assert refusal(path).hint == f"convert it: gunzip -c {path} | iconv -f GB18030 -t UTF-8 > {tmp_path}/utf8-a.csv"


@pytest.mark.parametrize(
    "content",
    [b'{"a": "caf\xe9 au lait"}\n', '{"a": "中文你好中文你好中文"}\n'.encode() + b'{"a": "\xb4\xf3"}\n'],
    ids=["latin-1", "damaged UTF-8"],
)
def test_no_encoding_is_guessed_without_grounds(tmp_path: Path, content: bytes) -> None:
    error = refusal(write(tmp_path, "a.jsonl", content))
    assert "decodes as" not in error.message
    assert error.hint == "save the file as UTF-8; `file -i` may tell what it is now"
