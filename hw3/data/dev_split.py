"""Take a part of the training rows as dev rows, whose scores select the best checkpoint: `data.dev_fraction`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from hw3.common.atomic_io import format_json_rows
from hw3.data.rows import Row


def split_dev_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide the rows of a training file into training and dev rows, each in their order.

    A row's text and the seed decide, not its position in the file. Rows with the same text stay together.

    Args:
        rows: the rows.
        fraction: share of the dev rows, between 0 and 1; at least one row.
        seed: other seeds choose other rows.
    """
    keys = {row.id: _key(row, seed) for row in rows}
    count = max(1, round(fraction * len(rows)))
    last = sorted(keys.values())[:count][-1] if rows else ""
    dev_rows = [row for row in rows if keys[row.id] <= last]
    return [row for row in rows if keys[row.id] > last], dev_rows


def format_dev_rows(rows: Sequence[Row]) -> str:
    """Return the content of a file of dev rows."""
    return format_json_rows({"id": row.id, "instruction": row.instruction, "output": row.output} for row in rows)


def _key(row: Row, seed: int) -> str:
    return hashlib.sha256(json.dumps([seed, row.instruction, row.output]).encode()).hexdigest()
