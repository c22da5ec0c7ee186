"""Choose the trials' settings and decide which trials stop, with Optuna's algorithms and no state in this process.

A search that was killed must go on as if it had not been. So every random number depends only on the space's seed, the
trial's number and the key; everything else is read from the storage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from hw3.search.space import SearchSpace


class TrialSeededSampler(BaseSampler):
    """Optuna's sampler of a space, with a new seed for each trial and, if keys are drawn one by one, for each key.

    Args:
        space: the search space.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space

    def _sampler(self, trial: FrozenTrial, key: str = "") -> BaseSampler:
        if self._space.sampler == "grid":
            return GridSampler(self._space.grid(), seed=self._space.seed)
        text = f"{self._space.seed}/{trial.number}/{key}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        return TPESampler(seed=seed) if self._space.sampler == "tpe" else RandomSampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Let the sampler prepare a trial."""
        self._sampler(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the keys that are drawn together."""
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the keys that are drawn together."""
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one key."""
        sampler = self._sampler(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def build_pruner(space: SearchSpace, first_score: int, max_steps: int) -> BasePruner:
    """Return Optuna's pruner of a space.

    Args:
        space: the search space.
        first_score: optimizer steps before a trial's first score.
        max_steps: optimizer steps of the longest trial.
    """
    min_resource = space.min_resource or first_score
    if space.pruner == "none":
        return NopPruner()
    if space.pruner == "successive_halving":
        return SuccessiveHalvingPruner(min_resource=min_resource, reduction_factor=space.reduction_factor)
    return HyperbandPruner(
        min_resource=min_resource,
        max_resource=max(max_steps, min_resource),
        reduction_factor=space.reduction_factor,
    )


def should_prune(study: optuna.Study, number: int, make_pruner: Callable[[], BasePruner], last_step: int) -> bool:
    """Return whether a pruner stops a trial after a score.

    The pruner compares the trials' best scores so far, because a trial is judged by its best checkpoint. With the
    latest scores, it stops trials that have their best checkpoint early and score worse later.

    Optuna's pruners store what they have compared beside the trial. If a process is killed between that and the end of
    the trial, the pruner would compare another rung when the trial goes on. Here all scores are therefore reported
    again, to a copy of the study in memory.

    Args:
        study: the study, with the scores of all trials so far.
        number: the trial's number.
        make_pruner: makes a pruner without state.
        last_step: the step of the score; later scores of the trial do not count.
    """
    stored = study.get_trials(deepcopy=False)
    copy = optuna.create_study(study_name=study.study_name, pruner=make_pruner(), sampler=RandomSampler(seed=0))
    trials = [copy.ask() for _ in stored]
    decision = False
    for trial in sorted(stored, key=lambda trial: trial.number == number):  # its own scores at the end
        best = math.inf
        for step, score in sorted(trial.intermediate_values.items()):
            if trial.number == number and step > last_step:
                break
            best = min(best, score)
            trials[trial.number].report(best, step)
            decision = trials[trial.number].should_prune()
    return decision
