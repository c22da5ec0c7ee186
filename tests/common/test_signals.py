"""Signals raise an exception in a command, so that what it has begun is cleaned up."""

import os
import signal
import threading

import pytest

from hw3.common.signals import StoppedBySignal, stopped_by_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_stop_signals_raise_an_exception(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal) as stopped, stopped_by_signals():
        os.kill(os.getpid(), number)
    assert stopped.value.number == number and isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(number) == before


def test_sigusr2_is_ignored() -> None:
    with stopped_by_signals():
        os.kill(os.getpid(), signal.SIGUSR2)


def test_other_threads_install_no_handlers() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with stopped_by_signals():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []
