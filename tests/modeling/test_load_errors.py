"""Memory that runs out while weights are quantized is reported as such, without the report of transformers."""

import logging
from pathlib import Path

import pytest
import torch
from helpers import hw3
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from hw3.modeling.load_errors import out_of_memory_raised

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 8.00 GiB."


def test_train_reports_that_memory_ran_out_while_weights_were_quantized(
    mini_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(Bnb4bitQuantize, "convert", run_out_of_memory)
    output, messages = hw3("train", mini_recipe, "--run", tmp_path / "run", expected=1)
    assert f"hw3: out of memory: {MESSAGE}\nto use less memory, set speed=lean" in messages
    assert "Traceback" not in output + messages + caplog.text
    assert not (tmp_path / "run/manifest.json").exists()


def test_out_of_memory_raised_leaves_other_errors_and_reports_alone(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    with pytest.raises(RuntimeError, match="some issues") as error, out_of_memory_raised():
        logger.warning("LOAD REPORT: ValueError: another cause")
        raise RuntimeError("some issues")
    logger.removeHandler(caplog.handler)
    assert type(error.value) is RuntimeError
    assert "another cause" in caplog.text
    assert logger.filters == []
