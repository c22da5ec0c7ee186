"""Where Optuna stores the trials of a search: a journal file, or any database that Optuna supports."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from hw3.common.errors import UserError, first_line

JOURNAL_FILE = "journal.log"
# How long a process waits for the lock of the journal, which is held for one write, before it takes it for left over.
LOCK_SECONDS = 10


class _JournalLock(JournalFileOpenLock):
    """The lock of a journal file. It removes the end of a line that a killed process could not finish.

    Args:
        path: the journal file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=LOCK_SECONDS)
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock."""
        acquired = super().acquire()
        with open(self._path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return acquired


def open_storage(storage: str | None, folder: Path) -> BaseStorage:
    """Open a storage; create it if it does not exist.

    Args:
        storage: path of a journal file, or a URL; None for the journal file in the search's folder.
        folder: the search's folder.

    Raises:
        UserError: the storage cannot be opened.
    """
    optuna.logging.set_verbosity(logging.ERROR)  # its notices repeat what is reported here
    if storage is not None and "://" in storage:
        try:
            return get_storage(storage)
        except Exception as error:  # each database has its own errors
            raise UserError(f"--storage {storage}: cannot be opened: {first_line(error)}") from error
    path = folder / JOURNAL_FILE if storage is None else Path(storage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
        with path.open("rb") as file:
            json.loads(file.readline() or "{}")  # Optuna ignores a last line that is no JSON, and writes after it
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    except Exception as error:  # Optuna raises errors of many kinds while it reads a damaged journal
        raise UserError(f"{path}: not a journal file of Optuna: {first_line(error)}") from error


def describe_storage(storage: str | None, folder: Path) -> str:
    """Return a storage as `optuna-dashboard` takes it: a URL, or the path of a journal file."""
    return storage or str(folder / JOURNAL_FILE)
