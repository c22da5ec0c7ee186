"""A search's study in its storage, and the trials that a process may take."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import SoftFileLease, Timeout
from optuna.trial import FrozenTrial, Trial, TrialState

from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.config.data_files import list_data_files
from hw3.runs.lock import LOCK_FILE, build_lease, writing_lock
from hw3.runs.search_record import SEARCH_FILE, SearchRecord
from hw3.search.sampling import TrialSeededSampler
from hw3.search.storage import open_storage
from hw3.search.trial_recipe import TrialRecipes

LOCKS_FOLDER = "locks"
# Names of what is stored with a study, and with a trial, beside Optuna's own.
IDENTITY, MAX_STEPS = "hw3", "max_steps"
PROBLEM, DATA_FILE = "problem", "data_file"


def trial_folder(folder: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return folder / f"trial-{number:03}"


@dataclass
class SearchStudy:
    """The study of a search.

    Attributes:
        study: Optuna's study.
        recipes: the recipes of the trials.
        folder: the search's folder.
    """

    study: optuna.Study
    recipes: TrialRecipes
    folder: Path
    _watched: dict[int, SoftFileLease] = field(default_factory=dict)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by number."""
        return self.study.get_trials(deepcopy=False)

    def is_finished(self) -> bool:
        """Return whether all trials have ended."""
        trials = self.trials()
        return len(trials) >= self.total_trials and all(trial.state.is_finished() for trial in trials)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the longest trial; 0 before a process has checked the space."""
        return self.study.user_attrs.get(MAX_STEPS, 0)

    @property
    def total_trials(self) -> int:
        """Number of trials of the complete search."""
        return self.recipes.space.total_trials

    def take_trial(self) -> tuple[Trial, SoftFileLease] | None:
        """Return a trial that no process works on, with its lock, which the caller releases; None if there is none.

        A trial whose process was killed comes first. A new trial is made if there are not enough yet. The lock of a
        killed process is recognized at once on the same machine. On another one, it must not have been renewed for a
        minute, so call this again from time to time.
        """
        locks = self.folder / LOCKS_FOLDER
        locks.mkdir(parents=True, exist_ok=True)
        with writing_lock(locks / LOCK_FILE):
            trials = self.trials()
            for frozen in trials:
                if frozen.state == TrialState.RUNNING and (lock := self._try_lock(frozen.number)) is not None:
                    if self.trials()[frozen.number].state == TrialState.RUNNING:
                        return self._complete(Trial(self.study, frozen._trial_id)), lock
                    lock.release()  # its process has finished it meanwhile
            if len(trials) >= self.total_trials:
                return None
            trial = self._complete(self.study.ask())
            taken = self._try_lock(trial.number)
            assert taken is not None, "other processes take trials under the same lock"
            return trial, taken

    def _complete(self, trial: Trial) -> Trial:
        """Draw the values of a trial that it does not have yet."""
        for key, distribution in self.recipes.space.distributions.items():
            trial._suggest(key, distribution)
        return trial

    def _try_lock(self, number: int) -> SoftFileLease | None:
        path = self.folder / LOCKS_FOLDER / f"trial-{number:03}.lock"
        # The same object at each call, because it measures how long another machine has not renewed the lock.
        lock = self._watched.setdefault(number, build_lease(path, str(trial_folder(self.folder, number))))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return self._watched.pop(number)


def open_study(recipes: TrialRecipes, folder: Path, storage: str | None) -> SearchStudy:
    """Open the study of a search, or create it together with the search's folder.

    Args:
        recipes: the recipes of the trials.
        folder: the search's folder.
        storage: where Optuna stores the trials, as for `open_storage`.

    Raises:
        UserError: folder or storage hold another search.
    """
    optuna_storage = open_storage(storage, folder)  # before the folder: nothing is written if it is wrong
    folder.mkdir(parents=True, exist_ok=True)
    recipe, space = recipes.load_base(), recipes.space
    record_path = folder / SEARCH_FILE
    with writing_lock(folder / LOCK_FILE):
        is_new = not record_path.exists()
        if is_new:  # before the study: a study without a record would look like another folder's
            SearchRecord(
                id=uuid.uuid4().hex,
                recipe=recipe.name,
                sampler=space.sampler,
                pruner=space.pruner,
                best_by=recipe.evaluation.best_by,
                total_trials=space.total_trials,
            ).write(record_path)
        record = SearchRecord.read(record_path)
        # The journal in the folder has one study, whose name stays when the folder is renamed.
        names = optuna.get_all_study_names(optuna_storage) if storage is None else []
        study = optuna.create_study(
            storage=optuna_storage,
            study_name=names[0] if names else folder.name,
            sampler=TrialSeededSampler(space),
            pruner=optuna.pruners.NopPruner(),  # `should_prune` decides
            load_if_exists=True,
        )
        data = {key: file_sha256(file) for key, file in list_data_files(recipe.data).items()}
        identity = {"folder": record.id, "recipe": recipe.to_dict(), "space": space.identity(), "data": data}
        stored = study.user_attrs.get(IDENTITY)
        if is_new and stored is not None and storage is None:  # the record was deleted; the journal still has its id
            identity["folder"] = stored["folder"]
            record.model_copy(update={"id": stored["folder"]}).write(record_path)
        if stored is None and not record.trials:
            study.set_user_attr(IDENTITY, identity)
        elif stored is None:
            raise UserError(f"{folder}: its trials are in another storage; give the same --storage (make: STORAGE=)")
        elif stored != identity:
            if is_new:
                record_path.unlink()
            raise UserError(*_describe_differences(folder, stored, identity))
    return SearchStudy(study, recipes, folder)


def _describe_differences(folder: Path, stored: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    if stored["folder"] != identity["folder"]:
        return [
            f"{folder}: the storage holds a search of another folder with this name; give that folder, or another "
            "name: --output DIR (make: OUTPUT=DIR)"
        ]
    changed = [
        key if part == "space" else f"{part}.{key}" if part == "recipe" else f"the rows of data.{key}"
        for part in ("recipe", "space", "data")
        for key in sorted({*stored[part], *identity[part]})
        if stored[part].get(key) != identity[part].get(key)
    ]
    return [
        f"{folder}: holds another search: {', '.join(changed)} differ. Only `trials` may change when a search goes on",
        "use another folder for this search: --output DIR (make: OUTPUT=DIR)",
    ]
