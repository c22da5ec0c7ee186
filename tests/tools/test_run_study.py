"""`tools/run_study.py`: the plan's runs, their tasks, and that a run is that of `hw3 train` and `hw3 eval`."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import REPOSITORY, hw3
from run_study import Part, collect, describe_cost, list_tasks, record_file, run_task
from study.plan import StudyPlan, divide_into_tasks, held_out_file, read_plan, train_file, write_data

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def mini_plan(tmp_path: Path, mini_recipe: Path) -> StudyPlan:
    """Two experiments with the mini recipe; one of their runs is the same."""
    content = {
        "models": {
            "mini": {
                "recipe": str(mini_recipe),
                "held_out_rows": 6,
                "steps_per_task": 24,
                "gpu": [],
                "prompts": ["bare"],
            }
        },
        "experiments": [
            {"name": "recipe", "model": "mini", "seeds": [7]},
            {"name": "data", "model": "mini", "seeds": [7, 8], "grid": {"train_share": ["1/2", 1]}},
        ],
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return read_plan(path)


def test_plan_has_100_runs_of_the_embedded_model_and_20_of_smollm2() -> None:
    plan = read_plan()
    models = [run.model.name for run in plan.runs]
    assert models.count("tiny") >= 100
    assert models.count("smollm2") >= 20
    assert len({run.id for run in plan.runs}) == len(plan.runs)


def test_every_run_of_the_plan_is_a_valid_recipe() -> None:
    for run in read_plan().runs:
        recipe = run.load_recipe(Path("data"), on_gpu=True)
        assert recipe.training["max_steps"] == run.steps
        assert recipe.seed == run.seed
        assert recipe.training["bf16"] is True


def test_alpha_follows_the_rank() -> None:
    runs = [run for run in read_plan().runs if run.settings == {"lora.r": 64, "alpha_over_r": 0.25}]
    assert [run.load_recipe(Path("data"), on_gpu=True).lora["lora_alpha"] for run in runs] == [16] * 5


def test_equal_settings_of_two_experiments_are_one_run(mini_plan: StudyPlan) -> None:
    assert [(run.settings, run.seed, run.experiments) for run in mini_plan.runs] == [
        ({}, 7, ["recipe", "data"]),
        ({"train_share": "1/2"}, 7, ["data"]),
        ({"train_share": "1/2"}, 8, ["data"]),
        ({}, 8, ["data"]),
    ]


def test_tasks_share_a_captured_step_and_have_few_steps() -> None:
    tasks = divide_into_tasks(read_plan().runs)
    assert sum(map(len, tasks)) == len(read_plan().runs)
    for task in tasks:
        assert len({run.group for run in task}) == 1
        assert len(task) == 1 or sum(run.steps for run in task) <= task[0].model.steps_per_task


def test_held_out_rows_are_whole_passages_and_shares_are_nested(tmp_path: Path) -> None:
    plan = read_plan()
    write_data(tmp_path, plan)
    tiny = plan.models["tiny"]
    held_out = [row.id for row in read_rows(held_out_file(tmp_path, tiny))]
    half, all_rows = ([row.id for row in read_rows(train_file(tmp_path, tiny, share))] for share in ("1/2", 1))
    assert (len(held_out), len(half), len(all_rows)) == (144, 246, 492)
    assert not {row_id[:-4] for row_id in held_out} & {row_id[:-4] for row_id in all_rows}
    assert half == all_rows[:246]


def test_a_run_of_the_study_is_that_of_hw3_train_and_hw3_eval(tmp_path: Path, mini_plan: StudyPlan) -> None:
    write_data(tmp_path / "data", mini_plan)
    (tmp_path / "runs").mkdir()
    [run] = [run for run in mini_plan.runs if run.settings == {"train_share": "1/2"} and run.seed == 8]
    first = mini_plan.runs[0]  # another run before it, in the same session
    assert "2 of 2 runs" in run_task([first, run], tmp_path, Part(time.time(), time.time() + 1000), False, [])
    record = json.loads(record_file(tmp_path, run).read_text(encoding="utf-8"))

    recipe = run.load_recipe(tmp_path / "data", on_gpu=False)
    path = tmp_path / "alone.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    hw3("train", path, "--run", tmp_path / "alone")
    hw3("eval", tmp_path / "alone", "--data", recipe.data.eval)
    [results] = (tmp_path / "alone/eval").glob("*/results.json")
    scores = {
        entry["step"]: entry["mean_perplexity"]
        for entry in json.loads(results.read_text(encoding="utf-8"))["entries"]
        if entry["step"]
    }
    found = {point["step"]: point["eval"]["mean_perplexity"] for point in record["curve"]}
    assert found == pytest.approx(scores, abs=1e-5)
    assert list(found) == [4, 8, 12]


def test_a_stopped_study_resumes_with_the_missing_runs(tmp_path: Path, mini_plan: StudyPlan) -> None:
    write_data(tmp_path / "data", mini_plan)
    (tmp_path / "runs").mkdir()
    assert "no time left" in run_task(mini_plan.runs, tmp_path, Part(time.time() - 600, time.time()), False, [])
    done, *missing = mini_plan.runs
    point = {"step": 4, "eval": {}, "held_out": {}}
    record = {"seconds": {"train": 30.0}, "steps": 12, "device": "CPU", "curve": [point], "best_step": 4}
    record_file(tmp_path, done).write_text(json.dumps(record), encoding="utf-8")
    np.savez(tmp_path / "runs" / f"{done.id}.npz", eval=np.array([[2.0, 3.0]]))
    assert [run.id for task in list_tasks(mini_plan, tmp_path, []) for run in task] == [
        missing[2].id,
        missing[0].id,
        missing[1].id,
    ]
    table = describe_cost(mini_plan, tmp_path, on_gpu=False).splitlines()
    assert table[1].split() == ["mini", "recipe", "1", "1", "12", "0.0"]
    assert table[2].split() == ["mini", "data", "3", "0", "36", "1.5"]
    assert table[3].startswith("about 2 minutes of one process are left")
    *same_table, note = describe_cost(mini_plan, tmp_path, on_gpu=True).splitlines()
    assert same_table == table
    assert note == "no run of mini has finished on a GPU: minutes are those on a CPU, where known"
    assert collect(mini_plan, tmp_path, tmp_path / "kept") == 1
    [kept] = json.loads((tmp_path / "kept/runs.json").read_text(encoding="utf-8"))["runs"]
    assert kept["experiments"] == ["recipe", "data"]
    with np.load(tmp_path / "kept/rows.npz") as rows:
        assert rows[f"{done.id}/eval"].tolist() == [2.0, 3.0]


def test_a_run_starts_if_it_ends_in_time_or_fits_no_part() -> None:
    now = time.time()
    fresh, half_over = Part(now, now + 570), Part(now - 300, now + 270)
    assert fresh.has_time(500)
    assert not half_over.has_time(500)
    assert half_over.has_time(200)
    assert fresh.has_time(3600)
    assert not half_over.has_time(3600)


def test_plan_names_only_prompts_that_exist() -> None:
    for model in read_plan().models.values():
        assert load_recipe(model.recipe).prompt.system
        assert all(Path(f"recipes/prompts/{name}.yaml").is_file() for name in model.prompts)


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_the_studys_settings_are_those_of_study_yaml(model: str) -> None:
    recipe = load_recipe(Path(f"recipes/{model}/study.yaml"))
    runs = [run for run in read_plan().runs if run.model.name == model and "study" in run.experiments]
    assert len(runs) == 3
    for run in runs:
        planned = run.load_recipe(Path("data"), on_gpu=False)
        assert planned.lora == recipe.lora
        for key in ("learning_rate", "lr_scheduler_type", "max_grad_norm", "weight_decay", "optim"):
            assert planned.training[key] == recipe.training[key]
        assert planned.training.get("warmup_steps", 0) == recipe.training.get("warmup_steps", 0)
        assert planned.rows_per_step == recipe.rows_per_step
