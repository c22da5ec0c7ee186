"""lm-evaluation-harness gives an exported model the log-likelihoods that `hw3 eval` wrote to `rows.parquet`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

RECORD = REPOSITORY / "docs/export/harness.json"
KINDS = {"qlora", "dora", "full"}


def check_record(record: dict) -> None:
    assert {row["run"] for row in record["rows"]} == KINDS
    assert record["versions"]["lm_eval"] == "0.4.13"
    for row in record["rows"]:
        assert row["max_difference_nats"] <= 1e-3
        assert row["equal_ids"] == row["scored_rows"] == 144
        assert row["nll_nats"] > 1000  # about two nats for each of 144 outputs' tokens: the rows were scored


def test_recorded_log_likelihoods_of_the_harness_equal_those_of_the_runs() -> None:
    check_record(json.loads(RECORD.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_harness_gives_exported_models_the_log_likelihoods_of_their_runs(tmp_path: Path) -> None:
    output = tmp_path / "harness.json"
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools/check_harness.py", "--output", output],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode == 3:
        pytest.skip(f"lm-evaluation-harness cannot be installed: {done.stderr}")
    assert done.returncode == 0, done.stderr
    check_record(json.loads(output.read_text(encoding="utf-8")))
