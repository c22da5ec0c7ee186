"""Train one trial: a run of its own, whose checkpoints are scored while it trains, and which the pruner may stop."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from optuna.pruners import BasePruner
from optuna.trial import Trial, TrialState

from hw3.common.errors import UserError, first_line
from hw3.evaluation.during_training import build_checkpoint_scorer
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.run import Run
from hw3.search.sampling import build_pruner, should_prune
from hw3.search.study import DATA_FILE, PROBLEM, SearchStudy, trial_folder
from hw3.search.trial_recipe import TrialRecipes, check_corners
from hw3.training.checkpoint_scoring import CheckpointScore, CheckpointScorer
from hw3.training.plan import Plan, plan_run
from hw3.training.session import TrainingSession
from hw3.training.train import train
from hw3.training.trainer import NonFiniteLossError

# Their notices on each run would hide the table of the trials; `--verbose` shows them.
_QUIET_LOGGERS = ("hw3.training", "hw3.evaluation", "hw3.runs", "hw3.modeling")


class TrialRunner:
    """Trains trials in this process, one after the other.

    Args:
        recipes: the recipes of the trials. Those at the borders of the space are checked as `hw3 train` would.
        folder: the search's folder, which need not exist.

    Attributes:
        max_steps: optimizer steps of the longest trial.

    Raises:
        UserError: lists the problems of all recipes.
    """

    def __init__(self, recipes: TrialRecipes, folder: Path) -> None:
        self._recipes, self._folder = recipes, folder
        self._session = TrainingSession()
        plans: list[Plan] = []
        with quiet_trials():
            check_corners(
                recipes,
                lambda recipe: plans.append(plan_run(recipe, folder / "trial", 1, cache=self._session.cache)),
            )
        self.max_steps = max(plan.steps for plan in plans)
        self._first_score = min(plan.save_schedule.steps()[0] for plan in plans)

    def make_pruner(self) -> BasePruner:
        """Return Optuna's pruner without state."""
        return build_pruner(self._recipes.space, self._first_score, self.max_steps)

    def run(self, search: SearchStudy, trial: Trial) -> int:
        """Train a trial, or resume it, and tell Optuna how it ended.

        Args:
            search: the study.
            trial: one of its trials, whose lock this process holds.

        Returns:
            0; or 128 plus a signal's number if the signal stopped it after a complete checkpoint.
        """
        study = search.study
        try:
            with quiet_trials():
                status = self._train(search, trial)
        except (UserError, torch.OutOfMemoryError) as error:
            self._session.discard()
            if isinstance(error, UserError):
                self._check_base()
            trial.set_user_attr(PROBLEM, first_line(error))
            study.tell(trial, state=TrialState.FAIL)
            return 0
        except NonFiniteLossError as error:
            trial.set_user_attr(PROBLEM, first_line(error))
            study.tell(trial, state=TrialState.PRUNED)  # Optuna's samplers learn nothing from failed trials
            return 0
        if status:
            return status
        manifest = Run(trial_folder(self._folder, trial.number)).read_manifest()
        early_stop = None if manifest is None else manifest.stopped_early
        scores = search.trials()[trial.number].intermediate_values
        if early_stop is not None and early_stop.reason == "pruned":
            study.tell(trial, state=TrialState.PRUNED)
        elif scores:
            study.tell(trial, min(scores.values()))
        else:
            trial.set_user_attr(PROBLEM, "none of its checkpoints could be scored")
            study.tell(trial, state=TrialState.FAIL)
        return 0

    def close(self) -> None:
        """Free the memory of base model and captured step."""
        self._session.discard()

    def _check_base(self) -> None:
        """Check the recipe without a trial's settings, to find what is wrong for every trial, such as a full disk.

        Raises:
            UserError: the mistake is not one of the trial's settings.
        """
        with quiet_trials():
            plan_run(self._recipes.load_base(), self._folder / "trial", 1, cache=self._session.cache)

    def _train(self, search: SearchStudy, trial: Trial) -> int:
        recipe = self._recipes.load(self._recipes.space.decode(trial.params))
        run = Run(trial_folder(self._folder, trial.number))
        score = build_checkpoint_scorer(run, self._session.cache)
        scorer = _PruningScorer(score, trial, search, self._session, self.make_pruner)
        return train(recipe, run.path, session=self._session, score_checkpoint=scorer)


@dataclass
class _PruningScorer:
    """Scores a trial's checkpoints, reports the scores to Optuna, and stops the trial if the pruner says so."""

    score: CheckpointScorer
    trial: Trial
    search: SearchStudy
    session: TrainingSession
    make_pruner: Callable[[], BasePruner]

    def __call__(self, slot: AdapterSlot, checkpoint: Checkpoint | None) -> CheckpointScore | None:
        """See `CheckpointScorer`."""
        # The base model's score does not depend on the trial. A checkpoint that a signal saved between two others
        # must not count: the search ends as if it had not been interrupted.
        assert self.session.plan is not None, "the run has taken the base model"
        if checkpoint is None or checkpoint.step not in self.session.plan.save_schedule:
            return None
        score = self.score(slot, checkpoint)
        if score is None:
            return None
        number, step = self.trial.number, score.step
        if step not in self.search.trials()[number].intermediate_values:
            self.trial.set_user_attr(DATA_FILE, score.data_file)
            self.trial.report(score.history[step], step)
        prune = should_prune(self.search.study, number, self.make_pruner, last_step=step)
        return replace(score, stop="pruned") if prune else score


@contextlib.contextmanager
def quiet_trials() -> Iterator[None]:
    """Inside the block, print neither notices nor results of single runs, unless details are asked for."""
    if logging.getLogger("hw3").isEnabledFor(logging.DEBUG):
        yield
        return
    loggers = [logging.getLogger(name) for name in _QUIET_LOGGERS]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
