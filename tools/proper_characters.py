"""Rewrite rows in proper Traditional characters (OpenCC `s2tw`), whatever map they went through before.

The course's rows went through a one-to-one map that writes 齣 for 出 and 瞭 for 了. Scores of the original and the
rewritten rows show what this map costs a model that was trained on proper text.

    python tools/proper_characters.py data/homework/public_test.json outputs/public_test_proper.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from opencc import OpenCC

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError
from hw3.data.rows import read_rows


def main() -> int:
    """Rewrite one file; the exit status is 2 if the file cannot be read as rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("input", type=Path, help="file of rows")
    parser.add_argument("output", type=Path, help="file to write")
    arguments = parser.parse_args()
    to_simplified, to_traditional = OpenCC("t2s"), OpenCC("s2tw")

    def rewrite(text: str) -> str:
        return to_traditional.convert(to_simplified.convert(text))

    try:
        rows = read_rows(arguments.input)
    except UserError as error:
        print(f"proper_characters: {error}", file=sys.stderr)
        return 2
    rewritten = [
        {"id": row.id, "instruction": rewrite(row.instruction), "output": rewrite(row.output or "")} for row in rows
    ]
    write_atomically(arguments.output, json.dumps(rewritten, ensure_ascii=False, indent=1) + "\n")
    changed = sum(
        a != b
        for row, new in zip(rows, rewritten, strict=True)
        for a, b in zip(row.output or "", new["output"], strict=False)
    )
    total = sum(len(row.output or "") for row in rows)
    print(f"{len(rows)} rows; {changed} of {total} output characters changed ({changed / total:.2%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
