"""`hw3 data rows`: rows from whatever `datasets.load_dataset` reads, files or the hub."""

from __future__ import annotations

import random
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw3.common.atomic_io import write_rows
from hw3.common.errors import UserError, shorten
from hw3.data.rows import read_rows
from hw3.data.templates import draw, slots

_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
_FIELDS = ({"input", "output"}, {"classical", "modern"})
_PLACE = "{x}"


def write_own_rows(
    source: str,
    out: Path,
    *,
    columns: Sequence[str],
    template: str | None = None,
    config: str | None = None,
    split: str = "train",
    seed: int = 0,
) -> int:
    """Read a dataset and write its rows as `{id, instruction, output}`.

    Args:
        source: a file (CSV, TSV, JSON, JSON Lines, Parquet) or the name of a dataset on the hub.
        out: the file to write; never written over.
        columns: `field=column`, either `input` and `output` or `classical` and `modern`, and `id` if there is one.
        template: the instruction, with `{x}` for the input; the input itself if None. Texts in `classical` and
            `modern` are worded as the homework's, both directions and every wording drawn evenly.
        config: of a dataset on the hub.
        split: of a dataset on the hub.
        seed: of the homework's wordings.

    Returns:
        0.

    Raises:
        UserError: an argument is wrong, the dataset cannot be read, or rows are bad; nothing is written.
    """
    fields = _parse_columns(columns)
    if template is not None and ("classical" in fields or template.count(_PLACE) != 1):
        raise UserError(f"--template: goes with input= and output=, and holds {_PLACE} exactly once")
    if out.exists():
        raise UserError(f"{out}: there already and never written over; move it, or give another --out")
    table = _load(source, config, split, list(fields.values()))
    if missing := [f"{field}={column}" for field, column in fields.items() if column not in table.column_names]:
        raise UserError(f"--columns {' '.join(missing)}: no such column; {source} has {', '.join(table.column_names)}")
    records = list(zip(*(table[column] for column in fields.values()), strict=True))
    records = [dict(zip(fields, values, strict=True)) for values in records]
    if problems := [
        f"{source}: row {number}: {fields[field]} is {_found(value)}, text is needed"
        for number, record in enumerate(records, 1)
        for field, value in record.items()
        if field != "id" and not (isinstance(value, str) and value.strip())
    ]:
        raise UserError(*shorten(problems))
    if not records:
        raise UserError(f"{source}: holds no rows")
    rows = _homework_rows(records, seed) if "classical" in fields else _worded_rows(records, template)
    if problems := _repeated(rows, source):
        raise UserError(*shorten(problems))
    write_rows(out, rows)
    print(f"{out}: {len(read_rows(out)):,} rows. Next: hw3 data check {out}")
    return 0


def _parse_columns(columns: Sequence[str]) -> dict[str, str]:
    fields = dict(column.partition("=")[::2] for column in columns)
    if set(fields) - {"id"} not in _FIELDS or len(fields) != len(columns) or not all(fields.values()):
        raise UserError(
            f"--columns {' '.join(columns)}: input=COLUMN output=COLUMN or classical=COLUMN modern=COLUMN are needed, "
            "and id=COLUMN if there is one"
        )
    return fields


def _load(source: str, config: str | None, split: str, columns: list[str]) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file() and (path.suffix.lower() in _READERS or source.count("/") > 1):
        raise UserError(f"{source}: no such file")
    if path.is_file() and reader is None:
        raise UserError(f"{source}: read as a file by its ending: {', '.join(_READERS)}")
    try:
        if reader is None:
            return datasets.load_dataset(source, config, split=split)
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        # As text, so that 007 stays 007 and an empty field is found.
        options |= {"keep_default_na": False, "converters": dict.fromkeys(columns, str)} if reader == "csv" else {}
        return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{source}: cannot be read as a dataset: {str(cause).strip().partition(chr(10))[0]}") from error


def _found(value: Any) -> str:
    return "empty" if value is None or (isinstance(value, str) and not value.strip()) else f"a {type(value).__name__}"


def _worded_rows(records: Sequence[Mapping[str, Any]], template: str | None) -> list[dict[str, str]]:
    # Shells hand \n over as two characters.
    before, after = (template or _PLACE).replace("\\n", "\n").split(_PLACE)
    return [
        _row(record, number, before + record["input"] + after, record["output"])
        for number, record in enumerate(records)
    ]


def _homework_rows(records: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, str]]:
    rows = []
    wordings = draw(len(records), slots("m2c") + slots("c2m"), random.Random(seed))
    for number, (record, wording) in enumerate(zip(records, wordings, strict=True)):
        sides = (record["modern"], record["classical"])
        text, output = sides if wording.direction == "m2c" else sides[::-1]
        rows.append(_row(record, number, wording.render(text), wording.answer_prefix + output))
    return rows


def _row(record: Mapping[str, Any], number: int, instruction: str, output: str) -> dict[str, str]:
    name = record.get("id")
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"hw3:{number}:{instruction}")) if name in (None, "") else str(name)
    return {"id": own, "instruction": instruction, "output": output}


def _repeated(rows: Sequence[dict[str, str]], source: str) -> list[str]:
    counts = Counter(row["id"] for row in rows)
    return [f"{source}: id {name} stands {count} times; ids must differ" for name, count in counts.items() if count > 1]
