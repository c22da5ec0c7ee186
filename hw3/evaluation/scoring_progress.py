"""Progress of `hw3 eval`: entries that are done, rows of the present one, and the time left."""

from __future__ import annotations

from hw3.common.progress import ProgressLine


class ScoringProgress:
    """Count the rows that this process scores, and the entries that all processes have finished.

    Args:
        entries: number of entries to score.
        rows: number of rows that this process will score, over all entries.
    """

    def __init__(self, entries: int, rows: int) -> None:
        self._line = ProgressLine("eval", rows, "rows")
        self._entries, self._entries_done = entries, 0
        self._title, self._rows, self._rows_done = "", 0, 0

    def start_entry(self, title: str, rows: int) -> None:
        """Show another entry, of which this process will score `rows` rows."""
        self._title, self._rows, self._rows_done = title, rows, 0
        self._show()

    def add_rows(self, count: int) -> None:
        """Count rows of the present entry."""
        self._rows_done += count
        self._show()
        self._line.advance(count)

    def finish_entry(self) -> None:
        """Count the rows of the present entry that were left out because its checkpoint is invalid."""
        if left_out := self._rows - self._rows_done:
            self.add_rows(left_out)

    def count_entry(self) -> str:
        """Count an entry that is finished on all processes; return the number done and the time left."""
        self._entries_done += 1
        self._show()
        return ", ".join(filter(None, (f"{self._entries_done}/{self._entries}", self._line.time_left())))

    def describe(self) -> str:
        """Return entries that are done, the present one with its rows, and the time left."""
        return self._line.describe()

    def close(self) -> None:
        """Remove the line."""
        self._line.close()

    def _show(self) -> None:
        self._line.details = (
            f"{self._entries_done}/{self._entries} entries, {self._title} {self._rows_done}/{self._rows}"
        )
