"""The identity of a data file, as manifest, results and predictions store it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hw3.common.hashing import file_sha256
from hw3.common.paths import portable_path
from hw3.data.rows import Row


class DatasetFingerprint(BaseModel):
    """Path, content and size of a data file.

    Attributes:
        path: relative to the working directory; only the name for a file outside it.
        sha256: of the file's bytes.
        rows: number of rows.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    sha256: str
    rows: int

    def is_of_another_file(self, current: DatasetFingerprint, path: Path) -> bool:
        """Return whether this fingerprint belongs to a different file that has the same name as `path`.

        A file inside the working directory stays the same file when its content is edited. Of a file outside, only the
        name is stored, and names repeat, so other content means another file.

        Args:
            current: fingerprint of `path` now.
            path: the data file.
        """
        edited = self.path == current.path and path.resolve().is_relative_to(Path.cwd())
        return not edited and self.sha256 != current.sha256


def dataset_fingerprint(path: Path, rows: Sequence[Row]) -> DatasetFingerprint:
    """Return the fingerprint of a data file that has been read."""
    return DatasetFingerprint(path=portable_path(path), sha256=file_sha256(path), rows=len(rows))
