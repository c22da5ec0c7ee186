"""Audits a built set against files that it must not share a sentence with, and writes the counts as a document.

    hw3 data build --corpus CORPUS --out BUILT --exclude TRAIN.json PUBLIC_TEST.json
    python tools/audit_data.py --built BUILT --against TRAIN.json PUBLIC_TEST.json

It reads the written rows again, folds them character by character, and looks for every sentence of the other files in
them and the other way round, then for the longest run of characters that a side has in common with those files. Writes
docs/data/audit.json (counts and checksums, no row) and docs/data/audit.md, and ends with status 1 if there is a copy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from check_sample import GRAM, Sides

from hw3.common.atomic_io import write_atomically, write_json
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.corpus.build import REPORT, SPLITS, sides
from hw3.corpus.dedup import LONG_RUN, NEAR, compare_all
from hw3.corpus.filters import RULES
from hw3.corpus.normalize import fold, without_punctuation
from hw3.data.rows import read_rows


def read_sides(path: Path) -> list[str]:
    """Both sides of every row, in one script and without punctuation."""
    rows = read_rows(path, need_output=False)
    return [without_punctuation(fold(side)).replace("\n", "") for row in rows for side in sides(row)]


def audit(built: Path, against: list[Path]) -> dict:
    """The counts. Raises UserError if a file cannot be read."""
    others = sorted({side for path in against for side in read_sides(path) if side})
    searched = {}
    for name in SPLITS.values():
        texts = read_sides(built / name)
        found = compare_all(texts, others)
        longest = Sides({str(number): text for number, text in enumerate(texts)})
        longest.search("\n".join(others))
        runs: Counter[str] = Counter()
        for run in longest.longest.values():
            low = run // 4 * 4
            runs[f"under {GRAM}" if run < GRAM else f"{low} to {low + 3}"] += 1
        searched[name] = {
            "sha256": file_sha256(built / name),
            "sides": len(texts),
            "copies": len(found["copies"]),
            "largest_similarity": found["largest_similarity"],
            "longest_common_run": dict(sorted(runs.items(), key=lambda item: (item[0][0] != "u", len(item[0]), item))),
        }
    return {
        "against": [{"name": path.name, "sha256": file_sha256(path)} for path in against],
        "sentences": len(others),
        "near_duplicate_from": NEAR,
        "files": searched,
        "build": json.loads((built / REPORT).read_text(encoding="utf-8")),
    }


def document(report: dict) -> str:
    """The audit as Markdown."""
    build, clusters = report["build"], report["build"]["clusters"]
    against = " and ".join(file["name"] for file in report["against"])
    lines = [
        "# What `hw3 data build` removes, and what is left of the homework in it",
        "",
        "Made by `tools/audit_data.py`; the figures are those of `audit.json`. Source: "
        f"{build['source']['pairs']:,} pairs of {build['source']['books']} books. {report['note']}".rstrip(),
        "",
        "| rule | what it removes | removed | left |",
        "|---|---|---|---|",
        *(
            f"| {line['rule']} | {RULES[line['rule']]} | {line['removed']:,} | {line['left']:,} |"
            for line in build["cleaning"]
        ),
        "",
        f"{clusters['clusters']:,} clusters of near duplicates; {clusters['pairs_with_near_duplicates']:,} pairs are "
        f"in one with others, the largest has {clusters['largest']:,}. A cluster gives one row.",
        "",
        f"Against {report['sentences']:,} sentences of {against}: a copy is the same sentence in either script, one "
        f"inside the other, {LONG_RUN} characters in a row in common, or a similarity of "
        f"{report['near_duplicate_from']:g}.",
        "",
        "| file | rows | sides | copies | largest similarity | longest run in common, characters: sides |",
        "|---|---|---|---|---|---|",
    ]
    rows = {entry["file"]: entry["rows"] for entry in build["splits"].values()}
    for name, file in report["files"].items():
        runs = ", ".join(f"{key}: {count:,}" for key, count in file["longest_common_run"].items())
        cells = (
            name,
            f"{rows[name]:,}",
            f"{file['sides']:,}",
            file["copies"],
            f"{file['largest_similarity']:.2f}",
            runs,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Audit one folder; 2 where something cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, required=True, help="folder of a build")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="files of rows")
    parser.add_argument("--note", default="", help="a sentence about the source, for the document")
    parser.add_argument("--out", type=Path, default=Path("docs/data"), help="where the report goes")
    arguments = parser.parse_args()
    try:
        report = {"note": arguments.note} | audit(arguments.built, arguments.against)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(arguments.out / "audit.json", report)
    write_atomically(arguments.out / "audit.md", document(report))
    copies = sum(file["copies"] for file in report["files"].values())
    print(f"{sum(file['sides'] for file in report['files'].values()):,} sides, {copies} copies; {arguments.out}")
    return 1 if copies else 0


if __name__ == "__main__":
    sys.exit(main())
