"""Read the JSON files that the blocks quote, and format what several blocks share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent

# A benchmark's report, and one of its rows: each benchmark has fields of its own (docs/benchmarks/*.json).
Report = dict[str, Any]
Row = dict[str, Any]


def read_json(name: str) -> Any:
    """Read a JSON file of the repository, by its path in it."""
    return json.loads((REPOSITORY / name).read_text(encoding="utf-8"))


def read_report(name: str) -> Report:
    """Read a benchmark's report."""
    return read_json(f"docs/benchmarks/{name}.json")


def find_row(report: Report, words: str) -> Row:
    """Return the first row whose setting contains these words."""
    return next(row for row in report["rows"] if words in row["setting"])


def format_table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    headings = list(headings)
    return "\n".join([_format_line(headings), "|" + "---|" * len(headings), *map(_format_line, rows)])


def _format_line(cells: Iterable[object]) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def format_peak_memory(row: Row) -> str:
    """Return a row's peaks of allocated and reserved GPU memory."""
    return f"{row['peak_gib']:.1f} GiB, {row['peak_reserved_gib']:.1f} reserved"


def format_run_peak(manifest: Any) -> str:
    """Return the peak of allocated GPU memory of a run, from its manifest."""
    return f"{max(session['peak_gib'] for session in manifest['sessions']):.1f} GiB"


def describe_measurement(report: Report) -> str:
    """Return the GPUs and the versions that a report was measured with."""
    machine, versions = report["machine"], report["versions"]
    return f"{machine['gpus']} x {machine['gpu']}, torch {versions['torch']}, trl {versions['trl']}"
