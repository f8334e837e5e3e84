"""Find the results in a folder: saved result files, and the log of a training run as a result of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, SaekitError
from ..files import check_path, parse_json, read_bytes, read_sealed
from ..forms import NATURAL, check_form
from ..measure.results import Result
from .page import Shown, Unread, write

_LOG = "log.jsonl"
_RUN = "run.json"
_CLASSIFIER = "classifier.json"
_CURVES = ("fvu", "l0", "dead_fraction")


@dataclass(frozen=True)
class Collected:
    """What a folder holds."""

    shown: list[Shown]
    """Results with their sections, in the order of their files."""
    unread: list[Unread]
    """Files that should have been results."""
    date: str
    """The day on which the newest of these files was written."""

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """The results as JSON objects."""
        return [each.result for each in self.shown]

    def told(self, page: Path) -> str:
        """Return what a user must know of a page that is made of a part of the files."""
        lines = "".join(f"\n  {each.file}: {each.why}" for each in self.unread)
        return f"`{page}` must show all results of its folder; it is made without what cannot be read:{lines}"


def write_report(folder: str | os.PathLike[str], *, title: str = "saekit report") -> Path:
    """Write ``report.html`` from the results in a folder, as ``saekit report`` does, and return its path.

    A file that cannot be read is named on the page and in a Python warning; the page is made of the others.

    Parameters
    ----------
    folder
        Folder with results (``evaluation.json``, say) and training runs; see `collect`.
    title
        Heading of the page.

    Raises
    ------
    ConfigError, FormatError
        As `collect`.
    """
    found = collect(folder)
    page = write(found.shown, folder, title=title, date=found.date, unread=found.unread)
    if found.unread:
        warnings.warn(found.told(page), stacklevel=2)
    return page


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _date_of(files: Sequence[Path]) -> str:
    """Return the day on which the newest of some files was written; empty where none says."""
    newest = 0.0
    for file in files:
        with suppress(OSError):  # of a link to nowhere
            newest = max(newest, file.stat().st_mtime)
    if not newest:
        return ""
    day = datetime.fromtimestamp(newest).astimezone()
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def collect(folder: str | os.PathLike[str]) -> Collected:
    """Read every result in `folder` and one level below: ``*.json`` with a known ``kind``, and training logs.

    A file that is no JSON, or a result that was altered, cut off or written by a newer release, is left out and named.

    Raises
    ------
    ConfigError
        The folder does not exist or holds no result.
    FormatError
        There are files, but none can be read.
    """
    folder = check_path(folder)
    if not folder.is_dir():
        raise ConfigError(f"a report needs a folder with results; `{folder}` is not a folder.")
    results: list[Shown] = []
    unread: list[Unread] = []
    files = _files_of(folder)
    for file in files:
        try:
            found = [Shown.of(each) for each in _results_of(file)]  # what cannot be shown must not stop the others
        except (SaekitError, OSError) as error:
            unread.append(Unread(os.fspath(file.relative_to(folder)), _why(error, file)))
        else:
            results += found
    if not results and unread:
        raise FormatError(
            f"a report needs results; of {len(unread)} files in `{folder}` none can be read. {unread[0].file}: "
            f"{unread[0].why}"
        )
    if not results:
        raise ConfigError(
            f"`{folder}` must hold results (evaluation.json, say) or a training run (log.jsonl); it holds neither. "
            "Run `saekit evaluate … --out` or `saekit train` first."
        )
    return Collected(results, unread, _date_of(files))


def _files_of(folder: Path) -> list[Path]:
    """Return the files that may hold results, each once whatever links lead to it: JSON, then logs."""
    names = ("*.json", "*/*.json", _LOG, f"*/{_LOG}")
    found = [file for name in names for file in sorted(folder.glob(name)) if not file.is_dir()]
    return list({os.path.realpath(file): file for file in reversed(found)}.values())[::-1]


def _results_of(file: Path) -> list[dict[str, Any]]:
    """Return the results in a file: none in JSON of another kind."""
    if file.name == _LOG:
        return [training_log(file)]
    if file.name == _CLASSIFIER:
        return [saved_classifier(file)]
    found = read_result(file)
    return [] if found is None else [found]


def _why(error: Exception, file: Path) -> str:
    """Return why a file cannot be read, without its name."""
    if isinstance(error, FileNotFoundError):
        return "a link to a file that is not there"
    text = str(error) if isinstance(error, SaekitError) else str(getattr(error, "strerror", None) or error)
    return text.removeprefix(f"`{file}`").removeprefix(":").strip()


def read_result(path: Path) -> dict[str, Any] | None:
    """Read a result, checked and in the layout of this release; None for JSON that is no result.

    Raises
    ------
    FormatError
        As `load_result`.
    """
    found = load_result(path)
    return None if found is None else found.to_json()


def load_result(path: Path) -> Result | None:
    """Return the value of a result file; None for JSON that is no result.

    Raises
    ------
    FormatError
        It was altered, does not hold what a result of its kind holds, or comes from a newer release.
    """
    data = read_bytes(path)
    value = parse_json(data, path, finite=False)
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _RESULTS:
        return None
    plain = parse_json(data, path)
    module, name = _RESULTS[kind].split(":")
    try:
        found: Result = getattr(import_module(module, __package__), name).from_json(plain)
    except FormatError as error:
        raise FormatError(f"`{path}`: {error}") from None
    return found


_RESULTS = {
    "evaluation": "..evaluation.result:Evaluation",
    "verification": "..evaluation.verification:Verification",
    "comparison": "..comparison.result:Comparison",
    "source_comparison": "..comparison.sources:SourceComparison",
    "orphans": "..comparison.orphans_result:Orphans",
    "size_curve": "..sizes.result:SizeCurve",
    "k_choice": "..sizes.k_choice:KChoice",
    "progressive": "..sizes.result:Progressive",
    "classification": "..classification.result:Classification",
    "classification_summary": "..classification.result:ClassificationSummary",
    "transfer": "..classification.transfer_result:Transfer",
    "decisions": "..classification.decisions_result:Decisions",
    "actions": "..classification.model_answers:Actions",
    "explanation": "..explanation.explanation_result:Explanation",
    "label_scores": "..explanation.label_scores_result:LabelScores",
    "effects": "..explanation.effects_result:Effects",
    "steered": "..explanation.steering:Steered",
}
"""Kind of result -> where its class is; imported when there is one to read."""


def training_log(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the log of a training run (``log.jsonl``, and ``run.json`` next to it) as a result of kind ``training``.

    Raises
    ------
    FormatError
        A line is not a JSON object. A cut-off last line (a run that was killed) is left out.
    """
    path = check_path(path)
    learners: dict[str, dict[str, list[Any]]] = {}
    lines = read_bytes(path).splitlines()
    for count, line in enumerate(lines, start=1):
        try:
            record = parse_json(line, path)
            check_form(record, {"rows": NATURAL}, path)
            own = _learners_of(record, path)
        except FormatError:
            if count == len(lines):
                break
            raise FormatError(f"`{path}`: line {count} must be a JSON object; it is {line[:60]!r}.") from None
        for name, values in own:
            log = learners.setdefault(name, {"rows": [], **{curve: [] for curve in _CURVES}})
            log["rows"].append(record.get("rows"))
            for curve in _CURVES:
                log[curve].append(values.get(curve))
    file = path.with_name(_RUN)
    run = _read_run(file) if file.is_file() else {}
    warnings = run.get("warnings", [])
    return {
        "kind": "training",
        "schema": 1,
        "run": run,
        "learners": learners,
        "warnings": _named(warnings) if isinstance(warnings, list) else [],  # of older runs: shown with `run`
    }


def saved_classifier(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the card of a saved classifier as a result of kind ``classifier``.

    Raises
    ------
    FormatError
        It was altered, or does not hold what such a card holds.
    """
    record = read_sealed(check_path(path), since=2, version="schema")
    check_form(record, {"arm": str, "sae": str, "top_latents": dict}, path)
    return {
        "kind": "classifier",
        "schema": 1,
        "arm": record["arm"],
        "sae": {"digest": record["sae"]},
        "top_latents": record["top_latents"],
        "settings": {},
        "warnings": [],
    }


def _named(warnings: list[Any]) -> list[Any]:
    """Return warnings of a run with the SAE that each is about in its text."""
    return [
        {**each, "message": f"{each['sae']}: {each.get('message')}"}
        if isinstance(each, dict) and "sae" in each
        else each
        for each in warnings
    ]


def _read_run(path: Path) -> dict[str, Any]:
    record = read_sealed(path, since=2, version="format")
    check_form(record, dict, path)
    return dict(record)


def _learners_of(record: Mapping[str, Any], path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the learners that one line of the log is about, with their numbers."""
    if isinstance(record.get("learners"), Mapping):
        found = list(record["learners"].items())
    else:
        name = record.get("learner") or record.get("sae")
        found = [(str(name), record)] if name and "fvu" in record else []
    for name, values in found:
        check_form(values, dict, path, name)
        check_form({curve: values.get(curve) for curve in _CURVES}, dict.fromkeys(_CURVES, (float, None)), path, name)
    return found
