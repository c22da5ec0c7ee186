"""`hw3 data rows`: import rows from a file or Hub dataset that `datasets.load_dataset` reads."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw3.common.atomic_io import write_json_rows
from hw3.common.errors import UserError, first_line, truncate_problems
from hw3.common.progress import can_show_live_progress
from hw3.data.rows import read_rows
from hw3.data.templates import list_templates, sample_templates

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {  # file suffix to the builder of `datasets`
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
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
    if output.exists():
        raise UserError(f"{output}: exists already and is never overwritten; move it or give another --output")
    records = _read_records(source, config, split, fields)
    rows = _make_homework_rows(records, seed) if "classical" in fields else _make_template_rows(records, template)
    if problems := _find_repeated_ids(rows, source):
        raise UserError(*truncate_problems(problems))
    write_json_rows(output, rows)
    print(f"{output}: {len(read_rows(output)):,} rows. Next: hw3 data check {output}")
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
    """Return the dataset's rows as field to value; all fields but `id` are non-empty text."""
    dataset = _load_dataset(source, config, split, list(fields.values()))
    if missing := [f"{field}={column}" for field, column in fields.items() if column not in dataset.column_names]:
        raise UserError(
            f"--columns {' '.join(missing)}: no such column; {source} has {', '.join(dataset.column_names)}"
        )
    values = zip(*(dataset[column] for column in fields.values()), strict=True)
    records = [dict(zip(fields, row, strict=True)) for row in values]
    if problems := [
        f"{source}: row {number}: {fields[field]} is {_describe(value)}, expected text"
        for number, record in enumerate(records, 1)
        for field, value in record.items()
        if field != "id" and not (isinstance(value, str) and value.strip())
    ]:
        raise UserError(*truncate_problems(problems))
    if not records:
        raise UserError(f"{source}: the dataset has no rows")
    return records


def _load_dataset(source: str, config: str | None, split: str, columns: list[str]) -> Dataset:
    import datasets

    if not can_show_live_progress():
        datasets.disable_progress_bars()
    path = Path(source)
    suffix = path.suffix.lower()
    builder = _BUILDERS.get(suffix)
    if not path.is_file() and (suffix in _BUILDERS or source.count("/") > 1):
        raise UserError(f"{source}: no such file")
    if path.is_file() and builder is None:
        raise UserError(f"{source}: found the file suffix {suffix!r}, expected one of {', '.join(_BUILDERS)}")
    try:
        if builder is None:
            return datasets.load_dataset(source, config, split=split)
        options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
        if builder == "csv":
            # Every value as text, so that 007 stays 007 and an empty field is reported.
            options |= {"keep_default_na": False, "converters": dict.fromkeys(columns, str)}
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
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
    slots = list_templates("m2c") + list_templates("c2m")
    templates = sample_templates(len(records), slots, random.Random(seed))
    for number, (record, template) in enumerate(zip(records, templates, strict=True)):
        sides = (record["modern"], record["classical"])
        text, output = sides if template.direction == "m2c" else sides[::-1]
        rows.append(_make_row(record, number, template.render(text), template.output_prefix + output))
    return rows


def _make_row(record: Mapping[str, Any], number: int, instruction: str, output: str) -> dict[str, str]:
    given_id = record.get("id")
    if given_id in (None, ""):
        given_id = uuid.uuid5(uuid.NAMESPACE_URL, f"hw3:{number}:{instruction}")
    return {"id": str(given_id), "instruction": instruction, "output": output}


def _find_repeated_ids(rows: Sequence[dict[str, str]], source: str) -> list[str]:
    counts = Counter(row["id"] for row in rows)
    return [f"{source}: id {id} occurs {count} times; ids must differ" for id, count in counts.items() if count > 1]
