"""Every command reports that memory ran out in one message, without a traceback."""

from pathlib import Path

import pytest
import torch
from helpers import hw3

COMMANDS = {
    "train": "hw3.training.train.train",
    "check": "hw3.training.preflight.check_recipe",
    "eval": "hw3.evaluation.evaluate.evaluate_run",
    "predict": "hw3.generation.predict.predict_run",
    "export": "hw3.export.merge.export_run",
    "pack": "hw3.submission.pack.pack_run",
    "verify": "hw3.evaluation.verify.verify_run",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_reports_that_memory_ran_out(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def run_out_of_memory(*args: object, **kwargs: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nmore")

    monkeypatch.setattr(COMMANDS[command], run_out_of_memory)
    arguments = {
        "train": [scored_run.parent / "mini/qlora.yaml", "--run", tmp_path / "run"],
        "check": [scored_run.parent / "mini/qlora.yaml"],
        "export": [scored_run, "--output", tmp_path / "exported"],
        "pack": [scored_run, "--output", tmp_path / "packed"],
    }.get(command, [scored_run])
    _, messages = hw3(command, *arguments, expected=1)
    first, advice = messages.strip().splitlines()[-2:]
    assert first == "hw3: out of memory: CUDA out of memory. Tried to allocate 2.00 MiB."
    assert "memory" in advice or "GPU" in advice
    assert "Traceback" not in messages
