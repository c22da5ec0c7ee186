"""Benchmarks need a GPU, but they can be imported without one, and what they replace in `hw3` exists."""

import importlib
from pathlib import Path

import profile_eval
import pytest
from helpers import REPOSITORY

BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_imports(path: Path) -> None:
    assert Path(importlib.import_module(path.stem).__file__) == path


@pytest.mark.parametrize("part", [*profile_eval.PARTS, *profile_eval.BACKGROUND_PARTS])
def test_profile_eval_times_existing_functions(part: str) -> None:
    for owner, name in (profile_eval.PARTS | profile_eval.BACKGROUND_PARTS)[part]:
        assert callable(getattr(owner, name))


@pytest.mark.parametrize(
    ("module", "name"), [("hw3.training.plan", "gpu_memory"), ("hw3.generation.decoder", "can_capture")]
)
def test_function_that_a_benchmark_replaces_exists(module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(module), name))
