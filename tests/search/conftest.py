"""Fixtures of the tests of a search."""

from pathlib import Path

import pytest
from sample_search import write_space


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    """Return a space with four trials of four steps."""
    return write_space(tmp_path)
