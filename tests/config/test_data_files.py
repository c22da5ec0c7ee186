"""The data files that a recipe names are checked together with its keys."""

from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.common.errors import UserError
from hw3.config.data_files import WAYS_TO_GET_DATA
from hw3.config.recipe import load_recipe

RECIPE = REPOSITORY / "recipes/tiny/qlora.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def load_problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_recipe(RECIPE, list(overrides), check_data_files=True)
    return error.value.problems


def test_missing_files_and_invalid_rows_are_reported_with_the_other_problems(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('[{"id": "1", "instruction": "a", "output": 2}]', encoding="utf-8")
    assert load_problems("speed=fast", "data.dev=none.json", f"data.eval={rows}") == [
        'command line: speed: found "fast", expected one of auto, plain, lean',
        "command line: data.dev: none.json: no such file",
        f"{rows}: row 1 (id 1): output is a number, expected text",
    ]


def test_missing_course_files_come_with_three_ways_to_get_data() -> None:
    first, heading, *ways = load_problems("data.train=data/homework/none.json")
    assert first == "command line: data.train: data/homework/none.json: no such file"
    assert heading == "Three ways to get data:" and len(ways) == len(WAYS_TO_GET_DATA) == 3
    assert ways[2].endswith("make train MODEL=tiny TRAIN=data/train.json EVAL=data/eval.json")


def test_dev_fraction_that_leaves_no_training_rows_is_reported(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('[{"id": "1", "instruction": "a", "output": "b"}]', encoding="utf-8")
    assert load_problems(f"data.train={rows}", "data.dev_fraction=0.1") == [
        f"command line: data.dev_fraction: found 0.1, which leaves no training rows of {rows}; set a smaller one"
    ]


def test_recipe_loads_without_its_data_files_unless_they_are_to_be_checked() -> None:
    assert load_recipe(RECIPE, ["data.eval=none.json"]).data.eval == "none.json"
