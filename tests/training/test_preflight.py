"""What `hw3 check` prints."""

from pathlib import Path

import pytest

from hw3.config.recipe import load_recipe
from hw3.training.preflight import check_recipe


def test_check_recipe_estimates_no_time_on_a_cpu(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_recipe(load_recipe(mini_recipe), tmp_path / "run") == 0
    assert "extrapolated from" not in capsys.readouterr().out
