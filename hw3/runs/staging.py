"""Build an output folder beside its place, so that it appears only when it is complete."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hw3.runs.lock import exclusive_lock


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output`, and delete it afterwards. Rename its content to `output` inside the block.

    Folders that processes left when they were killed are deleted first.

    Args:
        output: the folder to create. Its parent folder is created.

    Raises:
        UserError: another process is creating the same folder.
    """
    prefix = f".{output.name}.staging-"
    with exclusive_lock(output.with_name(f".{output.name}.lock"), str(output)):
        for leftover in output.parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix) as folder:
            yield Path(folder)
