"""Find the results in a folder: saved result files, and the log of a training run as a result of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..files import check_path, parse_json, read_bytes, read_sealed
from ..forms import NATURAL, check_form
from ..measure.results import Result
from .page import write

_LOG = "log.jsonl"
_RUN = "run.json"
_CLASSIFIER = "classifier.json"
_CURVES = ("fvu", "l0", "dead_fraction")


def write_report(folder: str | os.PathLike[str], *, title: str = "saekit report") -> Path:
    """Write ``report.html`` from the results in a folder, as ``saekit report`` does, and return its path.

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
    return write(collect(folder), folder, title=title, date=date_of(folder))


def date_of(folder: str | os.PathLike[str]) -> str:
    """Return the day on which the newest result of a folder was written."""
    folder = check_path(folder)
    newest = max((file.stat().st_mtime for file in _files_of(folder)), default=0.0)
    day = datetime.fromtimestamp(newest).astimezone()
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _files_of(folder: Path) -> list[Path]:
    names = ("*.json", "*/*.json", _LOG, f"*/{_LOG}")
    return [file for name in names for file in sorted(folder.glob(name))]


def collect(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read every result in `folder` and one level below: ``*.json`` with a known ``kind``, and training logs.

    Raises
    ------
    ConfigError
        The folder does not exist or holds no result.
    FormatError
        A file is not JSON, or a result that was altered or comes from a newer release.
    """
    folder = check_path(folder)
    if not folder.is_dir():
        raise ConfigError(f"a report needs a folder with results; `{folder}` is not a folder.")
    files = _files_of(folder)
    saved = [value for file in files if file.suffix == ".json" and (value := read_result(file)) is not None]
    logs = [training_log(file) for file in files if file.name == _LOG]
    found = [*saved, *(saved_classifier(file) for file in files if file.name == _CLASSIFIER), *logs]
    if not found:
        raise ConfigError(
            f"`{folder}` must hold results (evaluation.json, say) or a training run (log.jsonl); it holds neither. "
            "Run `saekit evaluate … --out` or `saekit train` first."
        )
    return found


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
    "comparison": "..comparison.result:Comparison",
    "orphans": "..comparison.orphans_result:Orphans",
    "size_curve": "..sizes.result:SizeCurve",
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
    path = Path(path)
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
    record = read_sealed(Path(path), since=2, version="schema")
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
