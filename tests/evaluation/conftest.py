"""Fixtures of the evaluation tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hw3.data.fingerprint import DatasetFingerprint
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import ScoreEntry, ScoringSettings

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
            settings=ScoringSettings(
                dtype="float32",
                attn_implementation="eager",
                quantization=None,
                dequantized=False,
                base_sha256="base",
                tokenizer_sha256="tokenizer",
                bootstrap_samples=100,
                bootstrap_seed=0,
            ),
            prompt_sha256="own",
            entries=list(entries),
        )

    return make
