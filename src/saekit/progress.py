"""Progress that is shown by default: bars on a terminal, one text in a notebook, else a line every minute.

Everything goes to stderr, as plain text: names of files and models are never read as markup.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import ConfigError
from .settings import Progress, silent
from .terminal import plain

F = TypeVar("F", bound=Callable[..., Any])

DELAY = 2.0
"""Seconds after which a call of the library begins to show how far it is; shorter work shows nothing."""

EVERY = 60.0
"""Seconds between two lines about one stage, where stderr is neither a terminal nor a notebook."""

_REDRAW = 0.5  # seconds between two updates of a notebook
_TICK = 0.01  # seconds; no clock of a thread is more exact
_NAME, _BAR, _PAGE = 26, 16, 100  # columns

_inside: ContextVar[bool] = ContextVar("saekit_progress", default=False)


def shows_progress(function: F) -> F:
    """Decorate a function that takes `progress` so that it shows its progress unless told otherwise.

    Without `progress` (None) it is shown from `DELAY` seconds on; ``False`` or `saekit.settings.silent` shows none; a
    function gets every step instead. What the decorated function calls shows nothing of its own.
    """

    @functools.wraps(function)
    def shown(*args: Any, progress: Progress | bool | None = None, **kwargs: Any) -> Any:
        with _receiver(function.__name__, progress) as receiver:
            return function(*args, progress=receiver, **kwargs)

    assert inspect.signature(function).parameters["progress"].kind is inspect.Parameter.KEYWORD_ONLY
    return shown  # type: ignore[return-value]


@contextmanager
def _receiver(name: str, progress: Progress | bool | None) -> Iterator[Progress]:
    if progress is False or (_inside.get() and progress in (None, True)):
        progress = silent
    if progress is None or progress is True:
        with show_progress(delay=DELAY) as receiver:
            yield receiver
    elif callable(progress):
        with _as_inner():
            yield progress
    else:
        raise ConfigError(f"{name}: `progress` must be a function, None or False; got {progress!r}.")


@contextmanager
def _as_inner() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


@contextmanager
def show_progress(*, delay: float = 0.0) -> Iterator[Progress]:
    """Show the stages of the work inside the block on stderr.

    Parameters
    ----------
    delay
        Seconds from the beginning in which nothing is shown [0].
    """
    display = _display(delay)
    with _as_inner():
        try:
            yield display
        finally:
            display.close()


@dataclass
class Stage:
    """How far a stage is."""

    name: str
    begun: float
    done: int = 0
    total: int | None = None
    note: str = ""
    ended: float | None = None
    """When it reached its total."""

    @property
    def has_ended(self) -> bool:
        """Whether the total is reached."""
        return self.ended is not None

    def move(self, done: int, total: int | None, note: str) -> None:
        """Set how far it is."""
        self.done, self.total, self.note = done, total, plain(note)
        is_over = total is not None and done >= total
        self.ended = (self.ended or time.monotonic()) if is_over else None

    def count(self) -> str:
        """Return what is done, of how much."""
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def times(self) -> str:
        """Return the time it has taken, and about how long it will."""
        seconds = (self.ended or time.monotonic()) - self.begun
        if self.has_ended or not self.total or not self.done or seconds < 1:
            return clock(seconds)
        return f"{clock(seconds)}, {clock(seconds / self.done * (self.total - self.done))} left"

    def bar(self, width: int) -> str:
        """Return a bar, empty where the total is not known."""
        full = 0 if not self.total else round(width * min(self.done / self.total, 1))
        return "━" * full + "·" * (width - full)


def clock(seconds: float) -> str:
    """Return seconds as minutes and seconds.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lines_of(stages: list[Stage], width: int) -> str:
    """Return one line per stage, each at most `width` wide: notes are cut first, then bars, never the counts."""
    name = min(max((len(stage.name) for stage in stages), default=0), _NAME)
    count = max((len(stage.count()) for stage in stages), default=0)
    times = max((len(stage.times()) for stage in stages), default=0)
    bar = max(min(width - name - count - times - 7, _BAR), 0)
    found = []
    for stage in stages:
        cut = stage.name if len(stage.name) <= name else stage.name[: name - 1] + "…"
        line = f"{cut.ljust(name)} {stage.bar(bar)} {stage.count().rjust(count)}  {stage.times()}"
        full = f"{line}  {stage.note}".rstrip()
        found.append(full if len(full) <= width else full[: width - 1] + "…")
    return "\n".join(found)


class _Display:
    """The stages of some work, in the order in which they began."""

    def __init__(self, delay: float) -> None:
        self.stages: dict[str, Stage] = {}
        self.visible_from = time.monotonic() + delay
        self.since = time.monotonic()
        """The end of the stage before."""
        self.last: Stage | None = None
        """The stage that moved last."""

    def __call__(self, stage: str, done: int, total: int | None = None, note: str = "") -> None:
        now = time.monotonic()
        at = self.stages.setdefault(stage, Stage(plain(stage), self.since))
        had_ended = at.has_ended
        at.move(done, total, note)
        self.last = at
        if now >= self.visible_from:
            self.draw(at, at.has_ended and not had_ended)
        if at.has_ended and not had_ended:
            self.since = now

    def draw(self, stage: Stage, has_just_ended: bool) -> None:
        """Show a stage that has moved."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave what is written."""


class _Lines(_Display):
    """A line at the end of each stage, and one every minute before, also while the work tells nothing."""

    def __init__(self, delay: float) -> None:
        super().__init__(delay)
        self.told = self.since
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="saekit progress", daemon=True)
        self._thread.start()

    def draw(self, stage: Stage, has_just_ended: bool) -> None:
        if has_just_ended:
            note = f"   {stage.note}" if stage.note else ""
            self._tell(f"{stage.name}: {stage.done:,} in {time.monotonic() - self.since:.1f} s{note}")
        else:
            self._tell_again()

    def _tell_again(self) -> None:
        if time.monotonic() - self.told >= EVERY:
            self._tell(self._state())

    def _repeat(self) -> None:
        while not self._over.wait(max(self.told + EVERY - time.monotonic(), _TICK)):
            self._tell_again()

    def _state(self) -> str:
        """Return how far the stage is that moved last; between stages only how long it has taken so far."""
        stage = self.last
        if stage is None or stage.has_ended:
            return f"working: {clock(time.monotonic() - self.since)}"
        note = f"   {stage.note}" if stage.note else ""
        return f"{stage.name}: {stage.count().replace('/', ' of ')}, {stage.times()}{note}"

    def _tell(self, line: str) -> None:
        self.told = time.monotonic()
        _write(line)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class _Bars(_Display):
    """Bars that a terminal redraws."""

    def __init__(self, delay: float, console: Any) -> None:
        super().__init__(delay)
        self.console = console
        self.live: Any = None

    def draw(self, stage: Stage, has_just_ended: bool) -> None:
        if self.live is None:
            from rich.live import Live

            self.live = Live(console=self.console, get_renderable=self.text, refresh_per_second=4)
            self.live.start()

    def text(self) -> Any:
        from rich.text import Text

        lines = lines_of([*self.stages.values()], self.console.width)
        return Text(lines, no_wrap=True, overflow="ellipsis")

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


class _Notebook(_Display):
    """One text below the cell, which is written again."""

    def __init__(self, delay: float) -> None:
        super().__init__(delay)
        self.handle: Any = None
        self.written = 0.0

    def draw(self, stage: Stage, has_just_ended: bool) -> None:
        if has_just_ended or time.monotonic() - self.written >= _REDRAW:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        content = {"text/plain": lines_of([*self.stages.values()], _PAGE)}
        if self.handle is None:
            display = importlib.import_module("IPython.display").display
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)

    def close(self) -> None:
        if self.handle is not None:
            self.write()


def _display(delay: float) -> _Display:
    if sys.stderr is None or not (sys.stderr.isatty() or "IPython" in sys.modules):
        return _Lines(delay)  # without the import of rich
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        return _Notebook(delay)
    return _Bars(delay, console) if console.is_terminal else _Lines(delay)


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
