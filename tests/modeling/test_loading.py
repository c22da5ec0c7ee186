"""Loading of models: one message with the fix for each reason that a model is not available."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoTokenizer

from hw3.common.errors import UserError
from hw3.config.schema import ModelSection
from hw3.modeling.loading import load_model_config, load_tokenizer

RESPONSE = SimpleNamespace(status_code=403, headers={}, request=None)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            GatedRepoError("gated", response=RESPONSE),
            "some/model is gated: accept its license on https://huggingface.co/",
        ),
        (RepositoryNotFoundError("none", response=RESPONSE), "neither a local folder nor a model on the Hub"),
        (RevisionNotFoundError("none", response=RESPONSE), "model.revision: some/model has no such revision"),
        (ConnectionError("offline"), "is not in the local cache and the Hub cannot be reached"),
        (OSError(28, "No space left on device", "/cache/model.safetensors"), "No space left on device: /cache/"),
    ],
)
def test_load_model_config_reports_the_cause_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, message: str
) -> None:
    def refuse(*names: Any, **options: Any) -> None:
        if isinstance(cause, OSError) and cause.errno:
            raise cause
        raise OSError("could not be loaded") from cause

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UserError) as error:
        load_model_config(ModelSection(pretrained_model_name_or_path="some/model"))
    (problem,) = error.value.problems
    assert message in problem


def test_load_model_config_refuses_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}', encoding="utf-8")
    with pytest.raises(UserError, match="model type"):
        load_model_config(ModelSection(pretrained_model_name_or_path=str(tmp_path)))


def test_load_tokenizer_never_runs_code_of_a_repository(monkeypatch: pytest.MonkeyPatch, mini_base: Path) -> None:
    seen_options = {}
    from_pretrained = AutoTokenizer.from_pretrained

    def record_options(name: str, **options: Any) -> Any:
        seen_options.update(options)
        return from_pretrained(name, **options)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", record_options)
    load_tokenizer(ModelSection(pretrained_model_name_or_path=str(mini_base)))
    assert seen_options["trust_remote_code"] is False
