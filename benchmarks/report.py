"""What every benchmark writes: `docs/benchmarks/<name>.json`, and a table made from it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from hw3.common.atomic_io import write_atomically, write_json
from hw3.runs.run_dir import environment

# Of an optimizer step.
STEP_COLUMNS = {
    "setting": "setting",
    "rows_per_step": "rows a step",
    "seconds_per_step": "s/step",
    "rows_per_second": "rows/s",
    "peak_gib": "peak GiB",
}


def machine() -> dict[str, Any]:
    """The machine in words and numbers."""
    found: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0)), "system": platform.system()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda
    return found


def kept_rows(folder: Path, name: str, *more: str) -> dict[Any, dict[str, Any]]:
    """Rows of the report that is there: what is not measured now stays, with the commit it was made at.

    Args:
        folder: `docs/benchmarks`.
        name: the benchmark's name.
        more: keys that tell rows of one setting apart.

    Returns:
        By setting; by (setting, the values of those keys) where there are any.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        return {}
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = [{"commit": report["commit"], **row} for row in report["rows"]]
    return {(row["setting"], *(row[key] for key in more)) if more else row["setting"]: row for row in rows}


def write_report(
    folder: Path, name: str, machine: dict[str, Any], rows: list[dict[str, Any]], columns: dict[str, str]
) -> None:
    """Write the JSON and its table.

    Args:
        folder: `docs/benchmarks`.
        name: the benchmark's name.
        machine: from `machine`.
        rows: one a setting; seconds are medians, memory is GiB.
        columns: keys of a row to show, with their headings.
    """
    facts = environment()
    report = {"machine": machine, "versions": facts["versions"], "commit": facts["git_commit"]}
    report |= {"columns": columns, "rows": rows}
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", table(report))


def table(report: dict[str, Any]) -> str:
    """A Markdown table of a report's rows, under a line on the machine; `tools/fill_readme.py` makes it again."""
    columns = report["columns"]
    gpu = report["machine"].get("gpu")
    where = f"{report['machine']['gpus']} x {gpu}" if gpu else f"{report['machine']['cpu_cores']} CPU cores"
    used = report["rows"][0].get("versions", report["versions"])  # another site folder's
    versions = ", ".join(f"{package} {used[package]}" for package in ("torch", "trl", "transformers"))
    lines = [f"{where}; {versions}.", "", "| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in report["rows"]]
    return "\n".join(lines) + "\n"
