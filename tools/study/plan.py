"""Read docs/study/plan.yaml: which runs the study consists of, and what they cost."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hw3.common.atomic_io import write_json
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import Row, read_rows

PLAN_FILE = Path("docs/study/plan.yaml")
RECORDS_FILE = Path("docs/study/runs.json")
SPLIT_SEED = 0  # of the held-out rows, and of shares of the training rows
# As hw3's defaults; the study keeps scores in its own files, and shares a GPU among several processes.
_FIXED = ("training.report_to=none", "training.logging_steps=20", "evaluation.tokens_per_batch=16384")


@dataclass(frozen=True)
class StudyModel:
    """A base model of the study.

    Attributes:
        name: its name.
        recipe: the recipe that all its runs start from.
        held_out_rows: number of training rows that are scored and never trained on.
        steps_per_task: most steps of the runs that one process trains after another, unless one run has more.
        gpu: overrides on a GPU.
        prompts: names of the prompts that are compared.
        base: folder of the base model, if it is not the recipe's.
    """

    name: str
    recipe: Path
    held_out_rows: int
    steps_per_task: int
    gpu: list[str]
    prompts: list[str]
    base: str | None = None


@dataclass
class StudyRun:
    """One run of the study.

    Attributes:
        model: its base model.
        settings: what differs from the model's recipe, by key.
        seed: seed of the row order and of the adapter.
        experiments: names of the experiments that it belongs to.
        scores: what is scored beside the learning curve.
    """

    model: StudyModel
    settings: dict[str, Any]
    seed: int
    experiments: list[str] = field(default_factory=list)
    scores: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        """Name of the run's record; it depends on settings and seed."""
        text = json.dumps([self.settings, self.seed], sort_keys=True)
        return f"{self.model.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def group(self) -> str:
        """What must be equal in runs that share a captured step."""
        keys = ("lora.r", "alpha_over_r", "rows_per_step", "quantization", "prompt")
        return json.dumps([self.model.name, {key: self.settings[key] for key in keys if key in self.settings}])

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.settings.get("training.max_steps", recipe_values(self.model.recipe)["training.max_steps"])

    def load_recipe(self, folder: Path, *, on_gpu: bool, extra: Iterable[str] = ()) -> Recipe:
        """Return the run's recipe, checked.

        Args:
            folder: where the files of `write_data` are.
            on_gpu: whether it is trained on a GPU.
            extra: more overrides.
        """
        base = [] if self.model.base is None else [f"model.pretrained_model_name_or_path={self.model.base}"]
        overrides = list(_to_overrides(self.settings, recipe_values(self.model.recipe)))
        data = [
            f"data.train={train_file(folder, self.model, self.settings.get('train_share', 1))}",
            f"data.dev={held_out_file(folder, self.model)}",
        ]
        device = self.model.gpu if on_gpu else []
        return load_recipe(
            self.model.recipe, [*_FIXED, *device, *base, *data, *overrides, f"training.seed={self.seed}", *extra]
        )


@dataclass(frozen=True)
class StudyPlan:
    """The study's models and runs; the most important runs come first."""

    path: Path
    models: dict[str, StudyModel]
    runs: list[StudyRun]


def divide_into_tasks(runs: Iterable[StudyRun]) -> list[list[StudyRun]]:
    """Divide runs into tasks for processes: equal `StudyRun.group`, and at most `steps_per_task` steps."""
    groups: dict[str, list[StudyRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    tasks = []
    for group in groups.values():
        # The first run has all training rows, so that the captured step has all lengths.
        group.sort(key=lambda run: "train_share" in run.settings)
        task: list[StudyRun] = []
        for run in group:
            if task and sum(run.steps for run in task) + run.steps > run.model.steps_per_task:
                tasks.append(task)
                task = []
            task.append(run)
        tasks.append(task)
    return tasks


def read_plan(path: Path = PLAN_FILE) -> StudyPlan:
    """Read the plan. Runs of several experiments with the same settings and seed become one run."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    models = {
        name: StudyModel(name=name, **{**values, "recipe": Path(values["recipe"])})
        for name, values in content["models"].items()
    }
    runs: dict[str, StudyRun] = {}
    for experiment in content["experiments"]:
        model = models[experiment["model"]]
        defaults = recipe_values(model.recipe)
        for case, seed in itertools.product(_list_cases(experiment), experiment["seeds"]):
            settings = {key: value for key, value in case.items() if value != defaults.get(key, _MISSING)}
            new = StudyRun(model, settings, seed)
            run = runs.setdefault(new.id, new)
            run.experiments.append(experiment["name"])
            run.scores |= set(experiment.get("scores", []))
    return StudyPlan(path, models, list(runs.values()))


_MISSING = object()


def _list_cases(experiment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    grid = experiment.get("grid", {})
    for values in itertools.product(*grid.values()):
        for case in experiment.get("cases", [{}]):
            yield {**experiment.get("settings", {}), **dict(zip(grid, values, strict=True)), **case}


@cache
def recipe_values(path: Path) -> dict[str, Any]:
    """Return the values of a recipe by the keys of the plan, so that equal settings are one run."""
    recipe = load_recipe(path)
    assert recipe.lora is not None, "the study trains adapters"
    values = {f"training.{key}": value for key, value in recipe.training.items()}
    values |= {f"lora.{key}": value for key, value in recipe.lora.items()}
    return values | {
        "alpha_over_r": recipe.lora["lora_alpha"] / recipe.lora["r"],
        "rows_per_step": recipe.rows_per_step,
        "quantization": "nf4",
        "train_share": 1,
        "prompt": "study",
    }


def _to_overrides(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield a run's settings as overrides of a recipe with the values `defaults`."""
    rank, alpha_over_r = (settings.get(key, defaults[key]) for key in ("lora.r", "alpha_over_r"))
    yield f"lora.lora_alpha={rank * alpha_over_r:g}"
    for key, value in settings.items():
        if key == "rows_per_step":
            yield f"training.per_device_train_batch_size={value}"
            yield "training.gradient_accumulation_steps=1"
        elif key == "prompt":
            yield f"prompt=recipes/prompts/{value}.yaml"
        elif key not in ("train_share", "alpha_over_r"):
            yield f"{key}={'null' if value is None else value}"


def train_file(folder: Path, model: StudyModel, share: object) -> Path:
    """Return the path of the training rows, or of a share of them."""
    fraction = Fraction(str(share))
    name = "train" if fraction == 1 else f"train-{fraction.numerator}-of-{fraction.denominator}"
    return folder / model.name / f"{name}.json"


def held_out_file(folder: Path, model: StudyModel) -> Path:
    """Return the path of the held-out rows."""
    return folder / model.name / "held_out.json"


def write_data(folder: Path, plan: StudyPlan) -> None:
    """Divide each model's training file into held-out rows and training rows, and write shares of the latter.

    Rows whose ids differ only in the direction, such as `essays-001-m2c` and `essays-001-c2m`, stay together. Shares
    are nested: an eighth contains the sixteenth.
    """
    for model in plan.models.values():
        source = Path(load_recipe(model.recipe).data.train)
        if not source.is_file() or held_out_file(folder, model).is_file():
            continue
        passages: dict[str, list[Row]] = {}
        for row in read_rows(source):
            passages.setdefault(row.id.removesuffix("-m2c").removesuffix("-c2m"), []).append(row)
        groups = sorted(passages.values(), key=lambda rows: rows[0].id)
        random.Random(SPLIT_SEED).shuffle(groups)
        held_out: list[Row] = []
        while len(held_out) < model.held_out_rows:
            held_out += groups.pop()
        rows = [row for group in groups for row in group]
        shares = {run.settings.get("train_share", 1) for run in plan.runs if run.model is model}
        for share in {1, *shares}:
            _write_rows(train_file(folder, model, share), rows[: round(len(rows) * Fraction(str(share)))])
        _write_rows(held_out_file(folder, model), held_out)


def _write_rows(path: Path, rows: list[Row]) -> None:
    write_json(path, [{"id": row.id, "instruction": row.instruction, "output": row.output} for row in rows])
