"""Ctrl-C and SIGTERM: long work ends at the next point where everything that is done can be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interruption:
    """Whether somebody wants the work to end."""

    requested: bool = False


@contextmanager
def noted_interrupts() -> Iterator[Interruption]:
    """Note the first Ctrl-C or SIGTERM in this block instead of raising it; a second one stops at once.

    The block looks at ``requested``, keeps what is done and raises ``KeyboardInterrupt``; where it ends first, that is
    raised at its end. In other threads than the main one, and where the application handles a signal itself, nothing is
    changed.
    """
    found = Interruption()
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        if found.requested:
            raise KeyboardInterrupt("stopped at once")
        found.requested = True

    if threading.current_thread() is threading.main_thread():
        usual = (signal.default_int_handler, signal.SIG_DFL)
        before = {each: signal.signal(each, note) for each in SIGNALS if signal.getsignal(each) in usual}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if found.requested:
        raise KeyboardInterrupt
