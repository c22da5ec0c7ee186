"""The log of `tools/soak.py`, and the page that is made from it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, oldest first; none if there is no log."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def find_last_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last line of each round. A round that failed is run again, which adds a line."""
    return list({(line["seed"], line["round"]): line for line in lines}.values())


def write_summary(log: Path, summary: Path) -> None:
    """Write a Markdown page with the counts of a log. Each round counts as it was run last."""
    all_lines = read_log(log)
    lines = find_last_lines(all_lines)
    passed = sum(line["outcome"] == "passed" for line in lines)
    faults = [fault for line in lines for fault in line["faults"]]
    not_reached = sum(fault.get("outcome") == "not reached" for fault in faults)
    commands = sorted({fault["command"] for fault in faults})
    seconds = sum(line["seconds"] for line in lines)
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    devices = sorted({line["device"] for line in lines if "device" in line})
    text = [
        "# Soak test",
        "",
        f"`python tools/soak.py` wrote this page from `{log.name}`.",
        "",
        f"- rounds: {len(lines)}, of which {passed} passed; seed {seeds}; {seconds / max(1, len(lines)):.1f} s each",
        f"- faults: {len(faults)}, of which {not_reached} came after the command had ended",
        *(f"- on {device}, with CUDA graphs" for device in devices),
        "",
        f"| fault | {' | '.join(commands)} | all |",
        f"|---|{'--:|' * (len(commands) + 1)}",
    ]
    counts = Counter((fault["kind"], fault["command"]) for fault in faults)
    for kind in sorted({fault["kind"] for fault in faults}):
        row = [counts[kind, command] for command in commands]
        text.append(f"| {kind.replace('_', ' ')} | {' | '.join(map(str, row))} | {sum(row)} |")
    outcomes = {(line["seed"], line["round"]): line["outcome"] for line in lines}
    for line in all_lines:
        if line["outcome"] != "passed":
            is_mended = outcomes[line["seed"], line["round"]] == "passed"
            note = " at first, and passed when it was repeated" if is_mended else ""
            text += ["", f"Round {line['round']} failed{note}: {line['reason'].splitlines()[0].rstrip(': ')}"]
    summary.write_text("\n".join(text) + "\n", encoding="utf-8")
