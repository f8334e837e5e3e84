"""Every error that saekit raises on purpose.

::

    SaekitError
    ├── ConfigError      (ValueError)    a setting that cannot work, or an unknown one
    ├── ShapeError       (ValueError)    tensors whose shapes do not fit together
    ├── DataError        (ValueError)    text, tables or rows that cannot be used
    │   └── InputError                   ... as they are read: not there, empty, of another kind, too few for the task
    ├── FormatError      (ValueError)    a file that is truncated, altered, too new or of another kind
    │   └── MissingFileError             ... because the call names one that is not there
    ├── ModelError       (RuntimeError)  a language model or one of its modules that is not available
    │   ├── MissingModelError            ... because the call names one that is not there
    │   └── OfflineError                 ... because there is no network
    ├── NonFiniteError   (RuntimeError)  NaN or infinity appeared during training
    ├── BusyError        (RuntimeError)  a folder that another run is writing to
    ├── StorageError     (OSError)       a file or folder that cannot be written: a full disk, no permission
    └── MissingExtraError (ImportError)  an optional package that is not installed

A message has four parts: where, what must hold, what came, what to do. The command line prints the message and exits
with status 2 for errors in the call (`CALL_ERRORS`) and 1 for work that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .terminal import plain


class SaekitError(Exception):
    """Base class: ``except saekit.SaekitError`` catches everything saekit raises on purpose."""

    def __str__(self) -> str:
        """Return the message, made `plain`: names and texts in it come from anywhere."""
        return plain(str(self.args[0]) if self.args else "", keep="\n\t")


class ConfigError(SaekitError, ValueError):
    """A setting is unknown or out of range. Correct the call; nothing was computed."""


class ShapeError(SaekitError, ValueError):
    """Tensors, an SAE or a model do not fit together."""


class DataError(SaekitError, ValueError):
    """Text, a table or rows cannot be used: a missing column, no text, NaN."""


class FormatError(SaekitError, ValueError):
    """A file is truncated, altered, from a newer schema, or not what it was taken for."""


class ModelError(SaekitError, RuntimeError):
    """A language model, or a module inside it, cannot be found or loaded."""


class InputError(DataError):
    """What the call names is not there, is empty, or cannot serve for what is asked; nothing was computed."""


class MissingFileError(FormatError):
    """The call names a file or folder that is not there; nothing was computed."""


class MissingModelError(ModelError):
    """The call names a model, or a module inside it, that is not there; nothing was computed."""


CALL_ERRORS = (ConfigError, ShapeError, InputError, MissingFileError, MissingModelError)
"""Errors of a wrong call: the command line ends with 2, and nothing was computed."""


class OfflineError(ModelError):
    """Something would have to be downloaded and there is no network. Give a local path instead."""


class NonFiniteError(SaekitError, RuntimeError):
    """NaN or infinity appeared during training; the message names step, seed and the last good checkpoint."""


class BusyError(SaekitError, RuntimeError):
    """The output folder is in use by another run."""


class RankError(SaekitError, RuntimeError):
    """Another process of a distributed run is gone, does not answer, or never came."""


class StorageError(SaekitError, OSError):
    """A file or folder cannot be written: a full disk, no permission. What was complete before is still there."""


class PlaceWarning(UserWarning):
    """An SAE is used on other rows than those it was trained for; `code` says in what they differ."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(plain(message, keep="\n\t"))
        self.code = code


class MissingExtraError(SaekitError, ImportError):
    """An optional package is not installed; the message holds the line to type."""


def listed(names: Iterable[object], limit: int = 5) -> str:
    """Return names in backticks, shortened to `limit` with the count of the rest.

    >>> listed(["a", "b", "c"], limit=2)
    '`a`, `b` and 1 more'
    """
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return a sentence that suggests the nearest options, or lists them when none is near.

    >>> did_you_mean("warmup_step", ["warmup_steps", "lr"])
    'Did you mean `warmup_steps`?'
    """
    options = list(options)
    return nearest(word, options).lstrip() or f"Known: {listed(options, 12)}."


def nearest(word: object, options: Iterable[str]) -> str:
    """Return a space and a sentence that suggests the nearest options, for a message that lists them; else nothing.

    >>> nearest("warmup_step", ["warmup_steps", "lr"]), nearest(3, ["lr"])
    (' Did you mean `warmup_steps`?', '')
    """
    near = difflib.get_close_matches(word, list(options), n=3, cutoff=0.6) if isinstance(word, str) else []
    return f" Did you mean {listed(near)}?" if near else ""
