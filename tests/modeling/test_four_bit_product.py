"""A machine whose bitsandbytes has no kernels gets one message, and can train without quantization."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import hw3

from hw3.cli import doctor_command
from hw3.modeling.four_bit_product import find_4bit_problem

CPU = torch.device("cpu")
MESSAGE = (
    "4-bit layers of bitsandbytes do not work on this machine (cpu): RuntimeError: native library not loaded; to train "
    'without them, which needs more memory, use SET="quantization=null"'
)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("native library not loaded\nSee the documentation.")

    monkeypatch.setattr(Linear4bit, "forward", fail)


def test_find_4bit_problem_finds_none_and_keeps_the_random_state() -> None:
    before = torch.get_rng_state()
    assert find_4bit_problem(CPU) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_find_4bit_problem_does_not_blame_4bit_layers_if_memory_has_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Linear4bit, "forward", fail)
    assert find_4bit_problem(CPU) is None


@pytest.mark.usefixtures("without_kernels")
def test_training_without_kernels_is_refused_before_anything_is_written(mini_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert hw3("train", mini_recipe, "--run", run, expected=2)[1] == f"hw3: quantization: {MESSAGE}\n"
    assert not run.exists()
    hw3("train", mini_recipe, "--run", run, "training.max_steps=1", "quantization=null")
    hw3("eval", run)


def test_scoring_a_quantized_run_without_kernels_is_refused(finished_run: Path, without_kernels: None) -> None:
    assert hw3("eval", finished_run, expected=2)[1].endswith(f"hw3: quantization: {MESSAGE}\n")


@pytest.mark.usefixtures("without_kernels")
def test_doctor_without_kernels_names_the_command_that_trains() -> None:
    assert hw3("doctor")[0].endswith('can be trained on this machine: make train SET="quantization=null"\n')
    assert doctor_command._check_4bit("cpu") == ("note", "4-bit product", MESSAGE)
