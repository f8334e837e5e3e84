"""The page: sections by kind of result, put into one template, with the JSON they come from embedded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, SaekitError, listed
from ..files import write_bytes
from ..places import Warned
from ..terminal import escaped, plain
from . import charts
from .classification import classification, classification_summary
from .comparison import across, comparison, lighter, orphans
from .effects import effects, steered
from .evaluation import evaluation
from .explanation import explanation
from .model_answers import actions
from .parts import Cell, Section, Table
from .sizes import progressive, size_curve
from .training import training
from .transfer import transfer

PAGE = "report.html"

RENDERERS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "evaluation": evaluation,
    "training": training,
    "comparison": comparison,
    "orphans": orphans,
    "size_curve": size_curve,
    "progressive": progressive,
    "classification": classification,
    "classification_summary": classification_summary,
    "transfer": transfer,
    "actions": actions,
    "explanation": explanation,
    "effects": effects,
    "steered": steered,
}
"""Kind of result -> the function that shows it: JSON in, sections out. A new kind is one function and one row."""


def write(results: Sequence[object], folder: str | os.PathLike[str], *, title: str = "saekit report") -> Path:
    """Write `results` as ``report.html`` into `folder`: one file that needs no network and no other file.

    Parameters
    ----------
    results
        Result objects with ``to_json()``, or what that returned: JSON objects with a ``kind``.
    folder
        Created if missing.
    title
        Heading of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DataError
        A result is of an unknown kind, or there is none.
    """
    path = Path(folder) / PAGE
    write_bytes(path, render(results, title=title).encode())
    return path


def render(results: Sequence[Any], *, title: str = "saekit report") -> str:
    """Return the HTML text of the page; parameters and errors as in `write`."""
    import jinja2

    plain = [result if isinstance(result, Mapping) else result.to_json() for result in results]
    if not plain:
        raise DataError("a report needs at least one result; got none. Run `saekit evaluate` or `saekit train` first.")
    shown = [section for result in plain for section in _sections_of(result)] + across(plain)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saekit", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        sections=list(enumerate(shown)),
        data=embedded([lighter(each) for each in plain]),
        own_ids=charts.with_own_ids,
    )


def _shown(value: object) -> Any:
    """Return text without signs that turn or hide what stands on the page; markup of our own as it is."""
    return plain(value, keep="\n\t") if type(value) is str else value


def _sections_of(result: Mapping[str, object]) -> Sequence[Section]:
    kind = result.get("kind")
    if kind not in RENDERERS:
        raise DataError(f"a report shows results of the kinds {listed(RENDERERS)}; got {kind!r}.")
    try:
        main, *rest = RENDERERS[kind](result)
        return [main, *_warnings(result), *rest]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, SaekitError):
            raise
        raise DataError(
            f"a result of kind {kind!r} must hold what such results hold; it cannot be shown: {error!r:.200}. "
            "Make it again."
        ) from error


def _warnings(result: Mapping[str, Any]) -> list[Section]:
    """Show the warnings of a result; older files have plain texts, some of them in `notes`."""
    told = [Warned.from_json(each) for name in ("notes", "warnings") for each in result.get(name) or ()]
    return [Section("Warnings", "", [Table(("",), [[Cell(str(each))] for each in told])])] if told else []


def embedded(value: object) -> str:
    r"""Return JSON text that may stand inside a ``<script>``: nothing in it can end the element.

    >>> embedded({"token": "</script>"})
    '{"token":"\\u003c/script>"}'
    """
    return escaped(value, separators=(",", ":")).replace("<", "\\u003c")
