"""Every line of a table becomes a row of `hw3 data rows`, or the file is refused with the line's number."""

import json
import os
from pathlib import Path

import pytest

from hw3.cli import main
from hw3.common.errors import UserError
from hw3.corpus.tables import read_table
from hw3.data.rows import read_rows


def import_file(path: Path, content: str | bytes, *columns: str, expected_status: int = 0) -> list[tuple[str, str]]:
    """Import a table with the columns q and a; return instructions and outputs."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = path.with_name("out.json")
    command = ["data", "rows", str(path), "--output", str(output), "--columns", *(columns or ("input=q", "output=a"))]
    assert main(command) == expected_status
    assert output.exists() == (expected_status == 0)
    return [(row.instruction, row.output) for row in read_rows(output)] if output.exists() else []


def test_quotes_in_a_tsv_file_are_text_and_swallow_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (
        "q\ta\n"
        '"子曰：學而時習之。\t孔子說：學了又按時溫習。"\n'
        "今日無雨。\t今天沒有下雨。\n"
        '"有朋自遠方來。\t有朋友從遠方來。"\n'
        "明日入山。\t明天進山。\n"
    )
    assert import_file(tmp_path / "f.tsv", content) == [
        ('"子曰：學而時習之。', '孔子說：學了又按時溫習。"'),
        ("今日無雨。", "今天沒有下雨。"),
        ('"有朋自遠方來。', '有朋友從遠方來。"'),
        ("明日入山。", "明天進山。"),
    ]
    stdout = capsys.readouterr().out
    assert f"{tmp_path / 'f.tsv'}: 5 lines: 1 header, 4 rows\n" in stdout and "out.json: 4 rows" in stdout


def test_fields_of_a_tsv_file_in_quotes_keep_them_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_file(tmp_path / "f.tsv", 'q\ta\n"甲""乙"\t丙\n"\t"\n') == [('"甲""乙"', "丙"), ('"', '"')]
    assert "fields in double quotes keep them, because TSV has no quoting: line 2;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        (
            "f.csv",
            "q,a\nhello, world,yes\nfoo,no\nfoo, bar,no\n",
            ["line 2: found 3 fields, expected 2: q, a", "line 4: found 3 fields, expected 2: q, a"],
        ),
        ("f.csv", "q,a\n甲,乙\n丙\n", ["line 3: found 1 fields, expected 2: q, a"]),
        ("f.csv", 'q,a\n甲,乙\n"丙,丁\n戊,己\n', ["lines 3-4: a quoted field has no closing quote"]),
        ("f.csv", 'q,a\n"丙,丁\n戊","己"\n"庚,辛"\n', ["line 4: found 1 fields, expected 2"]),
        ("f.csv", 'q,a\n"甲"乙,丙\n', ["line 2: ',' expected after '\"'"]),
        ("f.csv", "q,a\n \n", ["line 2: found 1 fields, expected 2"]),
        ("f.tsv", "q\ta\n甲\t乙\t\n丙\n", ["line 2: found 3 fields, expected 2", "line 3: found 1 fields, expected 2"]),
        ("f.tsv", 'q\ta\n"甲\n乙"\t丙\n', ["line 2: found 1 fields, expected 2: q, a, separated by tabs"]),
        ("f.csv", "q,a,a\n甲,乙,丙\n", ["several columns are named a; names must differ"]),
        ("f.csv", "", ["is empty; expected a line with the names of the columns"]),
        ("f.csv", "\n\n", ["is empty; expected a line with the names of the columns"]),
        ("f.csv", "q,a\n", ["the dataset has no rows"]),
        ("f.csv", "q,a\n甲\0,乙\n", ["f.csv:2: found a NUL character"]),
        ("f.csv", "q,a\n甲,乙\n".encode("utf-16"), ["f.csv:1: begins with the byte-order mark of UTF-16"]),
        ("f.tsv", "q\ta\n甲\t乙\n".encode("big5"), ["f.tsv:2: invalid UTF-8: byte 0xa5; save the file as UTF-8"]),
        ("f.json", '[{"q": "甲", "q": "乙", "a": "丙"}]', ["row 1: the key q occurs more than once in an object"]),
        (
            "f.jsonl",
            '\n{"q": "甲", "a": 5}\n{"q": "\\ud800", "a": "乙"}\n',
            ["line 2: a is a int, expected text", "line 3: q contains half of a surrogate pair"],
        ),
        ("f.jsonl", '{"q": "甲", "a": "乙"}\n[1]\n', ["line 2: expected an object with the columns as keys"]),
        ("f.jsonl", '{"q": "甲", "a": "乙"}\n{"q": "甲"}\n', ["line 2: a is empty, expected text"]),
        ("f.json", "[]", ["the dataset has no rows"]),
    ],
)
def test_lines_that_are_no_rows_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes, problems: list[str]
) -> None:
    import_file(tmp_path / name, content, expected_status=2)
    found = capsys.readouterr().err.splitlines()
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert problem in line and str(tmp_path / name) in line


@pytest.mark.parametrize(
    ("content", "counts"),
    [
        ("q,a\n甲,乙\n丙,丁\n", "3 lines: 1 header, 2 rows"),
        ("q,a\r\n甲,乙\r\n丙,丁", "3 lines: 1 header, 2 rows"),
        ("q,a\r甲,乙\r丙,丁\r", "3 lines: 1 header, 2 rows"),
        ("\ufeffq,a\n\n甲,乙\n\n丙,丁\n\n", "6 lines: 1 header, 3 blank, 2 rows"),
        ('q,a\n"甲","乙"\n丙,"丁"\n', "3 lines: 1 header, 2 rows"),
    ],
)
def test_a_csv_file_gives_the_same_rows_however_its_lines_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, counts: str
) -> None:
    for name, text in ("f.csv", content), ("f.tsv", content.replace(",", "\t").replace('"', "")):
        assert import_file(tmp_path / name, text) == [("甲", "乙"), ("丙", "丁")]
        assert f"{tmp_path / name}: {counts}\n" in capsys.readouterr().out
        (tmp_path / "out.json").unlink()


def test_characters_that_python_takes_for_line_ends_stay_in_a_field(tmp_path: Path) -> None:
    text = "甲\u2028乙\x85丙\x0b丁\x1c戊"
    for name, separator in ("f.csv", ","), ("f.tsv", "\t"):
        assert import_file(tmp_path / name, f"q{separator}a\n{text}{separator}己\n") == [(text, "己")]
        (tmp_path / "out.json").unlink()


def test_line_ends_and_long_texts_in_quoted_csv_fields_are_kept_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "長" * 200_000
    assert import_file(tmp_path / "f.csv", f'q,a\n"甲\n乙","""丙"", 丁"\n{long},戊\n') == [
        ("甲\n乙", '"丙", 丁'),
        (long, "戊"),
    ]
    counts = "4 lines: 1 header, 2 rows; quoted fields contain line ends in lines 2-3\n"
    assert f"{tmp_path / 'f.csv'}: {counts}" in capsys.readouterr().out


def test_ids_may_be_numbers_and_must_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = ("input=q", "output=a", "id=n")
    rows: list[dict[str, object]] = [{"q": "甲", "a": "乙", "n": 7}, {"q": "甲", "a": "乙", "n": None}]
    import_file(tmp_path / "f.json", json.dumps(rows), *columns)
    assert read_rows(tmp_path / "out.json")[0].id == "7"
    (tmp_path / "out.json").unlink()
    rows = [{"q": "甲", "a": "乙", "n": value} for value in (7, "7", 1.5, True, {"x": 1})]
    import_file(tmp_path / "f.json", json.dumps(rows[2:]), *columns, expected_status=2)
    assert [line.partition("row ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "1: n is a float, expected text or a whole number",
        "2: n is a bool, expected text or a whole number",
        "3: n is a dict, expected text or a whole number",
    ]
    import_file(tmp_path / "f.json", json.dumps(rows[:2]), *columns, expected_status=2)
    assert "id 7 occurs 2 times; ids must differ" in capsys.readouterr().err


def test_devices_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            read_table(path)
        columns = ["--columns", "input=q", "output=a"]
        assert main(["data", "rows", str(path), "--output", str(tmp_path / "out.json"), *columns]) == 2
