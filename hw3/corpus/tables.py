"""Read tables from CSV, TSV, JSON and JSON Lines files so that every line becomes a row or is accounted for.

General CSV readers guess: a row with too many fields shifts its columns, and a quote at the beginning of a TSV field
swallows the following lines. Here such a file is refused with the number of the line.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import UserError, truncate_problems
from hw3.common.text_files import MAX_TEXT_FILE_BYTES, read_utf8
from hw3.data.rows import find_repeated_keys, parse_records

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
_MAX_LINES_SHOWN = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        columns: names of all columns. In a CSV or TSV file, a name may occur twice.
        rows: (location, column to value), for example `("line 3", {"old": "甲"})`.
        counts: how the file's lines became rows, for the user.
    """

    columns: list[str]
    rows: list[tuple[str, dict[str, Any]]]
    counts: str


def read_table(path: Path) -> Table:
    """Read a file with one of `TABLE_SUFFIXES`.

    Raises:
        UserError: the file cannot be read, or a row does not have the columns of the header. All such rows are named.
    """
    text = read_utf8(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        return _read_json(path, text)
    lines = list(_split_tsv(text) if path.suffix.lower() == ".tsv" else _split_csv(path, text))
    filled = [(location, fields) for location, fields in lines if fields]
    if not filled:
        raise UserError(f"{path}: is empty; expected a line with the names of the columns, and rows")
    (_, columns), *rows = filled
    problems = [
        f"{path}: {location}: found {len(fields)} fields, expected {len(columns)}: {', '.join(columns)}"
        f"{_explain_field_count(path)}"
        for location, fields in rows
        if len(fields) != len(columns)
    ]
    if problems:
        raise UserError(*truncate_problems(problems))
    blank, several = len(lines) - len(filled), [location for location, _ in lines if location.startswith("lines")]
    counts = f"{_count_lines(text):,} lines: 1 header{_describe_skipped(blank)}, {len(rows):,} rows"
    if several:
        counts += f"; quoted fields contain line ends in {_join_some(several)}"
    if path.suffix.lower() == ".tsv":
        _warn_about_quotes(path, rows)
    return Table(columns, [(location, dict(zip(columns, fields, strict=True))) for location, fields in rows], counts)


def _read_json(path: Path, text: str) -> Table:
    problems, rows = [], []
    for location, record in parse_records(path, text):
        if not isinstance(record, dict):
            problems.append(f"{path}: {location}: expected an object with the columns as keys")
        problems += [
            f"{path}: {location}: the key {key} occurs more than once in an object"
            for key in find_repeated_keys(record)
        ]
        rows.append((location, record))
    if problems:
        raise UserError(*truncate_problems(problems))
    counts = f"{len(rows):,} rows"
    if rows and rows[0][0].startswith("line"):
        num_lines = _count_lines(text)
        counts = f"{num_lines:,} lines{_describe_skipped(num_lines - len(rows))}: {counts}"
    return Table(list(dict.fromkeys(column for _, record in rows for column in record)), rows, counts)


def _split_tsv(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield location and fields of each line. TSV has no quoting: a quote is a character of the text."""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        line = line.removesuffix("\n")
        yield f"line {number}", line.split("\t") if line else []


def _split_csv(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield location and fields of each row. A quoted field may contain line ends, so a row may have several lines."""
    csv.field_size_limit(MAX_TEXT_FILE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = "a quoted field has no closing quote" if "end of data" in str(error) else str(error)
            raise UserError(
                f"{path}: {_describe_lines(first, reader.line_num)}: {reason}; put a field with quotes, commas or line "
                'ends in double quotes, and write a quote inside it as ""'
            ) from None
        if fields is None:
            return
        yield _describe_lines(first, reader.line_num), fields


def _explain_field_count(path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return ", separated by tabs; TSV has no quoting, so save a table with tabs or line ends in its fields as CSV"
    return ", separated by commas; put a field that contains a comma in double quotes"


def _describe_lines(first: int, last: int) -> str:
    return f"line {first}" if last <= first else f"lines {first}-{last}"


def _describe_skipped(blank: int) -> str:
    return f", {blank:,} blank" if blank else ""


def _count_lines(text: str) -> int:
    return sum(1 for _ in io.StringIO(text, newline=None))


def _join_some(locations: list[str]) -> str:
    others = len(locations) - _MAX_LINES_SHOWN
    return ", ".join(locations[:_MAX_LINES_SHOWN]) + (f" and {others} more" if others > 0 else "")


def _warn_about_quotes(path: Path, rows: list[tuple[str, list[str]]]) -> None:
    """Report fields that a CSV reader would unquote."""
    quoted = [
        location
        for location, fields in rows
        if any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
    ]
    if quoted:
        logger.warning(
            f"{path}: fields in double quotes keep them, because TSV has no quoting: {_join_some(quoted)}; if the file "
            "was written with quoting, save it as CSV"
        )
