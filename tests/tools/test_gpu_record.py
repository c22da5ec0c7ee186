"""`tools/test_gpu.py`: outcomes are read from pytest's report, and a machine without a GPU is no success."""

from pathlib import Path

import pytest
from test_gpu import main, read_outcomes

REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_resumed_run" name="test_a[x]" time="1.26"/>
<testcase classname="tests.gpu.test_resumed_run" name="test_b" time="0.04"><failure>no</failure></testcase>
<testcase classname="tests.gpu.test_smollm2_run" name="test_c" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_read_outcomes_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT, encoding="utf-8")
    assert read_outcomes(tmp_path / "report.xml") == [
        {"test": "test_resumed_run::test_a[x]", "outcome": "passed", "seconds": 1.3},
        {"test": "test_resumed_run::test_b", "outcome": "failed", "seconds": 0.0},
        {"test": "test_smollm2_run::test_c", "outcome": "skipped", "seconds": 0.0},
    ]


def test_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["test_gpu.py"])
    monkeypatch.setenv("HW3_TEST_GPU", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main() == 1
    assert "PyTorch finds no GPU" in capsys.readouterr().err
