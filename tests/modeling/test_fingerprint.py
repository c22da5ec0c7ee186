"""Which base models and adapter configurations have the same hash."""

import contextlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hw3.config.schema import ModelSection
from hw3.modeling.fingerprint import _UNORDERED_SETTINGS, hash_adapter_config, hash_base_model


def test_hash_base_model_depends_on_the_hubs_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is the one in the cache that the recipe's revision points to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}", encoding="utf-8")

    def hash_of_main() -> str:
        return hash_base_model(ModelSection(pretrained_model_name_or_path="owner/name"))

    (repository / "refs/main").write_text(first, encoding="utf-8")
    hash_of_first = hash_of_main()
    (repository / "refs/main").write_text(second, encoding="utf-8")
    assert hash_of_main() != hash_of_first
    pinned = ModelSection(pretrained_model_name_or_path="owner/name", revision=first)
    assert hash_base_model(pinned) == hash_of_first


def test_hash_adapter_config_depends_on_settings_but_not_on_the_order_of_sets() -> None:
    settings = {"peft_type": "LORA", "target_modules": ["v_proj", "q_proj"], "trainable_token_indices": [5, 3]}

    def hash_with(**changes: object) -> str:
        return hash_adapter_config(json.dumps(settings | changes, indent=2).encode())

    assert hash_with(target_modules=["q_proj", "v_proj"]) == hash_with()
    others = [hash_with(target_modules=["q_proj"]), hash_with(trainable_token_indices=[3, 5]), hash_with(r=1)]
    assert len({hash_with(), *others}) == 4
    assert hash_adapter_config(b"not JSON") != hash_adapter_config(b"[]") != hash_with()


def test_unordered_settings_are_the_sets_of_pefts_configurations() -> None:
    sets = set()
    for config_class in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        for name in (field.name for field in fields(config_class) if "list" in str(field.type)):
            with contextlib.suppress(ValueError, TypeError, ImportError):  # other settings or packages are needed
                config = config_class(**{name: ["a"]})
                sets |= {key for key, value in vars(config).items() if isinstance(value, set) and value}
    assert sets == set(_UNORDERED_SETTINGS)
