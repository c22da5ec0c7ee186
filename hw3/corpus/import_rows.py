"""`hw3 data rows`: import rows from a table in a file, or from a dataset on the Hub."""

from __future__ import annotations

import os
import random
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw3.common.atomic_io import write_json_rows
from hw3.common.errors import UserError, first_line, truncate_problems
from hw3.common.progress import can_show_live_progress
from hw3.common.shell_commands import hw3_command
from hw3.common.text import has_surrogates
from hw3.common.text_files import check_regular_file
from hw3.corpus.tables import TABLE_SUFFIXES, Table, read_table
from hw3.data.rows import read_rows
from hw3.data.templates import list_templates, sample_templates
from hw3.runs.output_file import check_output_file

if TYPE_CHECKING:
    from datasets import Dataset

_FILE_SUFFIXES = (*TABLE_SUFFIXES, ".parquet")
_FIELD_SETS = ({"input", "output"}, {"classical", "modern"})
_PLACEHOLDER = "{x}"


def import_rows(
    source: str,
    output: Path,
    *,
    columns: Sequence[str],
    template: str | None = None,
    config: str | None = None,
    split: str = "train",
    seed: int = 0,
) -> int:
    """Read a dataset and write it as rows `{id, instruction, output}`.

    Args:
        source: a file (CSV, TSV, JSON, JSON Lines, Parquet) or the name of a dataset on the Hub.
        output: the file to write; an existing file is never overwritten.
        columns: `field=column`, with the fields `input` and `output`, or `classical` and `modern`, and optionally `id`.
        template: the instruction, with `{x}` for the input; None uses the input itself. `classical` and `modern` texts
            get the homework's templates instead, with both directions and all templates drawn evenly.
        config: configuration of a dataset on the Hub.
        split: split of a dataset on the Hub.
        seed: of the draw of the homework's templates.

    Returns:
        0.

    Raises:
        UserError: an argument is wrong, the dataset cannot be read, or rows are bad. Nothing is written.
    """
    fields = _parse_columns(columns)
    if template is not None and ("classical" in fields or template.count(_PLACEHOLDER) != 1):
        raise UserError(
            f"--template: needs the columns input= and output=, and must contain {_PLACEHOLDER} exactly once"
        )
    if os.path.lexists(output):
        raise UserError(f"{output}: exists already and is never overwritten; move it or give another --output")
    check_output_file(output, "--output")
    records = _read_records(source, config, split, fields)
    rows = _make_homework_rows(records, seed) if "classical" in fields else _make_template_rows(records, template)
    if problems := _find_repeated_ids(rows, source):
        raise UserError(*truncate_problems(problems))
    write_json_rows(output, rows)
    print(f"{output}: {len(read_rows(output)):,} rows. Next: {hw3_command('data', 'check', output)}")
    return 0


def _parse_columns(columns: Sequence[str]) -> dict[str, str]:
    fields = dict(column.partition("=")[::2] for column in columns)
    if set(fields) - {"id"} not in _FIELD_SETS or len(fields) != len(columns) or not all(fields.values()):
        raise UserError(
            f"--columns {' '.join(columns)}: expected input=COLUMN output=COLUMN or classical=COLUMN modern=COLUMN, "
            "and id=COLUMN if the dataset has ids"
        )
    return fields


def _read_records(source: str, config: str | None, split: str, fields: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the dataset's rows as field to value; all fields but `id` are non-empty text. Print the number of rows."""
    table = _read_source(source, config, split, fields.values())
    if not table.rows:
        raise UserError(f"{source}: the dataset has no rows")
    if missing := [f"{field}={column}" for field, column in fields.items() if column not in table.columns]:
        raise UserError(f"--columns {' '.join(missing)}: no such column; {source} has {', '.join(table.columns)}")
    if repeated := {column for column in fields.values() if table.columns.count(column) > 1}:
        raise UserError(f"{source}: several columns are named {', '.join(sorted(repeated))}; names must differ")
    records, problems = [], []
    for location, row in table.rows:
        record = {field: row.get(column) for field, column in fields.items()}
        wrong = [
            f"{fields[field]} {problem}" for field, value in record.items() if (problem := _find_problem(field, value))
        ]
        if wrong:
            problems.append(f"{source}: {location}: {'; '.join(wrong)}")
        records.append(record)
    if problems:
        raise UserError(*truncate_problems(problems))
    print(f"{source}: {table.counts}")
    return records


def _find_problem(field: str, value: Any) -> str | None:
    """Return what is wrong with the value of a field, or None. A row without an id gets one."""
    if field == "id" and (value in (None, "") or (isinstance(value, int) and not isinstance(value, bool))):
        return None
    if isinstance(value, str) and has_surrogates(value):
        return "contains half of a surrogate pair, which is no valid text"
    if isinstance(value, str) and value.strip():
        return None
    return f"is {_describe(value)}, expected text{' or a whole number' if field == 'id' else ''}"


def _read_source(source: str, config: str | None, split: str, columns: Collection[str]) -> Table:
    """Return the dataset's rows; those of a Parquet file or a Hub dataset have only the given columns."""
    path = Path(source)
    suffix = path.suffix.lower()
    is_dataset = path.is_dir() or (not path.exists() and suffix not in _FILE_SUFFIXES and source.count("/") <= 1)
    if not is_dataset:
        check_regular_file(path)
        if suffix not in _FILE_SUFFIXES:
            raise UserError(f"{source}: found the file suffix {suffix!r}, expected one of {', '.join(_FILE_SUFFIXES)}")
    if suffix in TABLE_SUFFIXES:
        return read_table(path)
    dataset = _load_dataset(source, config, split, None if is_dataset else path)
    needed = dataset.select_columns([name for name in dataset.column_names if name in columns])
    rows = [(f"row {number}", row) for number, row in enumerate(needed, 1)]
    return Table(dataset.column_names, rows, f"{len(rows):,} rows")


def _load_dataset(source: str, config: str | None, split: str, parquet_file: Path | None) -> Dataset:
    import datasets

    if not can_show_live_progress():
        datasets.disable_progress_bars()
    try:
        if parquet_file is not None:
            return datasets.load_dataset("parquet", data_files=str(parquet_file), split="train")
        return datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # IndexError: an empty name
        raise UserError(f"{source}: cannot be read as a dataset: {first_line(error.__cause__ or error)}") from error


def _describe(value: Any) -> str:
    return "empty" if value is None or (isinstance(value, str) and not value.strip()) else f"a {type(value).__name__}"


def _make_template_rows(records: Sequence[Mapping[str, Any]], template: str | None) -> list[dict[str, str]]:
    # Shells pass \n as two characters.
    before, after = (template or _PLACEHOLDER).replace("\\n", "\n").split(_PLACEHOLDER)
    return [
        _make_row(record, number, before + record["input"] + after, record["output"])
        for number, record in enumerate(records)
    ]


def _make_homework_rows(records: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, str]]:
    rows = []
    prefixes: Counter[str] = Counter()
    slots = list_templates("m2c") + list_templates("c2m")
    templates = sample_templates(len(records), slots, random.Random(seed))
    for number, (record, template) in enumerate(zip(records, templates, strict=True)):
        sides = (record["modern"], record["classical"])
        text, output = sides if template.direction == "m2c" else sides[::-1]
        rows.append(_make_row(record, number, template.render(text), template.output_prefix + output))
        prefixes[template.output_prefix] += 1
    for prefix in filter(None, prefixes):
        texts = [template.text.replace("\n", "\\n") for template in set(slots) if template.output_prefix == prefix]
        print(
            f"{prefixes[prefix]:,} outputs begin with {prefix}, as in the homework's rows with the template "
            f"{', '.join(texts)}; for other instructions and no added text, use input= and output= with --template"
        )
    return rows


def _make_row(record: Mapping[str, Any], number: int, instruction: str, output: str) -> dict[str, str]:
    given_id = record.get("id")
    if given_id in (None, ""):
        given_id = uuid.uuid5(uuid.NAMESPACE_URL, f"hw3:{number}:{instruction}")
    return {"id": str(given_id), "instruction": instruction, "output": output}


def _find_repeated_ids(rows: Sequence[dict[str, str]], source: str) -> list[str]:
    counts = Counter(row["id"] for row in rows)
    return [f"{source}: id {id} occurs {count} times; ids must differ" for id, count in counts.items() if count > 1]
