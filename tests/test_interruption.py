"""The first Ctrl-C is noted, the second is raised; handlers are as before afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from saekit.interruption import SIGNALS, noted_interrupts

pytestmark = pytest.mark.usefixtures("ctrl_c")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_noted_and_the_second_raised(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    noted = []

    def twice() -> None:
        with noted_interrupts() as interruption:
            noted.append(interruption.requested)
            os.kill(os.getpid(), number)
            noted.append(interruption.requested)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        twice()
    assert noted == [False, True]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_one_that_nobody_looked_at_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), noted_interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_of_the_application_and_other_threads_are_left_alone() -> None:
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with noted_interrupts() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1]
    assert not interruption.requested
    seen = []

    def elsewhere() -> None:
        with noted_interrupts() as interruption:
            seen.append(interruption.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]
