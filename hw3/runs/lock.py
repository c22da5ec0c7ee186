"""Locks: at most one process writes to a run folder, or to another file of a run, at a time.

A lock is a small file with the host and the process that holds it. The holder renews it every 20 seconds. A process
that has ended on this host is recognized at once, and its lock is taken over. Whether a process of another host still
runs can only be seen from the renewals, so a lock that is not renewed for 60 seconds is taken over.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from hw3.common.atomic_io import write_json
from hw3.common.errors import RunError, UserError
from hw3.common.storage_errors import explain_os_error, is_disk_full

LOCK_FILE = ".lock"
LEASE_SECONDS = 60.0
WAIT_SECONDS = 600.0  # for a lock that others hold only while they write a file
_PROBE_BYTES = 4096  # as many as a file system gives to a lock's file, which has 200

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive_lock(path: Path, subject: str, *, break_lock: bool | None = None) -> Iterator[None]:
    """Hold a lock inside the block; refuse to enter it while another process holds the lock.

    Args:
        path: the lock's file. Its parent folders are created.
        subject: what is written, for messages.
        break_lock: take the lock from any holder, because the user gave `--break-lock`; None for a command without
            this option.

    Raises:
        UserError: another process holds the lock; names host, process and start. Or the folder cannot be written.
        RunError: the disk is full.
    """
    lock = build_lease(path, subject)
    details = path.with_name(f"{path.name}.json")
    missing_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if break_lock:
                path.unlink(missing_ok=True)
            advice = f"delete {path}" if break_lock is None else "repeat the command with --break-lock"
            _acquire(lock, details, subject, advice)
        except OSError as error:
            message = f"{path.parent}: cannot be written: {explain_os_error(error)}"
            raise (RunError if is_disk_full(error) else UserError)(message) from error
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(details, {"host": socket.gethostname(), "process": os.getpid(), "started": started})
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk failed, or a folder is not empty, as after any work
            if lock.is_locked:
                details.unlink(missing_ok=True)
                lock.release()
            for folder in missing_folders:
                folder.rmdir()


def build_lease(path: Path, subject: str) -> SoftFileLease:
    """Return a lock that is not held yet. If its holder loses it to another process, the holder's process ends.

    Args:
        path: the lock's file.
        subject: what is written, for messages.
    """
    return SoftFileLease(
        path, lease_duration=LEASE_SECONDS, thread_local=False, on_compromise=lambda lost: _end_process(subject, lost)
    )


@contextlib.contextmanager
def writing_lock(path: Path) -> Iterator[None]:
    """Hold a lock inside the block, while a file is written; wait for other processes that write it.

    Args:
        path: the lock's file, in an existing folder.

    Raises:
        UserError: another process has held the lock for `WAIT_SECONDS`.
        OSError: the lock's file cannot be written, for example because the disk is full.
    """
    lock = SoftFileLease(path, lease_duration=LEASE_SECONDS, thread_local=False)
    started = time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=min(1.0, WAIT_SECONDS))
        except Timeout as error:
            _check_disk(path.parent)
            if time.monotonic() - started >= WAIT_SECONDS:
                message = f"{path}: locked for {WAIT_SECONDS:.0f} s by {_describe_holder(lock, None)}"
                raise UserError(message) from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: SoftFileLease, details: Path, subject: str, advice: str) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        owner = lock.owner
    if owner is not None and owner.hostname != socket.gethostname():
        holder = _describe_holder(lock, details)
        logger.info(f"{subject}: locked by {holder}; waiting {LEASE_SECONDS:.0f} s to see whether it still runs")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=1.25 * LEASE_SECONDS)
            return
    _check_disk(details.parent)
    raise UserError(
        f"{subject}: {_describe_holder(lock, details)} is writing to it. Wait until it has ended, or stop it. If it "
        f"has ended, {advice}"
    )


def _check_disk(folder: Path) -> None:
    """Check that a file can be written, when a lock could not be acquired.

    A lock of a process that has ended is taken over with a new file. filelock (4.3.1, `_try_break_stale_lock`) ignores
    that this file cannot be written, so the lock looks as if the process still ran.

    Raises:
        OSError: the disk is full, or the size of files is limited.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_PROBE_BYTES))


def _describe_holder(lock: SoftFileLease, details: Path | None) -> str:
    """Return process, host and start of a lock's holder."""
    owner = lock.owner
    if owner is None:
        return "another process"
    description = f"process {owner.pid} on {owner.hostname}"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(details.read_text(encoding="utf-8")) if details is not None else {}
        if (stored["process"], stored["host"]) == (owner.pid, owner.hostname):
            description += f", since {datetime.datetime.fromisoformat(stored['started']):%Y-%m-%d %H:%M:%S} UTC,"
    return description


def _end_process(subject: str, lost: LeaseCompromise) -> None:
    """End this process: another one has taken the lock, because this one did not renew it."""
    logger.error(
        f"{subject}: the lock was lost ({lost.reason}), because this process did not run for {LEASE_SECONDS:.0f} s or "
        "could not write. Another process may write here now, so this one ends"
    )
    os._exit(1)
