"""The division of a step's rows among processes."""

import pytest
from helpers import REPOSITORY

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.training.batch_layout import divide_batch


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("rows", "accumulation", "processes", "expected"),
    [(4, 2, 1, (4, 2)), (4, 2, 2, (4, 1)), (4, 2, 4, (2, 1)), (4, 2, 8, (1, 1)), (1, 8, 4, (1, 2)), (4, 3, 6, (2, 1))],
)
def test_divide_batch_reduces_accumulation_before_rows_per_device(
    rows: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    recipe = load_recipe(
        REPOSITORY / "recipes/tiny/qlora.yaml",
        [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={accumulation}"],
    )
    layout = divide_batch(recipe, processes)
    assert (layout.rows_per_device, layout.accumulation) == expected
    assert layout.processes * layout.rows_per_device * layout.accumulation == recipe.rows_per_step


def test_divide_batch_names_the_nearest_numbers_that_divide() -> None:
    recipe = load_recipe(REPOSITORY / "recipes/gemma/qlora.yaml")
    message = "cannot be divided among 3 processes; use 2 or 4 processes, or 6 or 9 rows per step"
    with pytest.raises(UserError, match=message):
        divide_batch(recipe, 3)
