"""A model that cannot be had: one message with the fix, whatever the reason."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import REPOSITORY
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hw3.common.errors import UserError
from hw3.config.schema import ModelSection
from hw3.modeling.loading import load_config, load_tokenizer

RESPONSE = SimpleNamespace(status_code=403, headers={}, request=None)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            GatedRepoError("gated", response=RESPONSE),
            "some/model is gated: accept its licence on https://huggingface.co/",
        ),
        (RepositoryNotFoundError("none", response=RESPONSE), "neither a local folder nor a model on the hub"),
        (RevisionNotFoundError("none", response=RESPONSE), "model.revision: some/model has no such revision"),
        (ConnectionError("offline"), "is not in the local cache and the hub cannot be reached"),
        (OSError(28, "No space left on device", "/cache/model.safetensors"), "No space left on device: /cache/"),
    ],
)
def test_one_message_with_the_fix(monkeypatch: pytest.MonkeyPatch, cause: Exception, message: str) -> None:
    def refuse(*names: Any, **options: Any) -> None:
        if isinstance(cause, OSError) and cause.errno:
            raise cause
        raise OSError("could not be loaded") from cause

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UserError) as error:
        load_config(ModelSection(pretrained_model_name_or_path="some/model"))
    (problem,) = error.value.problems
    assert message in problem


def test_a_broken_folder_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(UserError, match="model type"):
        load_config(ModelSection(pretrained_model_name_or_path=str(tmp_path)))


def test_code_from_a_repository_is_never_run(monkeypatch: pytest.MonkeyPatch, mini_base) -> None:
    seen = {}
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained

    def watch(name: str, **options: Any) -> Any:
        seen.update(options)
        return original(name, **options)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", watch)
    load_tokenizer(ModelSection(pretrained_model_name_or_path=str(mini_base)))
    assert seen["trust_remote_code"] is False


def test_telemetry_is_off() -> None:
    code = (
        "import hw3.training.trainer; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "True\n"


def test_scoring_imports_neither_pandas_nor_matplotlib_nor_collects_meanwhile() -> None:
    """Hundreds of files each; a sweep starts in seconds, and draws its picture when all is kept."""
    code = """
import gc, sys
from hw3.common.gc_control import uncollected
with uncollected():
    assert not gc.isenabled()
    import hw3.evaluation.evaluate
assert gc.isenabled()
import pyarrow
from hw3.evaluation.results import _column
print(_column(["甲", "b"], pyarrow.string()).to_pylist(), _column([1, 2], pyarrow.int64()).to_pylist())
print(_column([0.1, 2.5], pyarrow.float64()).to_pylist(), {"pandas", "matplotlib"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "['甲', 'b'] [1, 2]\n[0.1, 2.5] set()\n", done.stderr
