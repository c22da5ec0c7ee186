"""Output folders are built beside their place; what killed processes left is deleted by the next call."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.runs.staging import check_output_is_new, staging_folder

STAGE = """
import sys, time
from pathlib import Path
from hw3.common.signals import stopped_by_signals
from hw3.runs.staging import staging_folder
with stopped_by_signals(), staging_folder(Path(sys.argv[1])) as folder:
    (folder / "model").write_text("half")
    print("staged", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_staging_folder_leaves_nothing(tmp_path: Path, number: int) -> None:
    """After SIGKILL the next call deletes what is left, but no other hidden folder."""
    (tmp_path / ".export.mine").mkdir()
    output = tmp_path / "export"
    with subprocess.Popen(
        [sys.executable, "-c", STAGE, str(output)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"staged\n"
        with pytest.raises(UserError, match=f"export: process {process.pid} on .* is writing to it"):  # noqa: SIM117
            with staging_folder(output):
                pytest.fail("both processes write")
        process.send_signal(number)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != ".export.mine")
    assert (left == []) == (number != signal.SIGKILL)
    with staging_folder(output) as folder:
        assert list(folder.iterdir()) == []
        (folder / "done").mkdir()
        (folder / "done").rename(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export.mine", "export"]


def test_a_folder_that_exists_is_refused_and_what_is_left_beside_it_deleted(tmp_path: Path) -> None:
    for name in ("export", ".export.staging-a/export", ".exports.staging-a"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="export: already exists"):
        check_output_is_new(tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".exports.staging-a", "export"]


def test_a_folder_that_another_process_has_created_since_is_refused(tmp_path: Path) -> None:
    check_output_is_new(tmp_path / "export")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="export: already exists"), staging_folder(tmp_path / "export"):
        pytest.fail("the folder would be replaced")
