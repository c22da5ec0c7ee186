"""Write a benchmark's results: `docs/benchmarks/<name>.json`, and a Markdown table made from it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from hw3.common.atomic_io import write_atomically, write_json
from hw3.runs.manifest import git_commit, installed_versions

# Headings of the table, by field of a row, for benchmarks of an optimizer step.
STEP_COLUMNS = {
    "setting": "setting",
    "rows_per_step": "rows per step",
    "seconds_per_step": "s/step",
    "rows_per_second": "rows/s",
    "peak_gib": "peak GiB",
}


def describe_machine() -> dict[str, Any]:
    """Return the number of CPU cores, the system, and the GPUs with their CUDA version."""
    machine: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0)), "system": platform.system()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["gpus"] = torch.cuda.device_count()
        machine["cuda"] = torch.version.cuda
    return machine


def read_previous_rows(folder: Path, name: str, *key_fields: str) -> dict[Any, dict[str, Any]]:
    """Read the rows of an existing report, so that settings that are not measured now stay in it.

    Args:
        folder: `docs/benchmarks`.
        name: The benchmark's name.
        key_fields: Fields that distinguish rows of the same setting.

    Returns:
        Rows with the commit at which they were measured, by setting; by (setting, values of `key_fields`) if there are
        any. Empty if there is no report.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        return {}
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = [{"commit": report["commit"], **row} for row in report["rows"]]
    return {
        (row["setting"], *(row[field] for field in key_fields)) if key_fields else row["setting"]: row for row in rows
    }


def write_report(
    folder: Path, name: str, machine: dict[str, Any], rows: list[dict[str, Any]], columns: dict[str, str]
) -> None:
    """Write the JSON file and its table.

    Args:
        folder: `docs/benchmarks`.
        name: The benchmark's name.
        machine: From `describe_machine`.
        rows: One per setting; seconds are medians, memory is in GiB.
        columns: Headings of the table, by field of a row.
    """
    report = {"machine": machine, "versions": installed_versions(), "commit": git_commit()}
    report |= {"columns": columns, "rows": rows}
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", format_table(report))


def format_table(report: dict[str, Any]) -> str:
    """Return the rows of a report as a Markdown table, below a line about the machine and the versions."""
    columns = report["columns"]
    gpu = report["machine"].get("gpu")
    machine = f"{report['machine']['gpus']} x {gpu}" if gpu else f"{report['machine']['cpu_cores']} CPU cores"
    used = report["rows"][0].get("versions", report["versions"])  # Unsloth runs with other versions than this process
    versions = ", ".join(f"{package} {used[package]}" for package in ("torch", "trl", "transformers"))
    lines = [f"{machine}; {versions}.", "", "| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(str(row.get(field, "")) for field in columns) + " |" for row in report["rows"]]
    return "\n".join(lines) + "\n"
