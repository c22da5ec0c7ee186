"""Read a search space: which keys of a recipe vary, over which of Optuna's distributions, and how trials are chosen.

    trials: 16
    sampler: tpe
    pruner: successive_halving
    fixed:
      training.max_steps: 60
    space:
      training.learning_rate:
        float: {low: 1e-4, high: 1e-2, log: true}
      lora.r:
        int: {low: 4, high: 32, log: true}
      prompt:
        categorical: [recipes/prompts/study.yaml, recipes/prompts/bare.yaml]

A space is as strict as a recipe: unknown keys, wrong types and impossible distributions are reported with their lines.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, Field

from hw3.common.errors import ProblemCollector, UserError
from hw3.config.schema import PositiveInt
from hw3.config.validation import describe_value, suggest_name, validate_section
from hw3.config.yaml_loader import KeyPath, YamlDocument, read_yaml

ALPHA_OVER_R = "lora.alpha_over_r"  # derived: lora.lora_alpha / lora.r
# Under other values of these keys, scores would be of something else.
_KEYS_OF_THE_SCORE = ("data.eval", "data.dev", "data.dev_fraction", "evaluation", "generation", "speed")
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
MAX_GRID_SIZE = 100_000
# The recipe of every choice is checked before the search.
MAX_CHOICES = 200


class _SearchFile(BaseModel):
    """The top level of a space; its defaults."""

    model_config = _STRICT

    trials: PositiveInt = 16
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["successive_halving", "hyperband", "none"] = "successive_halving"
    min_resource: PositiveInt | None = None
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    fixed: dict[str, Any] = {}
    space: dict[str, Any]


class _Float(BaseModel):
    """Arguments of `optuna.distributions.FloatDistribution`."""

    model_config = _STRICT

    low: float
    high: float
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None


class _Int(BaseModel):
    """Arguments of `optuna.distributions.IntDistribution`."""

    model_config = _STRICT

    low: int
    high: int
    log: bool = False
    step: PositiveInt = 1


_RANGES: dict[str, Any] = {"float": (_Float, FloatDistribution), "int": (_Int, IntDistribution)}
_KINDS = [*_RANGES, "categorical"]


@dataclass(frozen=True)
class Parameter:
    """A key of the recipe that varies.

    Attributes:
        key: the recipe's key, such as `lora.r`, or `lora.alpha_over_r`.
        distribution: Optuna's distribution. Its choices are labels: JSON for lists and mappings.
        choices: the values by label, of a categorical distribution.
    """

    key: str
    distribution: BaseDistribution
    choices: dict[Any, Any]

    def decode(self, value: Any) -> Any:
        """Return the recipe's value for a value of the distribution."""
        return self.choices[value] if isinstance(self.distribution, CategoricalDistribution) else value

    def extremes(self) -> list[Any]:
        """Return the ends of a range, or all choices, as the recipe's values."""
        if isinstance(self.distribution, FloatDistribution | IntDistribution):
            return [self.distribution.low, self.distribution.high]
        return list(self.choices.values())

    def count_values(self) -> int | None:
        """Return the number of values; None if the distribution is continuous, or an integer on a log scale."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return len(distribution.choices)
        if isinstance(distribution, IntDistribution) and not distribution.log:
            return (distribution.high - distribution.low) // distribution.step + 1
        if isinstance(distribution, FloatDistribution) and distribution.step is not None:
            return round((distribution.high - distribution.low) / distribution.step) + 1
        return None

    def grid(self) -> list[Any]:
        """Return all values of the distribution, whose number must be known."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        if isinstance(distribution, IntDistribution):
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        assert isinstance(distribution, FloatDistribution) and distribution.step is not None, "the space is checked"
        count = self.count_values() or 0
        # As `FloatDistribution.to_external_repr` of a multiple of the step would print it.
        return [float(f"{distribution.low + number * distribution.step:.12g}") for number in range(count)]


@dataclass(frozen=True)
class SearchSpace:
    """A valid search space.

    Attributes:
        trials: number of trials.
        sampler: `tpe`, `random` or `grid`.
        pruner: `hyperband`, `successive_halving` or `none`.
        min_resource: optimizer steps before the first decision to stop a trial; None for the first score.
        reduction_factor: about one in so many trials goes on after each decision.
        seed: seed of the sampler.
        fixed: values that all trials share, by the recipe's key.
        parameters: what varies, by key.
        document: the file, for the locations in messages.
    """

    trials: int
    sampler: str
    pruner: str
    min_resource: int | None
    reduction_factor: int
    seed: int
    fixed: dict[str, Any]
    parameters: dict[str, Parameter]
    document: YamlDocument

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by key."""
        return {key: parameter.distribution for key, parameter in self.parameters.items()}

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe's values for a trial's values of the distributions, in the order of the file."""
        return {key: parameter.decode(params[key]) for key, parameter in self.parameters.items()}

    def identity(self) -> dict[str, Any]:
        """Return what a search cannot change when it is resumed: all but the number of trials."""
        values = {key: value for key, value in self.document.values.items() if key != "trials"}
        return json.loads(json.dumps({"sampler": self.sampler, "pruner": self.pruner, "seed": self.seed} | values))

    def grid(self) -> dict[str, list[Any]]:
        """Return all values of every distribution. The sampler must be `grid`."""
        return {key: parameter.grid() for key, parameter in self.parameters.items()}

    @property
    def total_trials(self) -> int:
        """Number of trials; a grid has no more than its points."""
        if self.sampler != "grid":
            return self.trials
        return min(self.trials, math.prod(parameter.count_values() or 0 for parameter in self.parameters.values()))


def load_space(path: Path, trials: int | None = None) -> SearchSpace:
    """Read a search space.

    Args:
        path: the YAML file.
        trials: number of trials in place of the file's.

    Raises:
        UserError: lists all problems, each with its line.
    """
    document = read_yaml(path)
    found = ProblemCollector(document.problems)
    file = found.collect(validate_section, document, _SearchFile, document.values, ())
    values = document.values
    space, fixed = values.get("space"), values.get("fixed")
    parameters: dict[str, Parameter] = {}
    for key, kinds in space.items() if isinstance(space, dict) else ():
        parameter = found.collect(_read_parameter, document, key, kinds)
        if parameter is not None:
            parameters[key] = parameter
    for section in (space, fixed):
        for key in section if isinstance(section, dict) else ():
            found.collect(_check_key, document, ("space" if section is space else "fixed", key), key)
    if space == {} and not document.problems:
        found.problems.append(document.problem(("space",), "found {}, expected the keys that vary"))
    if isinstance(space, dict):
        found.collect(_check_combinations, document, space, fixed if isinstance(fixed, dict) else {})
    if values.get("sampler") == "grid":
        found.collect(_check_grid, document, parameters)
    if trials is not None and trials < 1:
        found.problems.append(f"--trials {trials}: expected 1 or more")
    found.raise_problems()
    assert file is not None, "an invalid file is a problem"
    return SearchSpace(
        trials=trials or file.trials,
        sampler=file.sampler,
        pruner=file.pruner,
        min_resource=file.min_resource,
        reduction_factor=file.reduction_factor,
        seed=file.seed,
        fixed=file.fixed,
        parameters=parameters,
        document=document,
    )


def _read_parameter(document: YamlDocument, key: str, kinds: Any) -> Parameter:
    path: KeyPath = ("space", key)
    if not isinstance(kinds, dict) or len(kinds) != 1:
        raise UserError(
            document.problem(path, f"{describe_value(kinds)}, expected one of {', '.join(f'{k}: …' for k in _KINDS)}")
        )
    ((kind, arguments),) = kinds.items()
    if kind == "categorical":
        return _read_choices(document, key, arguments)
    if kind not in _RANGES:
        raise UserError(document.problem((*path, kind), f"no such distribution{suggest_name(kind, _KINDS)}"))
    schema, distribution = _RANGES[kind]
    values = validate_section(document, schema, arguments, (*path, kind))
    if values.low > values.high:
        raise UserError(document.problem((*path, kind), f"low is {values.low}, above high, which is {values.high}"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna lowers `high` to a multiple of the step; see below
            made = distribution(**values.model_dump())
    except (ValueError, ArithmeticError) as error:
        text = str(error) if isinstance(error, ValueError) else f"found step {values.step:g}, expected a larger one"
        raise UserError(document.problem((*path, kind), text)) from error
    if made.high != values.high:
        text = f"high is {values.high}, expected low plus a multiple of the step, such as {made.high}"
        raise UserError(document.problem((*path, kind), text))
    return Parameter(key, made, {})


def _read_choices(document: YamlDocument, key: str, choices: Any) -> Parameter:
    path: KeyPath = ("space", key, "categorical")
    if not isinstance(choices, list) or not choices:
        raise UserError(document.problem(path, f"{describe_value(choices)}, expected a list of values"))
    if len(choices) > MAX_CHOICES:
        raise UserError(document.problem(path, f"found {len(choices):,} values, expected at most {MAX_CHOICES}"))
    if key == ALPHA_OVER_R:
        for choice in choices:
            if isinstance(choice, bool) or not isinstance(choice, int | float) or not 0 < choice < math.inf:
                raise UserError(document.problem(path, f"{describe_value(choice)}, expected a number above 0"))
    texts = [json.dumps(choice, ensure_ascii=False) for choice in choices]
    repeated = next((text for text in texts if texts.count(text) > 1), None)
    if repeated is not None:
        raise UserError(document.problem(path, f"found {repeated} twice"))
    # Optuna stores numbers and texts, and takes 1, 1.0 and true for equal: then every label is JSON.
    is_plain = all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices)
    labels = choices if is_plain and len(set(choices)) == len(choices) else texts
    return Parameter(key, CategoricalDistribution(labels), dict(zip(labels, choices, strict=True)))


def _check_key(document: YamlDocument, path: KeyPath, key: str) -> None:
    """Check that a key can vary between trials; whether the recipe has it is found when the recipe is loaded."""
    if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _KEYS_OF_THE_SCORE) and path[0] == "space":
        raise UserError(
            document.problem(
                path,
                "cannot vary, because the scores of the trials could not be compared; set it under "
                "`fixed`, or in the recipe",
            )
        )
    if not all(re.fullmatch(r"[^\s=]+", part) for part in key.split(".")):  # as it would stand in an assignment
        raise UserError(document.problem(path, "expected a recipe's key, such as training.learning_rate"))


def _check_combinations(document: YamlDocument, space: dict[str, Any], fixed: dict[str, Any]) -> None:
    problems = [document.problem(("fixed", key), "is in `space` too") for key in fixed if key in space]
    problems += [
        document.problem(("space", key), f"is a part of {other}, which is in `space` or `fixed` too")
        for key in space
        for other in [*space, *fixed]
        if key.startswith(f"{other}.")
    ]
    if ALPHA_OVER_R in space and "lora.lora_alpha" in [*space, *fixed]:
        problems.append(document.problem(("space", ALPHA_OVER_R), "determines lora.lora_alpha, which is set too"))
    if problems:
        raise UserError(*problems)


def _check_grid(document: YamlDocument, parameters: dict[str, Parameter]) -> None:
    problems = [
        document.problem(("space", key), "the sampler is grid, so it needs a step, or a list of values (categorical)")
        for key, parameter in parameters.items()
        if parameter.count_values() is None
    ]
    if not problems:
        size = math.prod(parameter.count_values() or 0 for parameter in parameters.values())
        if size > MAX_GRID_SIZE:
            problems = [
                document.problem(("space",), f"the grid has {size:,} points, expected at most {MAX_GRID_SIZE:,}")
            ]
    if problems:
        raise UserError(*problems)
