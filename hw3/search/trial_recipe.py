"""The recipe of a trial: the search's recipe with the trial's settings as overrides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import ProblemCollector, UserError
from hw3.config.recipe import Recipe, load_recipe
from hw3.search.space import ALPHA_OVER_R, SearchSpace

# The real metric prunes trials, so checkpoints are scored while a trial trains.
_ALWAYS = ("evaluation.during_training=true",)


@dataclass(frozen=True)
class TrialRecipes:
    """Builds the recipes of a search's trials.

    Attributes:
        path: the recipe's file.
        space: the search space.
        overrides: `section.key=value` assignments from the command line.
    """

    path: Path
    space: SearchSpace
    overrides: list[str]

    def load_base(self) -> Recipe:
        """Load the recipe that all trials share, with the space's fixed values.

        Raises:
            UserError: the recipe or a fixed value is wrong.
        """
        return self._load([], check_data_files=True)

    def load(self, settings: Mapping[str, Any]) -> Recipe:
        """Load the recipe of a trial.

        Args:
            settings: the trial's values by key.

        Raises:
            UserError: the recipe is invalid with these values.
        """
        return self._load(self.to_overrides(settings))

    def to_overrides(self, settings: Mapping[str, Any]) -> list[str]:
        """Return a trial's settings as assignments for `hw3 train`."""
        values = dict(settings)
        if ALPHA_OVER_R in values:
            r = values["lora.r"] if "lora.r" in values else (self._load([]).lora or {}).get("r", 8)
            ratio = values.pop(ALPHA_OVER_R)
            if isinstance(r, int | float):  # else loading the recipe reports r
                alpha = ratio * r
                values["lora.lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]

    def all_overrides(self, settings: Mapping[str, Any]) -> list[str]:
        """Return all assignments with which `hw3 train` trains a trial's run."""
        return [*_ALWAYS, *self._fixed(), *self.overrides, *self.to_overrides(settings)]

    def _fixed(self) -> list[str]:
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.space.fixed.items()]

    def _load(self, trial_overrides: list[str], *, check_data_files: bool = False) -> Recipe:
        overrides = [*_ALWAYS, *self._fixed(), *self.overrides, *trial_overrides]
        try:
            return load_recipe(self.path, overrides, check_data_files=check_data_files)
        except UserError as error:
            raise UserError(*map(self._locate, error.problems)) from error

    def _locate(self, problem: str) -> str:
        """Return a problem of an assignment with the line of the space that it comes from."""
        prefix, _, rest = problem.partition(": ")
        key = rest.partition(":")[0]
        if prefix != "command line":
            return problem
        if key.startswith("lora.lora_alpha") and ALPHA_OVER_R in self.space.parameters:
            key = ALPHA_OVER_R
        for section, keys in (("space", self.space.parameters), ("fixed", self.space.fixed)):
            for own in keys:
                if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
                    return f"{self.space.document.locate((section, own))}: {section}: {rest}"
        return problem


def list_corners(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """Yield settings at the borders of a space: all lowest, all highest, and each end of a key with others lowest."""
    extremes = {key: parameter.extremes() for key, parameter in space.parameters.items()}
    lowest = {key: values[0] for key, values in extremes.items()}
    yield lowest
    for key, values in extremes.items():
        for value in values[1:]:
            yield lowest | {key: value}
    yield {key: values[-1] for key, values in extremes.items()}


def check_corners(recipes: TrialRecipes, check: Callable[[Recipe], object] | None = None) -> None:
    """Check the recipes at the borders of the space.

    Args:
        recipes: the recipes of the search.
        check: a further check of a valid recipe, which raises a `UserError`.

    Raises:
        UserError: lists the problems of all of them, each once.
    """
    found = ProblemCollector()
    _check_overrides(recipes, found)
    _check_dev_rows(recipes, found)
    for settings in list_corners(recipes.space):
        recipe = found.collect(recipes.load, settings)
        if recipe is not None and check is not None:
            try:
                check(recipe)
            except UserError as error:
                described = ", ".join(recipes.to_overrides(settings))
                found.problems += [f"{problem}; with {described}" for problem in error.problems]
    found.raise_problems()


def _check_dev_rows(recipes: TrialRecipes, found: ProblemCollector) -> None:
    """Add a problem if the rows that `data.dev_fraction` takes would differ between trials."""
    base = found.collect(recipes.load_base)
    if base is None or base.data.dev_fraction is None:
        return
    for key in {"training.seed", "data.train"} & recipes.space.parameters.keys():
        location = recipes.space.document.locate(("space", key))
        found.problems.append(
            f"{location}: space: {key}: decides which rows data.dev_fraction takes, so the scores of the trials could "
            "not be compared; use a file with data.dev"
        )


def _check_overrides(recipes: TrialRecipes, found: ProblemCollector) -> None:
    for assignment in recipes.overrides:
        key = assignment.partition("=")[0].strip()
        if key in recipes.space.parameters:
            location = recipes.space.document.locate(("space", key))
            found.problems.append(f"command line: {key}: varies in the space, {location}; remove one of them")
