"""The arguments of `hw3 search`, and folders that a run and a search cannot share."""

import argparse
from pathlib import Path

import pytest

from hw3.cli.first_checks import check_training_arguments
from hw3.cli.search_command import check_search_arguments
from hw3.common.errors import UserError

SPACE = "space:\n  lora.r:\n    categorical: [2, 4]\n"


def test_search_cannot_be_written_into_a_run(mini_recipe: Path, tmp_path: Path) -> None:
    space, folder = tmp_path / "space.yaml", tmp_path / "run"
    space.write_text(SPACE)
    folder.mkdir()
    arguments = argparse.Namespace(
        recipe=mini_recipe, space=space, trials=None, workers=1, output=folder, overrides=[], role=None
    )
    assert check_search_arguments(arguments)[1] == folder
    (folder / "recipe.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        check_search_arguments(arguments)
    assert caught.value.problems == [
        f"{folder}: holds a run; give a search another folder: --output DIR (make: OUTPUT=DIR)"
    ]


def test_run_cannot_be_written_into_a_search(mini_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "search.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        check_training_arguments(mini_recipe, [], folder)
    assert caught.value.problems == [f"{folder}: holds a search; give a run another folder: --run DIR (make: RUN=DIR)"]
