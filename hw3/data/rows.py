"""Read rows of `{id, instruction, output}` and report every invalid one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hw3.common.errors import UserError, truncate_problems

DataFileKey = Literal["train", "eval", "dev"]  # keys of the data files in a recipe's `data` section


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data file. `output` is None if the file has no outputs (rows to predict)."""

    id: str
    instruction: str
    output: str | None


def read_rows(path: Path, *, require_output: bool = True) -> list[Row]:
    """Read the rows of a JSON list or a JSON Lines file.

    Args:
        path: the file, in UTF-8 without a byte-order mark.
        require_output: whether a row without `output` is an error.

    Raises:
        UserError: the file cannot be read or has no rows, or rows are invalid; the message names each of them.
    """
    records = _parse_records(path)
    if not records:
        raise UserError(f"{path}: found no rows; expected at least one")
    problems: list[str] = []
    rows: list[Row] = []
    location_by_id: dict[str, str] = {}
    for location, record in records:
        if row_problems := _find_problems(record, require_output):
            row_id = record.get("id") if isinstance(record, dict) else None
            where = f"{path}: {location}" if row_id is None else f"{path}: {location} (id {row_id})"
            problems.append(f"{where}: {'; '.join(row_problems)}")
            continue
        row = Row(record["id"], record["instruction"], record.get("output"))
        if row.id in location_by_id:
            first = location_by_id[row.id]
            problems.append(f"{path}: {location} (id {row.id}): same id as {first}; ids must be unique")
            continue
        location_by_id[row.id] = location
        rows.append(row)
    if problems:
        raise UserError(*truncate_problems(problems))
    return rows


def _find_problems(record: Any, require_output: bool) -> list[str]:
    """Return what is wrong with one parsed row; an empty list if it is valid."""
    if not isinstance(record, dict):
        return [f"found {_describe_type(record)}, expected an object with id, instruction and output"]
    problems = []
    for field, required in (("id", True), ("instruction", True), ("output", require_output)):
        if field not in record:
            if required:
                problems.append(f"{field} is missing")
            continue
        value = record[field]
        if not isinstance(value, str):
            if value is None and not required:
                continue
            problems.append(f"{field} is {_describe_type(value)}, expected text")
        elif not value.strip():
            problems.append(f"{field} is empty")
        elif any("\ud800" <= character <= "\udfff" for character in value):
            problems.append(f"{field} contains half of a surrogate pair, which is no valid text")
    return problems


def _describe_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names[type(value)]


def _parse_records(path: Path) -> list[tuple[str, Any]]:
    """Parse a JSON list or JSON Lines; return each record with its location, such as `row 3` or `line 3`."""
    text = _read_utf8(path)
    if text.lstrip()[:1] == "[":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from None
        return [(f"row {number}", record) for number, record in enumerate(records, 1)]
    numbered: list[tuple[str, Any]] = []
    problems: list[str] = []
    # Not splitlines(): it also splits at U+2028 and other characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                numbered.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(
                    f"{path}:{number}: invalid JSON: {error.msg} (expected a JSON list, or one JSON object per line)"
                )
    if problems:
        raise UserError(*truncate_problems(problems))
    return numbered


def _read_utf8(path: Path) -> str:
    """Return a file's text; raise `UserError` if it is not UTF-8 or begins with a byte-order mark."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{path}: begins with a byte-order mark; save it as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: invalid UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8"
        ) from None
