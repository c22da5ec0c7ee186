"""Names of other tools are answered with the project's."""

import pytest
from helpers import REPOSITORY

from hw3.common.errors import UserError
from hw3.config.common_names import COMMON_NAMES
from hw3.config.recipe import load_recipe
from hw3.config.schema import SECTION_SCHEMAS

EXPECTED = {
    "training.lr": "learning_rate",
    "training.batch_size": "per_device_train_batch_size",
    "training.epochs": "num_train_epochs",
    "training.steps": "max_steps",
    "training.max_step": "max_steps",
    "training.grad_accum": "gradient_accumulation_steps",
    "training.warmup": "warmup_steps",
    "training.scheduler": "lr_scheduler_type",
    "lora.rank": "r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules",
    "quantization.load_4bit": "load_in_4bit",
    "training.max_seq_length": "data.max_length",
}


def test_every_suggested_name_exists_and_no_common_name_is_a_key() -> None:
    for section, names in COMMON_NAMES.items():
        for name, suggested in names.items():
            other_section, _, key = suggested.rpartition(".")
            assert key in SECTION_SCHEMAS[other_section or section].model_fields, suggested
            assert name not in SECTION_SCHEMAS[section].model_fields, name


def test_common_names_are_answered_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError) as error:
        load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml", [f"{key}=1" for key in EXPECTED])
    assert sorted(error.value.problems) == sorted(
        f"command line: {key}: no such key; did you mean {suggested}?" for key, suggested in EXPECTED.items()
    )
