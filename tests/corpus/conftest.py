"""Fixtures of the corpus tests."""

from pathlib import Path

import pytest
from sample_corpus import clone_files


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone of the made-up corpus."""
    folder = tmp_path_factory.mktemp("corpus") / "Classical-Modern"
    for name, data in clone_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
