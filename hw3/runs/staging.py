"""Build an output folder beside its place, so that it appears only when it is complete."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hw3.common.disk import check_folder_is_new
from hw3.common.errors import UserError
from hw3.runs.lock import exclusive_lock

OPTION = "OUTPUT= (--output)"


def check_output_is_new(output: Path) -> None:
    """Check that an output folder can be created. Delete what a process that was killed has left beside it.

    Raises:
        UserError: the folder exists, or it cannot be created.
    """
    if output.exists():
        with contextlib.suppress(UserError), _lock(output):
            _remove_leftovers(output)
    check_folder_is_new(output, OPTION)


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output`, and delete it afterwards. Rename its content to `output` inside the block.

    Folders that processes left when they were killed are deleted first.

    Args:
        output: the folder to create. Its parent folder is created.

    Raises:
        UserError: another process is creating the same folder, or has created it.
    """
    with _lock(output):
        check_folder_is_new(output, OPTION)
        _remove_leftovers(output)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=_prefix(output)))
        try:
            yield folder
        finally:
            try:
                shutil.rmtree(folder)
            except KeyboardInterrupt:  # a signal, while the folder is deleted
                shutil.rmtree(folder, ignore_errors=True)
                raise


def _lock(output: Path) -> contextlib.AbstractContextManager[None]:
    return exclusive_lock(output.with_name(f".{output.name}.lock"), str(output))


def _prefix(output: Path) -> str:
    return f".{output.name}.staging-"


def _remove_leftovers(output: Path) -> None:
    for leftover in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        shutil.rmtree(leftover)
