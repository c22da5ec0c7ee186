"""Search spaces: Optuna's distributions by the recipe's keys, and the line of every mistake."""

from pathlib import Path

import pytest
from helpers import REPOSITORY
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hw3.common.errors import UserError
from hw3.search.space import load_space

SPACES = sorted((REPOSITORY / "recipes/search").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, trials: int | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_space(path, trials)
    return [problem.removeprefix(f"{path.parent}/") for problem in caught.value.problems]


def test_space_holds_optunas_distributions_and_the_recipes_values(tmp_path: Path) -> None:
    text = """
trials: 7
sampler: random
fixed:
  training.max_steps: 5
space:
  training.learning_rate:
    float: {low: 1e-4, high: 1, log: true}
  lora.lora_dropout:
    float: {low: 0.0, high: 0.2, step: 0.1}
  lora.r:
    int: {low: 4, high: 16, step: 4}
  lora.target_modules:
    categorical: [all-linear, [q_proj, v_proj]]
  prompt:
    categorical: [a.yaml, b.yaml]
"""
    space = load_space(write(tmp_path, text))
    assert (space.trials, space.sampler, space.pruner, space.seed) == (7, "random", "successive_halving", 0)
    assert space.fixed == {"training.max_steps": 5}
    assert space.distributions == {
        "training.learning_rate": FloatDistribution(1e-4, 1.0, log=True),
        "lora.lora_dropout": FloatDistribution(0.0, 0.2, step=0.1),
        "lora.r": IntDistribution(4, 16, step=4),
        "lora.target_modules": CategoricalDistribution(['"all-linear"', '["q_proj", "v_proj"]']),
        "prompt": CategoricalDistribution(["a.yaml", "b.yaml"]),
    }
    params = {
        "training.learning_rate": 0.01,
        "lora.lora_dropout": 0.1,
        "lora.r": 8,
        "lora.target_modules": '["q_proj", "v_proj"]',
        "prompt": "b.yaml",
    }
    assert space.decode(params) == params | {"lora.target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_space_of_the_project_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load_space(path).total_trials >= 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("space: {}\n", "space.yaml:1: space: found {}, expected the keys that vary"),
        (
            "space:\n  training.learning_rate:\n    float: {low: 0.0001, high: 1, step: 1.0e-300}\n",
            "space.yaml:3: space.training.learning_rate.float: found step 1e-300, expected a larger one",
        ),
        (
            "space:\n  lora.r:\n    int: {low: 4, high: 9, step: 2}\n",
            "space.yaml:3: space.lora.r.int: high is 9, expected low plus a multiple of the step, such as 8",
        ),
        (
            f"space:\n  lora.r:\n    categorical: {list(range(1, 20_001))}\n",
            "space.yaml:3: space.lora.r.categorical: found 20,000 values, expected at most 200",
        ),
        (
            "space:\n  lora.alpha_over_r:\n    categorical: [1, a]\n",
            'space.yaml:3: space.lora.alpha_over_r.categorical: found "a", expected a number above 0',
        ),
        (
            'space:\n  "data.eval ":\n    categorical: [a.json]\n',
            "space.yaml:2: space.data.eval : expected a recipe's key",
        ),
        (
            'space:\n  "training.seed=1":\n    categorical: [a.json]\n',
            "space.yaml:2: space.training.seed=1: expected a recipe's key",
        ),
        (
            "sampler: grid\nspace:\n  lora.r:\n    int: {low: 1, high: 1000000000000}\n",
            "space.yaml:2: space: the grid has 1,000,000,000,000 points, expected at most 100,000",
        ),
        (
            "sampler: grid\nspace:\n  lora.lora_dropout:\n    float: {low: 0.0, high: 1, step: 1.0e-12}\n",
            "space.yaml:2: space: the grid has 1,000,000,000,001 points, expected at most 100,000",
        ),
        (
            "trails: 3\nspace:\n  lora.r: {int: {low: 1, high: 2}}\n",
            "space.yaml:1: trails: no such key; did you mean trials?",
        ),
        (
            "trials: 1.5\nspace:\n  lora.r: {int: {low: 1, high: 2}}\n",
            "space.yaml:1: trials: found 1.5, expected a whole number",
        ),
        (
            "sampler: annealing\nspace:\n  lora.r: {int: {low: 1, high: 2}}\n",
            'space.yaml:1: sampler: found "annealing", expected one of tpe, random, grid',
        ),
        (
            "space:\n  lora.r:\n    integer: {low: 1, high: 2}\n",
            "space.yaml:3: space.lora.r.integer: no such distribution; did you mean int?",
        ),
        (
            "space:\n  lora.r:\n    int: {low: 1.5, high: 2}\n",
            "space.yaml:3: space.lora.r.int.low: found 1.5, expected a whole number",
        ),
        (
            'space:\n  training.learning_rate:\n    float: {low: "1", high: 2}\n',
            'space.yaml:3: space.training.learning_rate.float.low: found "1", expected a number',
        ),
        (
            "space:\n  lora.r:\n    int:\n      low: 8\n      high: 2\n",
            "space.yaml:3: space.lora.r.int: low is 8, above high, which is 2",
        ),
        (
            "space:\n  lora.r:\n    int: {low: 1, high: 8, log: true, step: 2}\n",
            "space.yaml:3: space.lora.r.int: Samplers and other components in Optuna only accept step is 1",
        ),
        (
            "space:\n  training.learning_rate:\n    float: {low: 0, high: 1, log: true}\n",
            "space.yaml:3: space.training.learning_rate.float: `low > 0` must hold for `log=True`",
        ),
        (
            "space:\n  training.learning_rate:\n    float: {low: 0.1, high: 1, logarithmic: true}\n",
            "space.yaml:3: space.training.learning_rate.float.logarithmic: no such key",
        ),
        ("space:\n  lora.r: [1, 2]\n", "space.yaml:2: space.lora.r: found [1, 2], expected one of float: …, int: …"),
        ("space:\n  lora.r:\n    categorical: 8\n", "space.yaml:3: space.lora.r.categorical: found 8, expected a list"),
        ("space:\n  lora.r:\n    categorical: [8, 8]\n", "space.yaml:3: space.lora.r.categorical: found 8 twice"),
        (
            "space:\n  data.eval:\n    categorical: [a.json, b.json]\n",
            "space.yaml:2: space.data.eval: cannot vary, because the scores of the trials could not be compared",
        ),
        (
            "fixed:\n  lora.r: 8\nspace:\n  lora.r:\n    categorical: [8, 4]\n",
            "space.yaml:2: fixed.lora.r: is in `space` too",
        ),
        (
            "fixed:\n  lora.lora_alpha: 8\nspace:\n  lora.alpha_over_r:\n    categorical: [1, 2]\n",
            "space.yaml:4: space.lora.alpha_over_r: determines lora.lora_alpha, which is set too",
        ),
        (
            "sampler: grid\nspace:\n  training.learning_rate:\n    float: {low: 0.1, high: 1}\n",
            "space.yaml:3: space.training.learning_rate: the sampler is grid, so it needs a step",
        ),
        (
            "space:\n  lora.r: {int: {low: 1, high: 2}}\n  lora.r: {int: {low: 1, high: 2}}\n",
            "space.yaml:3: space.lora.r: repeated key",
        ),
    ],
)
def test_mistake_in_a_space_is_reported_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems_of(write(tmp_path, text))
    assert problem.startswith(expected), problem


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    text = "trials: 0\nseed: x\nspace:\n  lora.r:\n    categorical: []\n"
    assert [problem.partition(": ")[0] for problem in problems_of(write(tmp_path, text))] == [
        "space.yaml:1", "space.yaml:2", "space.yaml:5",
    ]  # fmt: skip


def test_number_of_trials_on_the_command_line_must_be_positive(tmp_path: Path) -> None:
    path = write(tmp_path, "space:\n  lora.r: {int: {low: 1, high: 2}}\n")
    assert load_space(path, 3).total_trials == 3
    assert problems_of(path, 0) == ["--trials 0: expected 1 or more"]


def test_grid_has_all_values_and_no_more_trials_than_points(tmp_path: Path) -> None:
    text = """
sampler: grid
trials: 100
space:
  lora.lora_dropout:
    float: {low: 0.0, high: 0.3, step: 0.1}
  lora.r:
    int: {low: 4, high: 8, step: 2}
  training.lr_scheduler_type:
    categorical: [linear, cosine]
"""
    space = load_space(write(tmp_path, text))
    assert space.grid() == {
        "lora.lora_dropout": [0.0, 0.1, 0.2, 0.3],
        "lora.r": [4, 6, 8],
        "training.lr_scheduler_type": ["linear", "cosine"],
    }
    assert space.total_trials == 24
