"""Read the files whose sentences must not be in any built row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.corpus.normalize import normalize_texts
from hw3.corpus.row_sides import row_sides
from hw3.data.rows import read_rows


@dataclass(frozen=True)
class ExcludedFile:
    """The record of one excluded file; `sentences` counts distinct normalized ones."""

    name: str
    sha256: str
    rows: int
    sentences: int


def read_excluded_files(files: Sequence[Path]) -> tuple[list[ExcludedFile], list[str]]:
    """Return a record per file, and the distinct normalized sentences of all files, sorted.

    A row contributes both of its sides, or only the text to translate if it has no output.

    Raises:
        UserError: files cannot be read or have bad rows.
    """
    records: list[ExcludedFile] = []
    all_sentences: set[str] = set()
    problems: list[str] = []
    for path in files:
        try:
            rows = read_rows(path, require_output=False)
        except UserError as error:
            problems += error.problems
            continue
        sides = normalize_texts([side for row in rows for side in row_sides(row)])
        sentences = {side for side in sides if side}
        all_sentences |= sentences
        records.append(ExcludedFile(path.name, file_sha256(path), len(rows), len(sentences)))
    if problems:
        raise UserError(*problems)
    return records, sorted(all_sentences)
