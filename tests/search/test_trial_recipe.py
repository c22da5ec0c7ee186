"""The recipes of trials: settings as overrides of `hw3 train`, derived keys, and mistakes found at the borders."""

from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe, load_recipe
from hw3.search.space import load_space
from hw3.search.trial_recipe import TrialRecipes, check_corners, list_corners


def recipes_of(recipe: Path, folder: Path, space: str, *overrides: str) -> TrialRecipes:
    path = folder / "space.yaml"
    path.write_text(space, encoding="utf-8")
    return TrialRecipes(recipe, load_space(path), list(overrides))


def test_settings_are_the_overrides_of_hw3_train(mini_recipe: Path, space_file: Path) -> None:
    recipes = TrialRecipes(mini_recipe, load_space(space_file), ["training.seed=5"])
    settings = {"training.learning_rate": 0.02, "lora.r": 4, "lora.alpha_over_r": 2}
    assert recipes.to_overrides(settings) == ["training.learning_rate=0.02", "lora.r=4", "lora.lora_alpha=8"]
    assert recipes.all_overrides(settings) == [
        "evaluation.during_training=true",
        "training.max_steps=4",
        "training.save_steps=1",
        "training.seed=5",
        "training.learning_rate=0.02",
        "lora.r=4",
        "lora.lora_alpha=8",
    ]
    assert recipes.load(settings).to_dict() == load_recipe(mini_recipe, recipes.all_overrides(settings)).to_dict()


def test_alpha_over_r_without_r_in_the_space_uses_the_recipes(mini_recipe: Path, tmp_path: Path) -> None:
    recipes = recipes_of(mini_recipe, tmp_path, "space:\n  lora.alpha_over_r: {categorical: [0.5, 0.3]}\n")
    assert recipes.to_overrides({"lora.alpha_over_r": 0.5}) == ["lora.lora_alpha=2"]  # the recipe's r is 4
    (override,) = recipes.to_overrides({"lora.alpha_over_r": 0.3})
    assert float(override.removeprefix("lora.lora_alpha=")) == pytest.approx(1.2)
    assert (
        recipes_of(mini_recipe, tmp_path, "space:\n  lora.alpha_over_r: {categorical: [2]}\n", "lora.r=16")
        .load({"lora.alpha_over_r": 2})
        .lora["lora_alpha"]
        == 32
    )


def test_prompt_files_and_lists_of_modules_can_vary(mini_recipe: Path, tmp_path: Path) -> None:
    space = """
space:
  prompt: {categorical: [recipes/prompts/bare.yaml, recipes/prompts/study.yaml]}
  lora.target_modules: {categorical: [all-linear, [q_proj, v_proj]]}
"""
    space = space.replace("recipes/", f"{REPOSITORY}/recipes/")
    recipes = recipes_of(mini_recipe, tmp_path, space)
    recipe = recipes.load(list(list_corners(recipes.space))[-1])
    assert recipe.prompt == load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml").prompt
    assert recipe.lora["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("space", sorted((REPOSITORY / "recipes/search").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_at_the_borders_of_the_projects_spaces_are_valid(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    recipes = TrialRecipes(Path(f"recipes/{space.stem}/qlora.yaml"), load_space(space), [])
    for settings in list_corners(recipes.space):
        recipe = recipes.load(settings)
        assert recipe.data.dev_fraction is not None and recipe.evaluation.during_training


def test_corners_are_all_ends_of_all_keys(space_file: Path) -> None:
    corners = [tuple(settings.values()) for settings in list_corners(load_space(space_file))]
    assert corners == [(0.001, 2, 1), (0.1, 2, 1), (0.001, 4, 1), (0.001, 2, 2), (0.1, 4, 2)]


@pytest.mark.parametrize(
    ("space", "overrides", "expected"),
    [
        ("  lora.rank: {int: {low: 1, high: 2}}\n", [], ":2: space: lora.rank: no such key; did you mean r?"),
        ("  lorra.r: {int: {low: 1, high: 2}}\n", [], ":2: space: lorra: no such section; did you mean lora?"),
        ("  lora.r: {float: {low: 1, high: 2}}\n", [], ":2: space: lora.r: found 1.0, expected a whole number"),
        ("  lora.r: {int: {low: 0, high: 2}}\n", [], ":2: space: lora.r: found 0, expected a number greater than"),
        (
            "  training.lr_scheduler_type:\n    categorical: [linear, cosin]\n",
            [],
            ':2: space: training.lr_scheduler_type: found "cosin", expected one of',
        ),
        ("  prompt:\n    categorical: [no/such.yaml]\n", [], ":2: space: prompt: no/such.yaml:"),
        (
            "  training.output_dir:\n    categorical: [a]\n",
            [],
            ":2: space: training.output_dir: cannot be set in a recipe",
        ),
        ("  lora.r: {int: {low: 1, high: 2}}\nfixed:\n  lora.alpha: 3\n", [], ":4: fixed: lora.alpha: no such key"),
        (
            "  lora.alpha_over_r: {int: {low: 1, high: 2}}\n  lora.r:\n    categorical: [a, b]\n",
            [],
            ':3: space: lora.r: found "a", expected a whole number',
        ),
        ("  lora.r: {int: {low: 1, high: 2}}\n", ["lora.r=3"], "command line: lora.r: varies in the space, "),
    ],
)
def test_mistake_in_a_recipe_of_the_space_has_the_spaces_line(
    mini_recipe: Path, tmp_path: Path, space: str, overrides: list[str], expected: str
) -> None:
    recipes = recipes_of(mini_recipe, tmp_path, f"space:\n{space}", *overrides)
    with pytest.raises(UserError) as caught:
        check_corners(recipes)
    assert caught.value.problems[0].removeprefix(f"{tmp_path}/space.yaml").startswith(expected), caught.value.problems


def test_keys_that_decide_the_dev_rows_cannot_vary(mini_recipe: Path, tmp_path: Path) -> None:
    space = "space:\n  training.seed: {int: {low: 1, high: 3}}\n"
    check_corners(recipes_of(mini_recipe, tmp_path, space))
    with pytest.raises(UserError, match=r"space.yaml:2: space: training.seed: decides which rows data.dev_fraction"):
        check_corners(recipes_of(mini_recipe, tmp_path, space, "data.dev_fraction=0.2"))


def test_further_check_of_a_corner_names_its_settings(mini_recipe: Path, space_file: Path) -> None:
    def check(recipe: Recipe) -> None:
        if recipe.lora["r"] == 4:
            raise UserError("too large")

    with pytest.raises(UserError) as caught:
        check_corners(TrialRecipes(mini_recipe, load_space(space_file), []), check)
    assert caught.value.problems == [
        "too large; with training.learning_rate=0.001, lora.r=4, lora.lora_alpha=4",
        "too large; with training.learning_rate=0.1, lora.r=4, lora.lora_alpha=8",
    ]
