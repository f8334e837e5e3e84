"""How far work is: shown by default, never in the way, never cut where it counts."""

from __future__ import annotations

import importlib
import inspect
import io
import sys
import threading
import time
from types import ModuleType

import pytest

import saekit
from saekit import progress as module
from saekit.errors import ConfigError
from saekit.progress import Stage, lines_of, show_progress, shows_progress
from saekit.settings import silent


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    with monkeypatch.context() as patch:
        patch.setattr(module, "time", found)
        yield found


def work(clock: Clock, seconds: float, steps: int = 10):
    @shows_progress
    def count(*, progress=None):
        for done in range(1, steps + 1):
            clock.now += seconds / steps
            progress("rows", done * 100, steps * 100, "fvu 0.2")
        return progress

    return count


# ------------------------------------------------------------------ who sees it


def test_short_work_shows_nothing_and_longer_work_does(clock, capsys):
    work(clock, 1.9)()
    assert capsys.readouterr() == ("", "")
    work(clock, 20)()
    assert capsys.readouterr() == ("", "rows: 1,000 in 20.0 s   fvu 0.2\n")


def test_a_line_every_minute_without_a_terminal(clock, capsys):
    work(clock, 300, steps=1000)()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "rows: 20,000 of 100,000, 1:00, 4:00 left   fvu 0.2"
    assert lines[-1] == "rows: 100,000 in 300.0 s   fvu 0.2"


def test_a_line_also_while_the_work_tells_nothing(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "EVERY", 0.05)
        with show_progress() as progress:
            time.sleep(0.3)
            progress("rows", 5, 10)
            time.sleep(0.3)
            progress("rows", 10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: 0:00"
    assert "rows: 5 of 10, 0:00" in lines
    assert lines[-1].startswith("rows: 10 in 0.")
    assert not [each for each in threading.enumerate() if each.name == "saekit progress" and each.is_alive()]


@pytest.mark.parametrize("command", ["convert", "report", "push", "verify", "evaluate", "train", "classify", "catalog"])
def test_every_command_that_may_take_long_shows_that_it_works(command):
    """`catalog` reads a list that saekit brings along."""
    source = inspect.getsource(importlib.import_module(f"saekit.cli.{command}"))
    assert ("progress_of(" in source) == (command != "catalog")


@pytest.mark.parametrize("off", [False, silent])
def test_it_can_be_turned_off(clock, capsys, off):
    assert work(clock, 200)(progress=off) is silent
    assert capsys.readouterr().err == ""


def test_a_function_gets_every_step(clock, capsys):
    steps = []
    work(clock, 200)(progress=lambda *step: steps.append(step))
    assert len(steps) == 10
    assert steps[-1] == ("rows", 1000, 1000, "fvu 0.2")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("outer", [None, False, lambda *_: None])
def test_calls_inside_a_call_show_nothing_of_their_own(clock, capsys, outer):
    inner = []

    @shows_progress
    def study(*, progress=None):
        inner.append(work(clock, 200)())
        inner.append(work(clock, 200)(progress=None))

    study(progress=outer)
    assert inner == [silent, silent]
    assert capsys.readouterr().err == ""
    assert work(clock, 200)() is not silent  # outside again


def test_something_else_is_refused(clock):
    with pytest.raises(ConfigError, match="count: `progress` must be a function, None or False; got 'yes'"):
        work(clock, 1)(progress="yes")


def public_functions():
    for names in saekit.PUBLIC.values():
        for name, where in names.items():
            value = getattr(importlib.import_module(f"saekit.{where}"), name)
            if inspect.isfunction(value) and "progress" in inspect.signature(value).parameters:
                yield name, value


def test_every_public_function_that_takes_progress_shows_it():
    found = dict(public_functions())
    assert len(found) >= 9
    for name, function in found.items():
        assert inspect.signature(function).parameters["progress"].default is None, name
        while function is not None and function.__code__.co_name != "shown":
            function = getattr(function, "__wrapped__", None)
        assert function is not None, f"{name} is not decorated with shows_progress"


# ------------------------------------------------------------------ what it looks like


def stage(name: str, done: int, total: int | None, note: str = "") -> Stage:
    found = Stage(name, module.time.monotonic() - 75)
    found.move(done, total, note)
    return found


@pytest.mark.parametrize("width", [80, 100])
def test_totals_are_visible_at_any_width(clock, width):
    stages = [
        stage("capture", 400_000, 400_000),
        stage("train", 123_456_789, 1_000_000_000, "topk-1024-k16-seed0 fvu 0.237 l0 16 dead 0.01, 12,345 rows/s" * 2),
        stage("classify dictionaries of everything", 7, None, "arms"),
    ]
    lines = lines_of(stages, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "400,000/400,000" in lines[0]
    assert "123,456,789/1,000,000,000" in lines[1]
    assert "left" in lines[1]
    assert lines[1].endswith("…")
    assert " 7 " in lines[2]
    assert len({line.index("1:15") for line in lines}) == 1  # in columns


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_names_as_they_are(monkeypatch):
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "xterm")
        with show_progress() as progress:
            progress("[red]rows[/red]", 5, 10, "a\x1b[31mb [bold]")
    shown = screen.getvalue()
    assert "[red]rows[/red]" in shown
    assert "a?[31mb [bold]" in shown
    assert "5/10" in shown


def test_a_notebook_writes_one_text_again(clock, monkeypatch):
    written = []

    class Handle:
        def update(self, content, raw):
            written.append(content["text/plain"])

    def display(content, raw, display_id):
        written.append(content["text/plain"])
        return Handle()

    class ZMQInteractiveShell:
        pass

    ipython, shown = ModuleType("IPython"), ModuleType("IPython.display")
    shown.display = display
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "IPython", ipython)
        patch.setitem(sys.modules, "IPython.display", shown)
        patch.setitem(__builtins__, "get_ipython", lambda: ZMQInteractiveShell())
        work(clock, 30)()
        work(clock, 1)()
    assert 2 <= len(written) <= 12
    assert "1,000/1,000" in written[-1]
