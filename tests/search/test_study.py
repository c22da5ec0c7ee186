"""The study of a search: which trials a process may take, and which folder belongs to which storage."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY
from optuna.trial import TrialState

from hw3.common.errors import UserError
from hw3.search.space import load_space
from hw3.search.study import SearchStudy, open_study
from hw3.search.trial_recipe import TrialRecipes

TAKE = """
import sys, time
from pathlib import Path
from hw3.search.space import load_space
from hw3.search.study import open_study
from hw3.search.trial_recipe import TrialRecipes
recipe, space, folder = map(Path, sys.argv[1:])
trial, lock = open_study(TrialRecipes(recipe, load_space(space), []), folder, None).take_trial()
print(trial.number, flush=True)
time.sleep(100)
"""


@pytest.fixture
def recipes(mini_recipe: Path, space_file: Path) -> TrialRecipes:
    return TrialRecipes(mini_recipe, load_space(space_file), [])


def take_in_another_process(recipes: TrialRecipes, folder: Path) -> subprocess.Popen[str]:
    words = [str(recipes.path), recipes.space.document.path, str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE, *words], cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "0\n"
    return process


def test_each_trial_is_taken_once(recipes: TrialRecipes, tmp_path: Path) -> None:
    first, second = (open_study(recipes, tmp_path / "search", None) for _ in range(2))
    taken = [study.take_trial() for study in (first, second, first, second)]
    assert [trial.number for trial, _ in taken] == [0, 1, 2, 3]
    assert all(set(trial.params) == set(recipes.space.parameters) for trial, _ in taken)
    assert first.take_trial() is None and second.take_trial() is None
    assert not first.is_finished()


def test_trial_of_a_killed_process_is_taken_with_its_settings(recipes: TrialRecipes, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    process = take_in_another_process(recipes, folder)
    study = open_study(recipes, folder, None)
    settings = study.trials()[0].params
    trial, lock = study.take_trial()
    assert trial.number == 1
    lock.release()
    study.study.tell(trial, 1.0)
    process.kill()
    process.wait()
    trial, lock = study.take_trial()
    assert (trial.number, trial.params) == (0, settings)
    lock.release()


def test_trial_of_another_machine_is_not_taken_before_its_lock_is_old(recipes: TrialRecipes, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    process = take_in_another_process(recipes, folder)
    lock_file = folder / "locks/trial-000.lock"
    content = lock_file.read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock_file.write_text(content.replace(f"host={socket.gethostname()}", "host=elsewhere"))
    trial, _ = open_study(recipes, folder, None).take_trial()
    assert trial.number == 1


def test_trial_without_all_settings_gets_those_that_it_would_have_had(recipes: TrialRecipes, tmp_path: Path) -> None:
    straight = open_study(recipes, tmp_path / "straight" / "search", None)
    expected = straight.take_trial()[0].params
    study = open_study(recipes, tmp_path / "killed" / "search", None)
    study.study.ask()._suggest("lora.r", recipes.space.distributions["lora.r"])
    assert study.take_trial()[0].params == expected


def test_folder_and_storage_belong_together(recipes: TrialRecipes, tmp_path: Path) -> None:
    storage = str(tmp_path / "shared.log")
    open_study(recipes, tmp_path / "search", storage)
    with pytest.raises(UserError, match="the storage holds a search of another folder with this name"):
        open_study(recipes, tmp_path / "elsewhere" / "search", storage)
    assert not (tmp_path / "elsewhere/search/search.json").exists()
    open_study(recipes, tmp_path / "elsewhere" / "other", storage)


def test_wrong_storage_leaves_no_folder(recipes: TrialRecipes, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a journal\n")
    with pytest.raises(UserError, match="not a journal file of Optuna"):
        open_study(recipes, tmp_path / "search", str(tmp_path / "notes.txt"))
    assert not (tmp_path / "search").exists()


def test_copy_of_a_folder_goes_on(recipes: TrialRecipes, tmp_path: Path) -> None:
    study: SearchStudy = open_study(recipes, tmp_path / "search", None)
    trial, lock = study.take_trial()
    study.study.tell(trial, 2.0)
    lock.release()
    copy = open_study(recipes, shutil.copytree(tmp_path / "search", tmp_path / "copy" / "search"), None)
    assert [trial.state for trial in copy.trials()] == [TrialState.COMPLETE]
    assert os.listdir(tmp_path / "copy") == ["search"]


def test_renamed_folder_and_deleted_record_go_on(recipes: TrialRecipes, tmp_path: Path) -> None:
    study = open_study(recipes, tmp_path / "search", None)
    identity = study.study.user_attrs
    trial, lock = study.take_trial()
    study.study.tell(trial, 2.0)
    lock.release()
    renamed = (tmp_path / "search").rename(tmp_path / "renamed")
    assert [trial.value for trial in open_study(recipes, renamed, None).trials()] == [2.0]
    (renamed / "search.json").unlink()
    again = open_study(recipes, renamed, None)
    assert [trial.value for trial in again.trials()] == [2.0]
    assert again.study.user_attrs == identity == open_study(recipes, renamed, None).study.user_attrs


def test_search_whose_rows_have_changed_is_refused(recipes: TrialRecipes, tmp_path: Path) -> None:
    open_study(recipes, tmp_path / "search", None)
    file = Path(recipes.load_base().data.train)
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds another search: the rows of data.train differ"):
        open_study(recipes, tmp_path / "search", None)
