"""Fixtures of the export tests."""

from pathlib import Path

import pytest
from helpers import hw3


@pytest.fixture(scope="session")
def exported(scored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of the mini recipe's run as a complete model."""
    folder = tmp_path_factory.mktemp("exported")
    hw3("export", scored_run, "--output", folder / "model")
    assert [path.name for path in folder.iterdir()] == ["model"]
    return folder / "model"
