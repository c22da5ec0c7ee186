"""The record of the tests that ran with a set of packages."""

import re
from pathlib import Path

import test_latest

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest">
<testcase classname="" name="tests.data.test_rows"><error message="collection failure">ImportError</error></testcase>
<testcase classname="tests.data.test_prompt" name="test_a" />
<testcase classname="tests.data.test_prompt.TestB" name="test_b" />
<testcase classname="tests.data.test_prompt" name="test_c"><skipped message="no vocabulary" /></testcase>
<testcase classname="tests.runs.test_lock" name="test_d"><failure message="AssertionError">text</failure></testcase>
<testcase classname="tests.test_architecture" name="test_e" />
</testsuite></testsuites>
"""


def test_count_outcomes_counts_files_that_cannot_be_imported_as_failed(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT, encoding="utf-8")
    assert test_latest.count_outcomes(tmp_path / "report.xml") == {
        "data": {"passed": 2, "failed": 1, "skipped": 1},
        "runs": {"passed": 0, "failed": 1, "skipped": 0},
        "test_architecture": {"passed": 1, "failed": 0, "skipped": 0},
    }


def test_read_requirements_returns_names_of_the_project_and_its_extras() -> None:
    names = test_latest.read_requirements("dev", "tools")
    assert {"torch", "transformers", "pytest", "types-PyYAML", "gguf"} <= set(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
