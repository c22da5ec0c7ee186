"""Read rows of `{id, instruction, output}` and report every invalid one."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hw3.common.errors import UserError, truncate_problems
from hw3.common.text import has_surrogates
from hw3.common.text_files import read_utf8

_MAX_ID_SHOWN = 100  # characters of a wrong id in a message

DataFileKey = Literal["train", "eval", "dev"]  # keys of the data files in a recipe's `data` section


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data file.

    Attributes:
        id: unique in its file.
        instruction: what the model reads.
        output: what it should write; None if the file has no outputs (rows to predict).
        number: its number in the file, from 1, for messages; 0 for a row that is from no file.
    """

    id: str
    instruction: str
    output: str | None
    number: int = dataclasses.field(default=0, compare=False)


def read_rows(path: Path, *, require_output: bool = True) -> list[Row]:
    """Read the rows of a JSON list or a JSON Lines file.

    Args:
        path: the file, in UTF-8.
        require_output: whether a row without `output` is an error.

    Raises:
        UserError: the file cannot be read or has no rows, or rows are invalid; the message names each of them.
    """
    records = parse_records(path, read_utf8(path))
    if not records:
        raise UserError(f"{path}: found no rows; expected at least one")
    problems: list[str] = []
    rows: list[Row] = []
    location_by_id: dict[str, str] = {}
    for number, (location, record) in enumerate(records, 1):
        if row_problems := _find_problems(record, require_output):
            row_id = record.get("id") if isinstance(record, dict) else None
            where = (
                f"{path}: {location}" if row_id is None else f"{path}: {location} (id {str(row_id)[:_MAX_ID_SHOWN]})"
            )
            problems.append(f"{where}: {'; '.join(row_problems)}")
            continue
        row = Row(record["id"], record["instruction"], record.get("output"), number)
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
    problems = [f"the key {key} occurs more than once in an object" for key in find_repeated_keys(record)]
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
        elif has_surrogates(value):
            problems.append(f"{field} contains half of a surrogate pair, which is no valid text")
    return problems


def _describe_type(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    names = {list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]


class _ObjectWithRepeatedKeys(dict[str, Any]):
    """A JSON object in which keys occur more than once. Python would take the last value of each without a word."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated_keys = [key for key, count in counts.items() if count > 1]


def find_repeated_keys(record: Any) -> list[str]:
    """Return the keys that occur more than once in an object of a parsed record."""
    found: list[str] = []
    values = [record]
    while values:
        value = values.pop()
        if isinstance(value, _ObjectWithRepeatedKeys):
            found += value.repeated_keys
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return found


def parse_records(path: Path, text: str) -> list[tuple[str, Any]]:
    """Parse a JSON list or JSON Lines; return each record with its location, such as `row 3` or `line 3`.

    Args:
        path: the file, for messages.
        text: its content.

    Raises:
        UserError: the text is neither; every invalid line is named.
    """
    if text.lstrip()[:1] == "[":
        try:
            records = _decode(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from None
        except RecursionError:
            raise UserError(f"{path}: invalid JSON: nested too deeply") from None
        return [(f"row {number}", record) for number, record in enumerate(records, 1)]
    numbered: list[tuple[str, Any]] = []
    problems: list[str] = []
    # Not splitlines(): it also splits at U+2028 and other characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                numbered.append((f"line {number}", _decode(line)))
            except json.JSONDecodeError as error:
                problems.append(
                    f"{path}:{number}: invalid JSON: {error.msg} (expected a JSON list, or one JSON object per line)"
                )
            except RecursionError:
                problems.append(f"{path}:{number}: invalid JSON: nested too deeply")
    if problems:
        raise UserError(*truncate_problems(problems))
    return numbered


def _decode(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_make_object, parse_int=_parse_integer)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else _ObjectWithRepeatedKeys(pairs)


def _parse_integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python converts at most 4,300 digits to an integer
        return float(digits)
