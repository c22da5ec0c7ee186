"""Blocks about the versions of packages that the tests ran with."""

from __future__ import annotations

from collections import Counter

from document_blocks.sources import REPOSITORY, format_table, read_json

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


def gpu_tests() -> str:
    """The tests on a GPU by file, with the machine that they ran on."""
    if not (REPOSITORY / "docs/gpu-tests.json").exists():
        return "No complete run is recorded yet."
    record = read_json("docs/gpu-tests.json")
    outcomes: dict[str, Counter[str]] = {}
    for test in record["tests"]:
        outcomes.setdefault(test["test"].partition("::")[0], Counter(passed=0))[test["outcome"]] += 1
    rows = [(f"`tests/gpu/{file}.py`", _describe_outcomes(counts)) for file, counts in sorted(outcomes.items())]
    machine, versions = record["machine"], record["versions"]
    about = (
        f"{record['seconds']} s in all, on {record['date']}: one {machine['gpu']} ({machine['gpu_gib']:.0f} GiB), "
        f"{machine['cpu_cores']} CPU cores, CUDA {machine['cuda']}, Python {record['python']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, trl {versions['trl']}."
    )
    return f"{format_table(['tests', 'outcomes'], rows)}\n\n{about}"
