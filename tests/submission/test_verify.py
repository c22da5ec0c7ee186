"""Differences between the grader and training are explained, and files that do not belong to a submission refused."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from helpers import character_tokenizer

from hw3.common.errors import RunError
from hw3.evaluation.selection import select_scored_checkpoint
from hw3.runs.run import Run
from hw3.submission.verify import _explain_score_difference, _run_in_folder, verify_files


def test_rows_that_the_grader_encodes_differently_are_named(scored_run: Path, tmp_path: Path) -> None:
    rows = [{"id": str(number), "instruction": text, "output": "乙"} for number, text in enumerate(["甲", "甲<eos>"])]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    scored = select_scored_checkpoint(Run(scored_run))
    assert _explain_score_difference(scored, character_tokenizer()) == ""
    scored = dataclasses.replace(scored, data_file=tmp_path / "rows.json")
    assert _explain_score_difference(scored, character_tokenizer()) == (
        "\n1 rows contain the text of a special token, which the grader reads as the token itself: 1"
    )


def test_verify_files_refuses_files_that_do_not_belong_to_a_submission(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("#", encoding="utf-8")
    assert verify_files(tmp_path) == "size: 1 files, 0.0 MiB; the course allows 3.73 GiB for the adapter"
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/utils.pyc").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"__pycache__/utils\.pyc: written while verifying"):
        verify_files(tmp_path)


def test_processes_in_the_folder_find_packages_of_a_relative_pythonpath(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/found_there.py").write_text("NAME = 'found'\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["packages", "", "none"]))
    command = [sys.executable, "-c", "import sys, found_there; print(found_there.NAME, *sys.path, sep='|')"]
    scored = select_scored_checkpoint(Run(scored_run))
    for import_path in None, tmp_path / "more":
        name, working_directory, *paths = _run_in_folder(
            command, tmp_path / "folder", scored, import_path=import_path
        ).split("|")
        expected = [str(tmp_path / "packages"), str(tmp_path / "none")]
        expected = expected if import_path is None else [str(import_path), *expected]
        assert (name, working_directory, paths[: len(expected)]) == ("found", "", expected)
