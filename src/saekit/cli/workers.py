"""``--workers N``: the same call in further processes, which compute cells of the same folder and write no result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Annotated

import typer

from ..errors import ConfigError
from ..grid import Sharing, check_part
from .console import print_json, tell

CALL: ContextVar[tuple[str, ...]] = ContextVar("CALL", default=())
"""Arguments of the command that runs."""

VARIABLE = "SAEKIT_WORKER"
"""Environment variable of a process that another call has started."""

COMMAND = ("-P", "-m", "saekit")
"""How Python runs it; nothing is imported from the folder that the call was made in."""

PATIENCE = 30.0
"""Time in which a worker that was told to end must do so. Unit: seconds."""

Workers = Annotated[
    int,
    typer.Option(
        "--workers", metavar="N", help="Processes that compute parts; calls on other machines may join [1, alone]."
    ),
]
Part = Annotated[
    str, typer.Option("--part", metavar="I/N", help="Part of an array job, 0/16 to 15/16; nothing but the cells.")
]


def sharing_of(workers: int | None, part: str | None, *, has_folder: bool) -> Sharing | None:
    """Return how the cells are shared, from the options; None: not at all.

    Raises
    ------
    ConfigError
        Fewer than one worker, both options, a part outside of its range, or no folder.
    """
    if workers is None and part is None:
        return None
    if not has_folder:
        raise ConfigError("--workers and --part need a folder that all processes see: give --out.")
    if workers is not None and part is not None:
        raise ConfigError("--workers and --part must not be given together: a part has its process.")
    if workers is not None and not 1 <= workers <= 1024:
        raise ConfigError(f"--workers must be 1 to 1,024; got {workers}.")
    return Sharing(part=None if part is None else check_part(part, "--part"))


def only_cells(part: str | None) -> bool:
    """Return whether this process computes cells and leaves the result to others."""
    return part is not None or VARIABLE in os.environ


def tell_cells(n_done: int, n: int, *, json: bool) -> None:
    """Print how much of the work is done."""
    if json:
        print_json({"cells": n, "done": n_done})
        return
    tell(f"{n_done} of {n} cells are there; the same call without --part makes the result of them")


@contextmanager
def started(workers: int | None) -> Iterator[None]:
    """Run the same call in `workers` - 1 further processes while the block runs; they end before it does.

    One that dies is told, and does no harm: this process computes what is left.
    """
    team: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # this saekit, no other
    environment = {**os.environ, VARIABLE: "1", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        for _ in range((workers or 1) - 1 if VARIABLE not in os.environ else 0):
            log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
            command = [sys.executable, *COMMAND, *CALL.get()]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=environment
            )
            team.append((process, log))
        yield
        for process, said in team:
            process.wait()
            _tell_failure(process, said)
    finally:
        for process, _ in team:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process, said in team:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            said.close()


def _tell_failure(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    if process.returncode:
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        if process.returncode < 0:
            tell(
                f"a worker was killed by {signal.Signals(-process.returncode).name} (out of memory?); this process "
                "computes what it had begun. Use fewer --workers if that comes again"
            )
            return
        tell(f"a worker ended with status {process.returncode}: {lines[-1] if lines else 'without a word'}")
