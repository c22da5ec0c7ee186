"""The sections that are made from the libraries' configuration classes."""

import dataclasses

import pytest
from helpers import REPOSITORY
from trl import SFTConfig

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.config.schema import RESERVED_TRAINING_KEYS, LoraSection, TrainingSection


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_every_reserved_key_exists_in_sft_config_and_is_refused() -> None:
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(RESERVED_TRAINING_KEYS) <= names
    assert not set(RESERVED_TRAINING_KEYS) & set(TrainingSection.model_fields)
    assert {"r", "lora_alpha", "use_rslora", "use_dora"} <= set(LoraSection.model_fields)
    path = REPOSITORY / "recipes/tiny/qlora.yaml"
    for key in sorted(RESERVED_TRAINING_KEYS):
        with pytest.raises(UserError) as error:
            load_recipe(path, [f"training.{key}=1"])
        (problem,) = error.value.problems
        assert problem.startswith(f"command line: training.{key}: cannot be set in a recipe: ")
