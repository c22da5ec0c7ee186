"""Fixtures of the tests of run folders."""

from pathlib import Path

import pytest

from hw3.data.fingerprint import DatasetFingerprint
from hw3.runs.manifest import (
    BaseModelRecord,
    BatchLayoutRecord,
    Manifest,
    ParameterCounts,
    Session,
    SpecialTokenIds,
    StepStrategyRecord,
)
from hw3.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run folder that does not exist yet."""
    return Run(tmp_path / "run")


@pytest.fixture
def manifest() -> Manifest:
    """A manifest of one session on a CPU."""
    return Manifest(
        name="mini-qlora",
        started="2026-01-02T03:04:05+00:00",
        versions={"torch": "2.0"},
        python="3.11.7",
        git_commit=None,
        data={"train": DatasetFingerprint(path="train.json", sha256="train hash", rows=44)},
        prompt_sha256="prompt hash",
        quantization={"load_in_4bit": True},
        base=BaseModelRecord(name="base", sha256="base hash"),
        tokenizer_sha256="tokenizer hash",
        tokens=SpecialTokenIds(bos=2, eos=1, pad=None),
        device="cpu",
        layout=BatchLayoutRecord(processes=1, rows_per_device=8, accumulation=1),
        speed=StepStrategyRecord(
            requested="auto", cuda_graphs=False, dequantized=True, activation_checkpointing=False, optim="adamw_torch"
        ),
        parameters=ParameterCounts(trained=10, total=100),
        sessions=[Session(started="2026-01-02T03:04:05+00:00", seconds=1.5, from_step=0, to_step=12, processes=1)],
    )
