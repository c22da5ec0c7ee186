"""`search.json`: the trials of a search with their scores, for the report and for people."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hw3.config.schema import BestBy
from hw3.runs.file_model import FileModel

SEARCH_FILE = "search.json"
SEARCH_PICTURE = "search.png"
BEST_RECIPE_FILE = "best.yaml"

TrialOutcome = Literal["complete", "pruned", "failed", "running"]


class TrialRecord(FileModel):
    """One trial.

    Attributes:
        number: the trial's number, from 0.
        run: its run folder, relative to the search's folder.
        settings: the recipe's values by key.
        overrides: the assignments with which `hw3 train` trains the same run.
        outcome: how it ended.
        problem: why it failed; None if it has not.
        steps: optimizer steps of its last score; 0 without one.
        scores: what the search minimizes, by optimizer step.
        score: the lowest of them; None without one.
        step: the step of that score; None without one.
        mean_perplexity: of the same checkpoint; None without one.
        mean_perplexity_ci95: its bootstrap interval.
    """

    number: int
    run: str
    settings: dict[str, Any]
    overrides: list[str]
    outcome: TrialOutcome
    problem: str | None = None
    steps: int
    scores: dict[int, float]
    score: float | None
    step: int | None
    mean_perplexity: float | None
    mean_perplexity_ci95: tuple[float, float] | None


class FinalScore(FileModel):
    """The winner on the file that it was not chosen on.

    Attributes:
        data_file: the scored file.
        mean_perplexity: the winner's score.
        mean_perplexity_ci95: its bootstrap interval.
        base_mean_perplexity: the base model's score with the winner's prompt.
    """

    data_file: str
    mean_perplexity: float
    mean_perplexity_ci95: tuple[float, float]
    base_mean_perplexity: float


class BestTrial(FileModel):
    """The winner.

    Attributes:
        number: the trial's number.
        checkpoint: its best checkpoint.
        chosen_on: the data file whose scores the search minimized.
        final: the score on `data.eval`; the score that it was chosen by, if `chosen_on` is the same file.
    """

    number: int
    checkpoint: str
    chosen_on: str
    final: FinalScore


class SearchRecord(FileModel):
    """The record of a search.

    Attributes:
        id: names the folder in the storage, so that neither is continued with another.
        recipe: name of the recipe.
        sampler: how settings were chosen.
        pruner: how trials were stopped.
        best_by: the figure that is minimized.
        total_trials: number of trials of the complete search.
        max_steps: optimizer steps of the longest trial; 0 before the first.
        trials: the trials by number.
        importances_step: the last optimizer step at which all trials were scored.
        importances: how much each key explains of those scores, by Optuna's evaluator; empty if trials are few.
        best: the winner; None before the end.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    id: str
    recipe: str
    sampler: str
    pruner: str
    best_by: BestBy
    total_trials: int
    max_steps: int = 0
    trials: list[TrialRecord] = Field(default_factory=list)
    importances_step: int = 0
    importances: dict[str, float] = Field(default_factory=dict)
    best: BestTrial | None = None

    @property
    def steps_done(self) -> int:
        """Optimizer steps of all trials."""
        return sum(trial.steps for trial in self.trials)

    @property
    def saved_share(self) -> float:
        """Share of the optimizer steps that were not done, because trials were stopped."""
        return 1 - self.steps_done / (self.max_steps * len(self.trials))
