"""Find the results in a folder: saved result files, and the log of a training run as a result of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..files import read_json
from .page import RENDERERS, write

_LOG = "log.jsonl"
_RUN = "run.json"
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
    return write(collect(folder), folder, title=title)


def collect(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read every result in `folder` and one level below: ``*.json`` with a known ``kind``, and training logs.

    Raises
    ------
    ConfigError
        The folder does not exist or holds no result.
    FormatError
        A file is not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"a report needs a folder with results; `{folder}` is not a folder.")
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    saved = [value for file in files if _is_result(value := read_json(file))]
    logs = [training_log(file) for file in (*sorted(folder.glob(_LOG)), *sorted(folder.glob(f"*/{_LOG}")))]
    found = [*saved, *logs]
    if not found:
        raise ConfigError(
            f"`{folder}` must hold results (evaluation.json, say) or a training run (log.jsonl); it holds neither. "
            "Run `saekit evaluate … --out` or `saekit train` first."
        )
    return found


def _is_result(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("kind") in RENDERERS


def training_log(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the log of a training run (``log.jsonl``, and ``run.json`` next to it) as a result of kind ``training``.

    Raises
    ------
    FormatError
        A line is not a JSON object. A cut-off last line (a run that was killed) is left out.
    """
    path = Path(path)
    learners: dict[str, dict[str, list[Any]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for count, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if count == len(lines):
                break
            raise FormatError(f"`{path}`: line {count} must be a JSON object; it is {line[:60]!r}.") from None
        for name, values in _learners_of(record):
            log = learners.setdefault(name, {"rows": [], **{curve: [] for curve in _CURVES}})
            log["rows"].append(record.get("rows"))
            for curve in _CURVES:
                log[curve].append(values.get(curve))
    file = path.with_name(_RUN)
    run = read_json(file) if file.is_file() else {}
    warnings = run.get("warnings", [])
    return {
        "kind": "training",
        "schema": 1,
        "run": run,
        "learners": learners,
        "warnings": warnings if isinstance(warnings, list) else [],  # of older runs: texts by learner, shown with `run`
    }


def _learners_of(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the learners that one line of the log is about."""
    if isinstance(record.get("learners"), Mapping):
        return list(record["learners"].items())
    name = record.get("learner") or record.get("sae")
    return [(str(name), record)] if name and "fvu" in record else []
