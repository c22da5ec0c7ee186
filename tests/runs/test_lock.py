"""Locks of run folders: one writer; processes that have ended; other hosts; the message to a second writer."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hw3.runs.lock
from hw3.common.errors import RunError, UserError
from hw3.runs.lock import exclusive_lock, writing_lock

HOLD = """
import sys, time
from pathlib import Path
from hw3.runs.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run" / ".lock"


@pytest.fixture
def holder(lock_file: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock_file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_exclusive_lock_refuses_a_second_process(lock_file: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(UserError) as caught, exclusive_lock(lock_file, "outputs/run", break_lock=False):
        pytest.fail("both processes hold the lock")
    message = str(caught.value)
    assert message.startswith(f"outputs/run: process {holder.pid} on {socket.gethostname()}, since 20")
    assert "repeat the command with --break-lock" in message
    with exclusive_lock(lock_file, "outputs/run", break_lock=True):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_exclusive_lock_is_taken_from_a_process_that_has_ended(
    lock_file: Path, holder: subprocess.Popen, number: int
) -> None:
    holder.send_signal(number)
    holder.wait()
    assert lock_file.exists()
    with exclusive_lock(lock_file, "run"):
        assert f"pid={os.getpid()}" in lock_file.read_text(encoding="utf-8")
    assert sorted(lock_file.parent.iterdir()) == []


@pytest.fixture
def one_byte_files() -> Iterator[None]:
    """Let every write beyond the first byte of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_locks_report_that_an_ended_process_cannot_be_replaced_on_a_full_disk(
    lock_file: Path, holder: subprocess.Popen, one_byte_files: None
) -> None:
    """A lock of a running process would be waited for. The message is about the disk, not about that process."""
    holder.kill()
    holder.wait()
    with pytest.raises(RunError, match="cannot be written: File too large; raise the limit"):  # noqa: SIM117
        with exclusive_lock(lock_file, "outputs/run", break_lock=False):
            pytest.fail("the lock cannot be held")
    with pytest.raises(OSError, match="File too large"), writing_lock(lock_file):
        pytest.fail("the lock cannot be held")
    assert sorted(path.name for path in lock_file.parent.iterdir()) == [".lock", ".lock.json"]  # of the ended process


def test_exclusive_lock_leaves_no_folder(tmp_path: Path, lock_file: Path) -> None:
    with pytest.raises(KeyError), exclusive_lock(lock_file, "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_exclusive_lock_of_another_host_is_taken_over_once_it_is_not_renewed(
    lock_file: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The holder is stopped with SIGSTOP, so that it does not renew its lock."""
    monkeypatch.setattr(hw3.runs.lock, "LEASE_SECONDS", 1.0)
    holder.send_signal(signal.SIGSTOP)
    text = lock_file.read_text(encoding="utf-8")
    lock_file.write_text(
        text.replace(f"host={socket.gethostname()}", "host=elsewhere").replace("=60.0", "=1.0"), encoding="utf-8"
    )
    with caplog.at_level("INFO"), exclusive_lock(lock_file, "run"):
        assert "host=elsewhere" not in lock_file.read_text(encoding="utf-8")
    assert f"locked by process {holder.pid} on elsewhere; waiting 1 s to see whether it still runs" in caplog.text


def test_exclusive_lock_of_another_host_is_respected_while_it_is_renewed(
    lock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = HOLD.replace(
        "from hw3.runs.lock import exclusive_lock\n",
        "import socket; socket.gethostname = lambda: 'elsewhere'\n"
        "import filelock._soft._lease, hw3.runs.lock; hw3.runs.lock.LEASE_SECONDS = 1.0\n"
        "from hw3.runs.lock import exclusive_lock\n",
    )
    monkeypatch.setattr(hw3.runs.lock, "LEASE_SECONDS", 1.0)
    with subprocess.Popen([sys.executable, "-c", code, str(lock_file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            with pytest.raises(UserError, match=f"run: process {process.pid} on elsewhere"):  # noqa: SIM117
                with exclusive_lock(lock_file, "run"):
                    pytest.fail("both processes hold the lock")
        finally:
            process.kill()


def test_writing_lock_waits(lock_file: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hw3.runs.lock, "WAIT_SECONDS", 0.2)
    with pytest.raises(UserError, match="locked for 0 s by process"), writing_lock(lock_file):
        pytest.fail("both processes hold the lock")
    holder.kill()
    holder.wait()
    with writing_lock(lock_file):
        assert f"pid={os.getpid()}" in lock_file.read_text(encoding="utf-8")
