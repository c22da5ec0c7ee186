"""Fixtures of the report tests."""

import contextlib
from pathlib import Path

import pytest
from sample_runs import Page, SampleReport, write_and_read_report, write_run


@pytest.fixture(scope="session")
def sample_report(tmp_path_factory: pytest.TempPathFactory) -> SampleReport:
    """Return the report of the run `outputs/a`, which has scores and no predictions."""
    folder = tmp_path_factory.mktemp("report")
    with contextlib.chdir(folder):
        page, markdown = write_and_read_report(write_run(Path("outputs/a")))
    return SampleReport(folder, page, markdown)


@pytest.fixture
def page(sample_report: SampleReport) -> Page:
    """Return the page of the sample report."""
    return sample_report.page


@pytest.fixture
def markdown(sample_report: SampleReport) -> str:
    """Return the Markdown of the sample report."""
    return sample_report.markdown


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, so that runs and data files have the relative paths that a report prints."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
