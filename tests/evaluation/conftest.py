"""Fixtures of the evaluation tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SCORING_SETTINGS

from hw3.data.fingerprint import DatasetFingerprint
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import ScoreEntry

MakeResults = Callable[..., EvalResults]


@pytest.fixture
def make_results(tmp_path: Path) -> MakeResults:
    """Return a function that makes results of a run with the prompt `own`, from the data file's path and entries."""

    def make(data_path: str, *entries: ScoreEntry) -> EvalResults:
        return EvalResults(
            tmp_path / Path(data_path).stem,
            run_name="outputs/run",
            started="2026-01-01T00:00:00+00:00",
            data=DatasetFingerprint(path=data_path, sha256=f"sha256 of {data_path}", rows=2),
            settings=SCORING_SETTINGS,
            prompt_sha256="own",
            entries=list(entries),
        )

    return make
