"""Data files: JSON lists, JSON Lines, and the message for every kind of invalid row."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.errors import UserError
from hw3.data.rows import Row, read_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
GOOD = {"id": "a", "instruction": "甲", "output": "乙"}


def read_problems(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_rows(path)
    return [problem.replace(str(path), "F") for problem in error.value.problems]


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), lines=st.booleans(), escaped=st.booleans())
def test_read_rows_reads_json_lists_and_json_lines(
    tmp_path_factory, rows: list[tuple[str, str]], lines: bool, escaped: bool
) -> None:
    expected = [Row(str(number), instruction, output) for number, (instruction, output) in enumerate(rows)]
    records = [{"id": row.id, "instruction": row.instruction, "output": row.output} for row in expected]
    path = tmp_path_factory.getbasetemp() / "rows.json"
    if lines:
        text = "\n".join(json.dumps(record, ensure_ascii=escaped) for record in records) + "\n"
    else:
        text = json.dumps(records, ensure_ascii=escaped)
    path.write_text(text, encoding="utf-8")
    assert read_rows(path) == expected


def test_read_rows_reports_every_invalid_row(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"id": "b", "instruction": "甲"},
        {"id": "c", "instruction": 5, "output": ""},
        {"id": "a", "instruction": "甲", "output": "乙"},
        "text",
        {"id": 7, "instruction": None, "output": " \n"},
    ]
    assert read_problems(tmp_path / "rows.json", json.dumps(rows)) == [
        "F: row 2 (id b): output is missing",
        "F: row 3 (id c): instruction is a number, expected text; output is empty",
        "F: row 4 (id a): same id as row 1; ids must be unique",
        "F: row 5: found text, expected an object with id, instruction and output",
        "F: row 6 (id 7): id is a number, expected text; instruction is null, expected text; output is empty",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbf[]", "F: found no rows; expected at least one"),
        (b'\xef\xbb\xbf[{"id":\n"\xff"}]', "F:2: invalid UTF-8: byte 0xff; save the file as UTF-8"),
        (
            "[]".encode("utf-16"),
            "F:1: begins with the byte-order mark of UTF-16 or UTF-32; save the file as UTF-8",
        ),
        ("[\n]".encode("utf-16-le"), "F:1: found a NUL character, expected text; save the file as UTF-8"),
        ('[{"id": "雨"}]'.encode("big5"), "F:1: invalid UTF-8: byte 0xab; save the file as UTF-8"),
        ('[\n{"id": "雨"}]'.encode("gb18030"), "F:2: invalid UTF-8: byte 0xd3; save the file as UTF-8"),
        (
            '[{"id": "a", "instruction": "甲", "output": "乙", "output": "丙"}]',
            "F: row 1 (id a): the key output occurs more than once in an object",
        ),
        (
            '\n{"id": "a", "instruction": "甲", "output": "乙", "more": [{"x": 1, "x": 2}]}',
            "F: line 2 (id a): the key x occurs more than once in an object",
        ),
        (
            f'[{{"id": {"9" * 5000}, "instruction": NaN, "output": "乙"}}]',
            "F: row 1 (id inf): id is a number, expected text; instruction is a number, expected text",
        ),
        ("[" * 100_000, "F: invalid JSON: nested too deeply"),
        ('{"id": ' * 100_000, "F:1: invalid JSON: nested too deeply"),
        ("[]\n[]", "F:2: invalid JSON: Extra data"),
        (
            json.dumps(GOOD) + "\r" + json.dumps(GOOD | {"id": "b"}),
            "F:1: invalid JSON: Extra data (expected a JSON list, or one JSON object per line)",
        ),
        (b'[{"id":\n"\xff"}]', "F:2: invalid UTF-8: byte 0xff; save the file as UTF-8"),
        ("[{]", "F:1: invalid JSON: Expecting property name enclosed in double quotes"),
        ("[]", "F: found no rows; expected at least one"),
        ("", "F: found no rows; expected at least one"),
        (
            '{"id": "a"\n',
            "F:1: invalid JSON: Expecting ',' delimiter (expected a JSON list, or one JSON object per line)",
        ),
        (
            json.dumps([GOOD | {"output": "\ud800"}]),
            "F: row 1 (id a): output contains half of a surrogate pair, which is no valid text",
        ),
    ],
)
def test_read_rows_reports_unreadable_files(tmp_path: Path, content: str | bytes, problem: str) -> None:
    assert read_problems(tmp_path / "rows.json", content) == [problem]


def test_read_rows_accepts_a_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(GOOD | {"id": id}) for id in "ab").encode())
    assert [row.id for row in read_rows(path)] == ["a", "b"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert [row.id for row in read_rows(path)] == ["a"]


def test_read_rows_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.json", tmp_path / "link.json", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file; save the content of a device or pipe to a file first"):
            read_rows(path)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)


def test_read_rows_refuses_a_file_that_is_too_large_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "rows.json").open("wb") as file:
        file.truncate(2**41)
    with pytest.raises(UserError, match=r"rows\.json: has 2048\.00 GiB; at most 2\.00 GiB are read; split it"):
        read_rows(tmp_path / "rows.json")


def test_read_rows_shows_only_the_beginning_of_a_long_wrong_id(tmp_path: Path) -> None:
    (problem,) = read_problems(tmp_path / "rows.json", json.dumps([{"id": "x" * 10_000, "instruction": "甲"}]))
    assert problem == f"F: row 1 (id {'x' * 100}): output is missing"


def test_read_rows_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none.json")


def test_read_rows_lists_20_problems_and_counts_the_others(tmp_path: Path) -> None:
    found = read_problems(tmp_path / "rows.json", json.dumps([{"id": str(number)} for number in range(25)]))
    assert len(found) == 21 and found[-1] == "... and 5 more"


def test_read_rows_accepts_rows_to_predict_without_output(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "a", "instruction": "甲"}]), encoding="utf-8")
    assert read_rows(path, require_output=False) == [Row("a", "甲", None)]


def test_read_rows_keeps_a_line_separator_inside_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "instruction": "甲\u2028", "output": "乙"}\n', encoding="utf-8")
    assert read_rows(path) == [Row("a", "甲\u2028", "乙")]
