"""Storages: a journal file survives a killed writer; a database has a URL."""

import json
import time
from pathlib import Path

import optuna
import pytest

from hw3.common.errors import UserError
from hw3.search.storage import describe_storage, open_storage


def ask(storage: optuna.storages.BaseStorage) -> int:
    return optuna.create_study(storage=storage, study_name="s", load_if_exists=True).ask().number


def test_journal_lies_in_the_searchs_folder(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    assert [ask(open_storage(None, folder)) for _ in range(2)] == [0, 1]
    assert describe_storage(None, folder) == str(folder / "journal.log")


def test_half_a_line_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "shared.log"
    living = open_storage(str(path), tmp_path)
    assert ask(living) == 0
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    assert ask(living) == 1
    assert ask(open_storage(str(path), tmp_path)) == 2
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw3.search.storage.LOCK_SECONDS", 3)
    storage = open_storage(None, tmp_path)
    (tmp_path / "journal.log.lock").touch()
    started = time.monotonic()
    assert ask(storage) == 0
    assert time.monotonic() - started < 10


def test_url_of_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    assert [ask(open_storage(url, tmp_path)) for _ in range(2)] == [0, 1]
    assert describe_storage(url, tmp_path) == url


@pytest.mark.parametrize("storage", ["nosuch://host/db", "sqlite:////no/such/folder/x.db"])
def test_url_that_cannot_be_opened_is_refused(storage: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--storage .*: cannot be opened"):
        open_storage(storage, tmp_path)


@pytest.mark.parametrize("text", ["not a journal\n", '{"op_code":99}\n', "[1]\n", '{"op_code":0,"worker_id":"x"}\n'])
def test_file_that_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match="not a journal file of Optuna"):
        open_storage(str(path), tmp_path)
    assert path.read_text() == text
