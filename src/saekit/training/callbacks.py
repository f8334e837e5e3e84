"""Where log records can go besides ``log.jsonl``: TensorBoard, Weights & Biases, trackio, or a function of your own.

A callback is anything with ``log(record)`` and ``close()``; a plain function of the record also works. Records are the
lines of ``log.jsonl``: ``learner``, ``step``, ``rows`` and numbers. Packages are imported when the callback is made.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

from ..errors import MissingExtraError

Record = Mapping[str, int | float | str | None]
Receiver = Callable[[Record], object]


@runtime_checkable
class Callback(Protocol):
    """An object that receives every log record."""

    def log(self, record: Record) -> None:
        """Take one record of one learner."""
        ...

    def close(self) -> None:
        """Take note that the run has ended, in whatever way."""
        ...


class TensorBoard:
    """Scalars as TensorBoard event files, one run per learner."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._make = _require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder = os.fspath(folder)
        self._writers: dict[str, Any] = {}

    def log(self, record: Record) -> None:
        """Write the record's numbers at its step."""
        learner = str(record["learner"])
        if learner not in self._writers:
            self._writers[learner] = self._make(os.path.join(self._folder, learner))
        for name, value in _numbers(record).items():
            self._writers[learner].add_scalar(name, value, int(record["step"] or 0))

    def close(self) -> None:
        """Flush and close the event files."""
        for writer in self._writers.values():
            writer.close()


class _Service:
    """A logging service with ``init``, ``log`` and ``finish`` at module level; learners are prefixes of the names."""

    def __init__(self, package: str, settings: dict[str, Any]) -> None:
        self._service = _require(package, package)
        self._run = self._service.init(**settings)

    def log(self, record: Record) -> None:
        """Send the record's numbers at its step."""
        learner = record["learner"]
        values = {f"{learner}/{name}": value for name, value in _numbers(record).items()}
        self._run.log(values, step=int(record["step"] or 0))

    def close(self) -> None:
        """End the service's run."""
        self._run.finish()


class WandB(_Service):
    """Weights & Biases; `settings` go to ``wandb.init`` (project, name, mode, ...)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("wandb", settings)


class Trackio(_Service):
    """trackio; `settings` go to ``trackio.init`` (project, name, ...)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("trackio", settings)


CALLBACKS: dict[str, Callable[..., Callback]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
"""Callbacks by name."""


def receiver(callback: Callback | Receiver, stack: ExitStack) -> Receiver:
    """Return the function that takes records; `stack` closes the callback when it ends."""
    if isinstance(callback, Callback):
        stack.callback(callback.close)
        return callback.log
    return callback


def _numbers(record: Record) -> dict[str, float]:
    skipped = ("step", "learner")  # the first is the axis, the second part of the name
    return {
        n: v for n, v in record.items() if n not in skipped and isinstance(v, int | float) and not isinstance(v, bool)
    }


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"logging to {extra} needs the package `{extra}`; it is not installed ({error}). "
            f"Type: pip install 'saekit[{extra}]'"
        ) from None
