"""Every combination of data file, prompt, number of few-shot examples and model is one task; equal ones only once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hw3.config.recipe import Recipe, load_recipe
from hw3.data.prompt import Example
from hw3.data.rows import Row
from hw3.evaluation.results import EvalResults
from hw3.evaluation.tasks import EvalDataset, EvalTask, NamedPrompt, group_by_checkpoint, list_tasks
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.identity import ModelIdentity

EXAMPLES = [Example(instruction="甲", output="乙"), Example(instruction="丙", output="丁")]
CHECKPOINTS = [
    Checkpoint(
        step=step, path=Path(f"run/checkpoint-{step}"), sha256=str(step), resumable=False, name=f"checkpoint-{step}"
    )
    for step in (10, 20)
]
IDENTITY = ModelIdentity("base", "tokenizer", "float32", "eager", None, False)


@pytest.fixture
def recipe(mini_recipe: Path) -> Recipe:
    return load_recipe(mini_recipe)


@pytest.fixture
def make_tasks(make_results: Callable[..., EvalResults], recipe: Recipe) -> Callable[..., list[EvalTask]]:
    """Return a function that lists tasks on one data file."""

    def make(prompts: list[NamedPrompt], shots: list[int], checkpoints: list[Checkpoint]) -> list[EvalTask]:
        dataset = EvalDataset(Path("eval.json"), [Row("1", "問", "答")], make_results("eval.json"))
        return list_tasks(
            [dataset], prompts, shots, checkpoints, recipe=recipe, identity=IDENTITY, examples_source="prompt"
        )

    return make


def test_list_tasks_combines_prompts_shots_and_models(
    make_tasks: Callable[..., list[EvalTask]], recipe: Recipe
) -> None:
    own = recipe.prompt.model_copy(update={"examples": EXAMPLES})
    bare = recipe.prompt.model_copy(update={"system": None, "examples": EXAMPLES})
    tasks = make_tasks([NamedPrompt("own", own), NamedPrompt("bare", bare)], [0, 2], CHECKPOINTS[:1])
    assert [(task.prompt_name, len(task.examples), task.title) for task in tasks] == [
        ("own", 0, "base"),
        ("own", 0, "checkpoint-10"),
        ("own", 2, "base"),
        ("own", 2, "checkpoint-10"),
        ("bare", 0, "base"),
        ("bare", 0, "checkpoint-10"),
        ("bare", 2, "base"),
        ("bare", 2, "checkpoint-10"),
    ]
    assert len({task.entry_key for task in tasks}) == 8
    # All checkpoints share the encoded rows of a prompt.
    assert len({task.encoding_key for task in tasks}) == 4


def test_list_tasks_lists_prompts_that_differ_only_in_hidden_examples_once(
    make_tasks: Callable[..., list[EvalTask]], recipe: Recipe
) -> None:
    other = recipe.prompt.model_copy(update={"examples": EXAMPLES})
    (task,) = make_tasks([NamedPrompt("own", recipe.prompt), NamedPrompt("other", other)], [0, 0], [])
    assert task.prompt_name == "own"


def test_group_by_checkpoint_puts_the_base_model_first(
    make_tasks: Callable[..., list[EvalTask]], recipe: Recipe
) -> None:
    prompt = recipe.prompt.model_copy(update={"examples": EXAMPLES})
    tasks = make_tasks([NamedPrompt("own", prompt)], [0, 1], CHECKPOINTS)
    assert [(task.title, len(task.examples)) for task in group_by_checkpoint(tasks)] == [
        ("base", 0),
        ("base", 1),
        ("checkpoint-10", 0),
        ("checkpoint-10", 1),
        ("checkpoint-20", 0),
        ("checkpoint-20", 1),
    ]
