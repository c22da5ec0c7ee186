"""Read `{id, instruction, output}` rows and list every bad one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import UserError, shorten


@dataclass(frozen=True, slots=True)
class Row:
    """One training or scoring example. `output` is None where a file has none (rows to predict)."""

    id: str
    instruction: str
    output: str | None


def read_rows(path: Path, *, need_output: bool = True) -> list[Row]:
    """Read a JSON list or JSON Lines file of rows.

    Args:
        path: the file; UTF-8 without a byte-order mark.
        need_output: whether a row without `output` is an error.

    Raises:
        UserError: the file cannot be read, or rows are bad; every bad row is named by number and id.
    """
    numbered = _parse(path)
    if not numbered:
        raise UserError(f"{path}: holds no rows")
    problems: list[str] = []
    rows: list[Row] = []
    first_seen: dict[str, str] = {}
    for place, record in numbered:
        found = _problems(record, need_output)
        if found:
            name = record.get("id") if isinstance(record, dict) else None
            problems.append(f"{path}: {place}{f' (id {name})' if name is not None else ''}: {'; '.join(found)}")
            continue
        row = Row(record["id"], record["instruction"], record.get("output"))
        if row.id in first_seen:
            problems.append(f"{path}: {place} (id {row.id}): the same id as {first_seen[row.id]}; ids must differ")
            continue
        first_seen[row.id] = place
        rows.append(row)
    if problems:
        raise UserError(*shorten(problems))
    return rows


def _problems(record: Any, need_output: bool) -> list[str]:
    if not isinstance(record, dict):
        return [f"is {_kind(record)}, an object with id, instruction and output is needed"]
    found = []
    for field, needed in (("id", True), ("instruction", True), ("output", need_output)):
        if field not in record:
            if needed:
                found.append(f"{field} is missing")
            continue
        value = record[field]
        if not isinstance(value, str):
            if value is None and not needed:
                continue
            found.append(f"{field} is {_kind(value)}, text is needed")
        elif not value.strip():
            found.append(f"{field} is empty")
        elif any("\ud800" <= character <= "\udfff" for character in value):
            found.append(f"{field} holds half a surrogate pair, broken text")
    return found


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names[type(value)]


def _parse(path: Path) -> list[tuple[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{path}: begins with a byte-order mark; save it as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: broken UTF-8: byte 0x{data[error.start]:02x}; save it as UTF-8") from None
    if text.lstrip()[:1] == "[":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        return [(f"row {number}", record) for number, record in enumerate(records, 1)]
    numbered: list[tuple[str, Any]] = []
    problems: list[str] = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                numbered.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(
                    f"{path}:{number}: not JSON: {error.msg} (a JSON list or one JSON object a line is needed)"
                )
    if problems:
        raise UserError(*shorten(problems))
    return numbered
