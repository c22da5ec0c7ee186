"""Progress of long work: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

from hw3.common.text import escape_invisible

# Without a terminal, a line is printed after this part of the work, but not more often than every so many seconds, and
# in any case after so many seconds.
PLAIN_LINE_FRACTION = 0.1
MIN_SECONDS_BETWEEN_LINES = 1.0
MAX_SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger(__name__)


def can_show_live_progress() -> bool:
    """Return whether this is the first process, notices are shown, and standard error is a terminal."""
    is_first_process = os.environ.get("RANK", "0") == "0"
    if not (is_first_process and logger.isEnabledFor(logging.INFO)):
        return False
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0  # terminals of CI services may have no width


class ProgressLine:
    """What has been done, of how much, and the time left.

    Only the first process shows it, and only if notices are shown.

    Args:
        name: what is being done, one word.
        total: amount of work in units.
        unit: name of the units, in the plural.
        initial: units done before.
        is_logged: without a terminal, print a line from time to time. If not, the caller prints its own lines.
        is_live: show a live line if standard error is a terminal.

    Attributes:
        is_live: whether a live line is shown.
        details: text after the count.
    """

    def __init__(
        self, name: str, total: int, unit: str, *, initial: int = 0, is_logged: bool = False, is_live: bool = True
    ) -> None:
        self.details = ""
        self._name, self._total, self._unit, self._done = name, total, unit, initial
        self.is_live = is_live and can_show_live_progress()
        self._is_logged = is_logged and not self.is_live
        self.restart_clock()
        self._last_line = self._started
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=name,
            unit=f" {unit}",
            bar_format="{desc} |{bar:20}| {n_fmt}/{total_fmt}{unit}{postfix}",
            dynamic_ncols=True,
            miniters=1,
            leave=False,
            disable=not self.is_live,
        )

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def restart_clock(self) -> None:
        """Measure the speed from now on. Call it after work that takes longer once, such as compilation."""
        self._started = (time.monotonic(), self._done)

    def advance(self, count: int = 1) -> None:
        """Count units that are done, and show the new count."""
        self._done += count
        self._bar.set_postfix_str(self.describe(), refresh=False)
        self._bar.update(count)
        if self._is_logged and self._is_line_due():
            self._last_line = (time.monotonic(), self._done)
            logger.info(f"{self._name}: {self._done} of {self._total} {self._unit}, {self.describe()}")

    def set_details(self, details: str) -> None:
        """Show another text after the count, at once."""
        self.details = details
        self._bar.set_postfix_str(self.describe())

    def time_left(self) -> str:
        """Return the time left at the mean speed since the clock was started, such as `03:12 left`.

        It is empty before the first unit and after the last one.
        """
        start_time, start_done = self._started
        if not start_done < self._done < self._total:
            return ""
        seconds_per_unit = (time.monotonic() - start_time) / (self._done - start_done)
        return f"{tqdm.format_interval(round(seconds_per_unit * (self._total - self._done)))} left"

    def describe(self) -> str:
        """Return the details and the time left."""
        return ", ".join(filter(None, (escape_invisible(self.details), self.time_left())))

    def close(self) -> None:
        """Remove the live line."""
        self._bar.close()

    def _is_line_due(self) -> bool:
        last_time, last_done = self._last_line
        seconds = time.monotonic() - last_time
        is_further = (
            self._done - last_done >= PLAIN_LINE_FRACTION * self._total and seconds >= MIN_SECONDS_BETWEEN_LINES
        )
        return is_further or seconds >= MAX_SECONDS_BETWEEN_LINES
