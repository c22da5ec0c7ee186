"""Which base models have the same hash."""

from pathlib import Path

import pytest

from hw3.config.schema import ModelSection
from hw3.modeling.fingerprint import hash_base_model


def test_hash_base_model_depends_on_the_hubs_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is the one in the cache that the recipe's revision points to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")

    def hash_of_main() -> str:
        return hash_base_model(ModelSection(pretrained_model_name_or_path="owner/name"))

    (repository / "refs/main").write_text(first)
    hash_of_first = hash_of_main()
    (repository / "refs/main").write_text(second)
    assert hash_of_main() != hash_of_first
    pinned = ModelSection(pretrained_model_name_or_path="owner/name", revision=first)
    assert hash_base_model(pinned) == hash_of_first
