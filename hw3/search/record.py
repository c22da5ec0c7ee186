"""Build `search.json` from the storage and the trials' run folders."""

from __future__ import annotations

import logging

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from hw3.runs.lock import LOCK_FILE, writing_lock
from hw3.runs.results_file import ScoreEntry, finetuned_entries
from hw3.runs.run import Run
from hw3.runs.search_record import SEARCH_FILE, BestTrial, SearchRecord, TrialOutcome, TrialRecord
from hw3.search.study import DATA_FILE, PROBLEM, SearchStudy, trial_folder
from hw3.training.checkpoint_scoring import find_best_step

_OUTCOMES: dict[TrialState, TrialOutcome] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}
MIN_TRIALS_FOR_IMPORTANCES = 8

logger = logging.getLogger(__name__)


def write_record(search: SearchStudy, best: BestTrial | None = None) -> SearchRecord:
    """Write `search.json` with all trials so far, and return it.

    Args:
        search: the search's study.
        best: the winner; None before the end.
    """
    path, space = search.folder / SEARCH_FILE, search.recipes.space
    with writing_lock(search.folder / LOCK_FILE):
        stored = SearchRecord.read(path)
        known = {trial.number: trial for trial in stored.trials if trial.outcome != "running"}
        step, importances = _importances(search)
        record = SearchRecord(
            id=stored.id,
            recipe=stored.recipe,
            sampler=space.sampler,
            pruner=space.pruner,
            best_by=stored.best_by,
            total_trials=space.total_trials,
            max_steps=search.max_steps,
            trials=[known.get(trial.number) or build_trial_record(search, trial) for trial in search.trials()],
            importances_step=step,
            importances=importances,
            best=best,
        )
        record.write(path)
    return record


def build_trial_record(search: SearchStudy, trial: FrozenTrial) -> TrialRecord:
    """Return the record of one trial."""
    recipes, run = search.recipes, Run(trial_folder(search.folder, trial.number))
    # A process that is killed may leave a trial without all of its values.
    settings = recipes.space.decode(trial.params) if set(trial.params) == set(recipes.space.parameters) else {}
    scores = dict(sorted(trial.intermediate_values.items()))
    step = find_best_step(scores) if scores else None
    entry = None if step is None else read_entry(run, trial.user_attrs.get(DATA_FILE), step)
    problem = trial.user_attrs.get(PROBLEM)
    return TrialRecord(
        number=trial.number,
        run=run.path.name,
        settings=settings,
        overrides=recipes.all_overrides(settings) if settings else [],
        outcome="failed" if problem and trial.state == TrialState.PRUNED else _OUTCOMES[trial.state],
        problem=problem,
        steps=max(scores, default=0),
        scores=scores,
        score=None if step is None else scores[step],
        step=step,
        mean_perplexity=None if entry is None else entry.mean_perplexity,
        mean_perplexity_ci95=None if entry is None else entry.mean_perplexity_ci95,
    )


def read_entry(run: Run, data_file: str | None, step: int) -> ScoreEntry | None:
    """Return a checkpoint's scores on a data file; None if they have been deleted."""
    if not run.exists():
        return None
    recipe = run.load_recipe()
    for results in run.read_results().values():
        if results.data.path == data_file:
            entries = finetuned_entries(results.entries, recipe.prompt.sha256)
            return next((entry for entry in entries if entry.step == step), None)
    return None


def _importances(search: SearchStudy) -> tuple[int, dict[str, float]]:
    """Return how much each key explains of the scores at the last step that all trials reached, and that step.

    Optuna compares complete trials only, and few are complete if the others were stopped.
    """
    trials = [trial for trial in search.trials() if trial.state.is_finished() and trial.intermediate_values]
    steps = set.intersection(*(set(trial.intermediate_values) for trial in trials)) if trials else set()
    if len(trials) < MIN_TRIALS_FOR_IMPORTANCES or not steps:
        return 0, {}
    step = max(steps)
    copy = optuna.create_study()
    for trial in trials:
        scored = optuna.create_trial(
            params=trial.params, distributions=trial.distributions, value=trial.intermediate_values[step]
        )
        copy.add_trial(scored)
    try:
        return step, get_param_importances(copy, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError) as error:  # all scores are equal, or all values of a key
        logger.debug(f"no importances: {error}")
        return 0, {}
