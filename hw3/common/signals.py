"""Signals that end a command: they raise an exception, so that temporary files are removed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# SIGINT is Ctrl-C, for which Python raises KeyboardInterrupt. Clusters send the others before they end a job, and a
# closed terminal sends SIGHUP. Windows lacks some of them; `hw3.cli.main` refuses to run there.
STOP_SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
# Training saves a checkpoint and continues; other commands ignore it.
SAVE_SIGNAL: signal.Signals = getattr(signal, "SIGUSR2", signal.SIGTERM)


class StoppedBySignal(KeyboardInterrupt):
    """A signal asks the command to stop.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `StoppedBySignal` for each stop signal inside the block. Only the main thread can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, _raise) for number in STOP_SIGNALS}
    handlers[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise StoppedBySignal(number)
