"""Fixtures of the submission tests."""

import json
from pathlib import Path

import pytest
from helpers import hw3

from hw3.data.rows import read_rows


@pytest.fixture(scope="session")
def submission_dir(scored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submission of the mini recipe's run for the grader of 2024, with predictions for three rows without outputs.

    The rows are in `private.json` beside the folder.
    """
    folder = tmp_path_factory.mktemp("submission")
    rows = [{"id": row.id, "instruction": row.instruction} for row in read_rows(scored_run.parent / "eval.json")[:2]]
    rows.append({"id": "special", "instruction": "甲<eos>乙"})
    (folder / "private.json").write_text(json.dumps(rows), encoding="utf-8")
    hw3("pack", scored_run, "--grader-year", "2024", "--input", folder / "private.json", "--output", folder / "pack")
    assert sorted(path.name for path in folder.iterdir()) == ["pack", "private.json"]
    return folder / "pack"
