"""Audit a built dataset against files that it must not share a sentence with, and write the counts as a document.

    hw3 data build --corpus CORPUS --output BUILT --exclude TRAIN.json PUBLIC_TEST.json
    python tools/audit_data.py --built BUILT --compare-with TRAIN.json PUBLIC_TEST.json

The script reads the written rows again and normalizes them character by character. It searches every side for copies
of the other files' sentences, and measures the longest run of characters that each side has in common with them. It
writes docs/data/audit.json (counts and checksums, no rows) and docs/data/audit.md. It ends with status 1 if there is
a copy, and with 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from check_sample import GRAM_CHARACTERS, SubstringSearch

from hw3.common.atomic_io import write_atomically, write_json
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.corpus.build import SPLIT_FILES
from hw3.corpus.build_report import REPORT_FILE
from hw3.corpus.dedup import NEAR_DUPLICATE_SIMILARITY, SHARED_RUN_CHARACTERS, find_copies_exhaustively
from hw3.corpus.filters import FILTER_RULES
from hw3.corpus.normalize import remove_punctuation, to_simplified
from hw3.corpus.row_sides import row_sides
from hw3.data.rows import read_rows

RUN_BIN_CHARACTERS = 4  # width of a bin in the histogram of longest common runs


def read_normalized_sides(path: Path) -> list[str]:
    """Return both sides of every row, in simplified characters and without punctuation."""
    rows = read_rows(path, require_output=False)
    return [remove_punctuation(to_simplified(side)).replace("\n", "") for row in rows for side in row_sides(row)]


def audit_dataset(built: Path, compared_files: list[Path]) -> dict[str, Any]:
    """Return the counts.

    Raises:
        UserError: a file cannot be read.
    """
    sentences = sorted({side for path in compared_files for side in read_normalized_sides(path) if side})
    return {
        "compared_files": [{"name": path.name, "sha256": file_sha256(path)} for path in compared_files],
        "sentences": len(sentences),
        "near_duplicate_similarity": NEAR_DUPLICATE_SIMILARITY,
        "files": {name: audit_file(built / name, sentences) for name in SPLIT_FILES.values()},
        "build": json.loads((built / REPORT_FILE).read_text(encoding="utf-8")),
    }


def audit_file(path: Path, sentences: list[str]) -> dict[str, Any]:
    """Return the counts of one built file."""
    sides = read_normalized_sides(path)
    result = find_copies_exhaustively(sides, sentences)
    search = SubstringSearch({str(number): side for number, side in enumerate(sides)})
    search.search("\n".join(sentences))
    return {
        "sha256": file_sha256(path),
        "sides": len(sides),
        "copies": len(result.copies),
        "max_similarity": result.max_similarity,
        "longest_common_run": count_runs(search.longest.values()),
    }


def count_runs(lengths: Iterable[int]) -> dict[str, int]:
    """Return a histogram of run lengths, label to count, shortest first."""
    bins = Counter(max(length, GRAM_CHARACTERS - 1) // RUN_BIN_CHARACTERS for length in lengths)
    histogram = {}
    for number, count in sorted(bins.items()):
        first = number * RUN_BIN_CHARACTERS
        label = (
            f"under {GRAM_CHARACTERS}" if first < GRAM_CHARACTERS else f"{first} to {first + RUN_BIN_CHARACTERS - 1}"
        )
        histogram[label] = count
    return histogram


def format_document(report: dict[str, Any]) -> str:
    """Return the audit as Markdown."""
    build, clusters = report["build"], report["build"]["clusters"]
    compared = " and ".join(file["name"] for file in report["compared_files"])
    lines = [
        "# What `hw3 data build` removes, and how much of the homework is left in the result",
        "",
        "Written by `tools/audit_data.py` from the figures in `audit.json`. Source: "
        f"{build['source']['pairs']:,} pairs from {build['source']['books']} books. {report['note']}".rstrip(),
        "",
        "| rule | what it removes | removed | remaining |",
        "|---|---|---|---|",
        *(
            f"| {count['rule']} | {FILTER_RULES[count['rule']]} | {count['removed']:,} | {count['remaining']:,} |"
            for count in build["cleaning"]
        ),
        "",
        f"{clusters['clusters']:,} clusters of near duplicates. {clusters['pairs_with_near_duplicates']:,} pairs share "
        f"a cluster with others; the largest cluster has {clusters['largest_cluster']:,}. A cluster gives one row at "
        "most.",
        "",
        f"The rows are compared with {report['sentences']:,} sentences of {compared}. A copy is the same sentence in "
        f"either script, a sentence contained in the other, {SHARED_RUN_CHARACTERS} consecutive characters in common, "
        f"or a similarity of at least {report['near_duplicate_similarity']:g}.",
        "",
        "| file | rows | sides | copies | highest similarity | longest common run in characters: sides |",
        "|---|---|---|---|---|---|",
    ]
    rows = {split["file"]: split["rows"] for split in build["splits"].values()}
    for name, file in report["files"].items():
        runs = ", ".join(f"{label}: {count:,}" for label, count in file["longest_common_run"].items())
        cells = (name, f"{rows[name]:,}", f"{file['sides']:,}", file["copies"], f"{file['max_similarity']:.2f}", runs)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Audit one folder and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, required=True, help="the folder that hw3 data build wrote")
    parser.add_argument("--compare-with", type=Path, nargs="+", required=True, metavar="FILE", help="files of rows")
    parser.add_argument("--note", default="", help="a sentence about the source, for the document")
    parser.add_argument("--output", type=Path, default=Path("docs/data"), help="folder for audit.json and audit.md")
    arguments = parser.parse_args()
    try:
        report = {"note": arguments.note} | audit_dataset(arguments.built, arguments.compare_with)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(arguments.output / "audit.json", report)
    write_atomically(arguments.output / "audit.md", format_document(report))
    copies = sum(file["copies"] for file in report["files"].values())
    print(f"{sum(file['sides'] for file in report['files'].values()):,} sides, {copies} copies; {arguments.output}")
    return 1 if copies else 0


if __name__ == "__main__":
    sys.exit(main())
