"""The rows that a run's checkpoints are scored on, with those that `data.dev_fraction` takes from the training file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError
from hw3.common.paths import portable_path
from hw3.config.recipe import Recipe
from hw3.data.dev_split import format_dev_rows, split_dev_rows
from hw3.data.fingerprint import DatasetFingerprint, dataset_fingerprint
from hw3.data.rows import Row, read_rows
from hw3.runs.run import Run


def read_eval_rows(run: Run, recipe: Recipe, path: Path) -> tuple[list[Row], DatasetFingerprint]:
    """Read the rows of a file to score; take the dev rows from the training file if theirs is not written yet.

    Args:
        run: the run.
        recipe: the run's recipe.
        path: the file.

    Raises:
        UserError: the file is missing or has bad rows, or the training file is not the one that the run began with.
    """
    if path != run.dev_file(recipe) or recipe.data.dev_fraction is None or path.exists():
        rows = read_rows(path)
        return rows, dataset_fingerprint(path, rows)
    rows = _take_dev_rows(run, recipe)
    return rows, fingerprint_dev_rows(run, rows)


def fingerprint_dev_rows(run: Run, rows: list[Row]) -> DatasetFingerprint:
    """Return the fingerprint of the file that `write_dev_rows` writes."""
    sha256 = hashlib.sha256(format_dev_rows(rows).encode()).hexdigest()
    return DatasetFingerprint(path=portable_path(run.own_dev_path), sha256=sha256, rows=len(rows))


def write_dev_rows(run: Run, recipe: Recipe) -> None:
    """Write the rows that `data.dev_fraction` takes from the training file into the run folder."""
    if recipe.data.dev_fraction is not None:
        write_atomically(run.own_dev_path, format_dev_rows(_take_dev_rows(run, recipe)))


def _take_dev_rows(run: Run, recipe: Recipe) -> list[Row]:
    assert recipe.data.dev_fraction is not None, "only then are there such rows"
    _, rows = split_dev_rows(read_rows(Path(recipe.data.train)), recipe.data.dev_fraction, recipe.seed)
    manifest = run.read_manifest()
    recorded = None if manifest is None else manifest.data.get("dev")
    if recorded is not None and recorded.sha256 != fingerprint_dev_rows(run, rows).sha256:
        raise UserError(
            f"{recipe.data.train}: has changed since {run} began, and {run.own_dev_path} is missing; restore one of "
            "them"
        )
    return rows
