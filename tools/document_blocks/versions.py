"""Blocks about the versions of packages that the tests ran with."""

from __future__ import annotations

from document_blocks.sources import format_table, read_json

TITLES = {"pinned": "pinned (`constraints.txt`)", "latest": "newest"}


def packages() -> str:
    """The versions in each set; those that differ come first, in bold."""
    sets = {name: {"Python": entry["python"]} | entry["packages"] for name, entry in _read_sets().items()}
    first = next(iter(sets.values()))
    rows = [(name, *(versions.get(name, "") for versions in sets.values())) for name in first]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    formatted = [(name, *(f"**{v}**" if len(set(versions)) > 1 else v for v in versions)) for name, *versions in rows]
    return format_table(["package", *(TITLES[name] for name in sets)], formatted)


def tests() -> str:
    """The tests of each package by outcome, in each set."""
    sets = _read_sets()
    rows = []
    for name in sorted({name for entry in sets.values() for name in entry["tests"]}):
        rows.append((f"`tests/{name}`", *(_describe_outcomes(entry["tests"].get(name)) for entry in sets.values())))
    systems = {entry["system"] for entry in sets.values()}
    return f"{format_table(['tests', *(TITLES[name] for name in sets)], rows)}\n\nRun on {', '.join(sorted(systems))}."


def _read_sets() -> dict:
    record = read_json("docs/versions.json")
    return {name: record[name] for name in TITLES if name in record}


def _describe_outcomes(outcomes: dict[str, int] | None) -> str:
    if outcomes is None:
        return "not run"
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
