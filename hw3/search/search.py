"""`hw3 search`: train trials until there are enough, and choose the best. A search that was stopped is resumed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from optuna.trial import TrialState
from tqdm import tqdm

from hw3.common.progress import can_show_live_progress
from hw3.report.search_trials import format_settings
from hw3.runs.lock import LOCK_FILE, writing_lock
from hw3.runs.search_record import SEARCH_PICTURE
from hw3.search.finish import draw_search, finish_search, print_summary
from hw3.search.record import write_record
from hw3.search.study import LOCKS_FOLDER, MAX_STEPS, SearchStudy, open_study, trial_folder
from hw3.search.table import describe_trial
from hw3.search.trial_recipe import TrialRecipes
from hw3.search.trials import TrialRunner

# How often a process that has no trial to train looks for one whose process was killed.
POLL_SECONDS = 2.0

logger = logging.getLogger(__name__)


def run_search(recipes: TrialRecipes, folder: Path, storage: str | None, *, is_worker: bool = False) -> int:
    """Train trials in this process until the search is complete, then choose the winner.

    Other processes may train trials of the same search at the same time, on this machine or on others.

    Args:
        recipes: the recipes of the trials.
        folder: the search's folder.
        storage: where Optuna stores the trials; None for a journal file in the folder.
        is_worker: leave it to the process that started this one to report, and to choose the winner.

    Returns:
        0; 1 if a trial failed, as from `close_search`; 128 plus a signal's number if the signal stopped the search.

    Raises:
        UserError: recipe, space, folder or storage are wrong.
        RunError: no trial was trained to its end.
    """
    runner = TrialRunner(recipes, folder)
    search = open_study(recipes, folder, storage)
    search.study.set_user_attr(MAX_STEPS, runner.max_steps)
    reporter = None if is_worker else TrialReporter(search)
    is_waiting = False
    while True:
        if status := _train_trials(search, runner, reporter):
            return status
        if search.is_finished():
            runner.close()  # the winner is scored with a base model of its own
            return 0 if is_worker else close_search(search)
        if not is_waiting:
            logger.info("all trials are taken; waiting for those of other processes")
            is_waiting = True
        time.sleep(POLL_SECONDS)


def _train_trials(search: SearchStudy, runner: TrialRunner, reporter: TrialReporter | None) -> int:
    """Train trials until there is none to take.

    Returns:
        0; 128 plus a signal's number if the signal stopped a trial.
    """
    while (taken := search.take_trial()) is not None:
        trial, lock = taken
        if can_show_live_progress():  # above the progress of its training; elsewhere its line at the end is enough
            settings = search.recipes.space.decode(trial.params)
            logger.info(f"trial {trial.number + 1}/{search.total_trials}: {format_settings(settings)}")
        try:
            status = runner.run(search, trial)
        finally:
            lock.release()
        if status:
            run = trial_folder(search.folder, trial.number)
            logger.warning(f"stopped in {run.name}; run the same command to resume")
            return status
        if reporter is not None:
            reporter.report()
    return 0


def close_search(search: SearchStudy) -> int:
    """Choose and score the winner, and print the ranking.

    Returns:
        0; 1 if a trial failed, unless its settings made the loss infinite or NaN.
    """
    with writing_lock(search.folder / LOCKS_FOLDER / f"finish{LOCK_FILE}"):
        record = finish_search(search)
    print_summary(search, record)
    failed = [trial for trial in record.trials if trial.outcome == "failed"]
    for trial in failed:
        logger.error(f"{trial.run} failed: {trial.problem}")
    return int(any(trial.state == TrialState.FAIL for trial in search.trials()))


class TrialReporter:
    """Prints each trial that has ended since the last call, in any process, with the time left.

    Args:
        search: the study.
    """

    def __init__(self, search: SearchStudy) -> None:
        self._search, self._started = search, time.monotonic()
        self._printed = {trial.number for trial in search.trials() if trial.state.is_finished()}
        self._initial = len(self._printed)
        if self._initial:
            logger.info(f"{search.folder}: {self._initial} of {search.total_trials} trials have ended before")

    def report(self) -> None:
        """Print the new trials; then write the record, and draw the picture."""
        ended = {trial.number for trial in self._search.trials() if trial.state.is_finished()}
        if ended == self._printed:
            return
        record = write_record(self._search)
        new = [trial for trial in record.trials if trial.number in ended - self._printed]
        self._printed |= ended
        for trial in new:
            print(f"{describe_trial(trial, record)}  {self._time_left(record.total_trials)}".rstrip(), flush=True)
        draw_search(record, self._search.folder / SEARCH_PICTURE)

    def _time_left(self, total: int) -> str:
        done = len(self._printed)
        if done >= total:
            return ""
        seconds = (time.monotonic() - self._started) / (done - self._initial) * (total - done)
        return f"{tqdm.format_interval(round(seconds))} left"
