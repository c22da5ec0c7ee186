"""A submission folder gives the same score and outputs with the course's packages of 2024."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.submission.fill_templates import TEMPLATES_DIR


def test_recorded_check_in_the_course_environment_has_equal_scores_and_outputs() -> None:
    record = json.loads((REPOSITORY / "docs/pack/course_environment.json").read_text(encoding="utf-8"))
    assert record["course_versions"]["transformers"] == "4.45.1" and record["course_versions"]["peft"] == "0.13.0"
    known = json.loads((TEMPLATES_DIR / "peft-0.13.0.json").read_text(encoding="utf-8"))
    assert record["lora_config_keys"] == known["keys"]
    assert {row["model"] for row in record["rows"]} == {"llama", "gemma2"}
    for row in record["rows"]:
        assert row["relative_difference"] < 1e-4 and row["equal_predictions"] == row["predictions"] > 0


@pytest.mark.slow
def test_check_in_the_course_environment(tmp_path: Path) -> None:
    python = os.environ.get("HW3_COURSE_PYTHON")
    if python is None:
        pytest.skip("HW3_COURSE_PYTHON: the python of an environment with transformers 4.45.1 and peft 0.13.0")
    command = [sys.executable, REPOSITORY / "tools/check_pack.py", "--python", python]
    command += ["--output", tmp_path / "check.json"]
    process = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert process.returncode == 0
    record = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert [row["equal_predictions"] for row in record["rows"]] == [row["predictions"] for row in record["rows"]]
