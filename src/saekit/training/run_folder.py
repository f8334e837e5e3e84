"""The folder of a run: claimed by its request, read back when it is finished, and ``run.json`` at the end."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, FormatError, listed
from ..files import read_sealed, write_sealed
from ..forms import COUNT, NATURAL, check_form
from ..places import place_facts
from ..provenance import library_versions, release
from ..ranks import agreed
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.parts import PARTS
from ..settings import differences
from .architectures import config_to_dict
from .checkpoint import tidy
from .convergence import FALL, fall_of
from .defaults import ResolvedConfig
from .diagnostics import warnings_of
from .learner import finish, unscaled, whole
from .log import LOG_FILE, Seconds
from .request import Request
from .run_state import Run

RUN_FILE = "run.json"
SNAPSHOTS = "snapshots"
"""Folder of SAEs as they were, ``step-00000500/<name of the SAE>`` each."""
RUN_FORMAT = 2
"""Version of ``run.json``."""


def claim(folder: Path, request: Request, resume: bool) -> Request | None:
    """Make a folder that of this run, or recognize it; return what is to be done, None when the run is finished.

    An interrupted run goes on with the defaults that it began with (learning rate, ...), as it has recorded them.

    Raises
    ------
    ConfigError
        The folder holds something else, or another run, or this one and `resume` is False.
    FormatError
        Its ``run.json`` comes from a newer release.
    """
    if not (folder / RUN_FILE).is_file():
        _claim_new(folder, request)
        return request
    if not resume:
        raise ConfigError(
            f"train: `out` must be a new folder; `{folder}` holds a run. "
            "Pass resume=True (--resume) to continue it, or another folder."
        )
    record = read_record(folder)
    then, now = record["request"], json.loads(json.dumps(request.to_json()))
    resolved = then.pop("resolved", None)
    del now["resolved"]
    _check_same(then, now)
    if record["status"] == "done":
        return None
    if resolved is None:
        raise ConfigError(
            f"train: a resumed run must have recorded its learning rate and other defaults; `{folder}` was begun by a "
            "release with other defaults, which did not. Resume it with that release, or give another folder."
        )
    check_form(resolved, _RESOLVED, folder / RUN_FILE, "request.resolved")
    return replace(request, resolved=[ResolvedConfig(**each) for each in resolved])


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``run.json`` says.

    Raises
    ------
    FormatError
        It was altered, is none, or comes from a newer release.
    """
    path = folder / RUN_FILE
    record: dict[str, Any] = read_sealed(path, since=2, version="format")
    check_form(record, {"format": NATURAL}, path)
    if not 1 <= record["format"] <= RUN_FORMAT:
        raise FormatError(
            f"`{path}` must have format {RUN_FORMAT}; got {record['format']!r}. Resume with the release that wrote it."
        )
    check_form(record, _FORMS["running"], path)
    check_form(record, _FORMS.get(record["status"], {}), path)
    return record


_RESOLVED = [
    {
        "total_steps": COUNT, "batch_rows": COUNT, "lr": float, "warmup_steps": NATURAL, "decay_steps": NATURAL,
        "dead_after_rows": COUNT, "k_aux": COUNT, "threshold_start": NATURAL, "threshold_decay": float,
        "precision": str,
    }
]  # fmt: skip
_FORMS: dict[str, dict[str, Any]] = {
    "running": {"status": str, "request": dict, "source": dict},
    "done": {
        "saes": [str], "rows_seen": COUNT, "final": dict, "warnings": (dict, list),
        "seconds": {"total": float, "start": float, "rows": float, "steps": float},
    },
}  # fmt: skip


def read_back(folder: Path, names: Sequence[str], device: torch.device) -> list[SAE]:
    """Return the SAEs of a finished run."""
    from ..store.native import load

    return [load(folder / name).to(device) for name in names]


def save_finished(run: Run, saes: Sequence[SAE], seconds: Seconds) -> None:
    """Write the SAEs of a run and what it was, in numbers and in words."""
    from ..store.native import save

    assert run.folder is not None
    request = run.request
    for name, sae in zip(request.names, saes, strict=True):
        save(sae, run.folder / name)
    parts = {name: float(value) for name, value in seconds.items() if isinstance(value, float)}
    total = max(parts["total"], 1e-9)
    fractions = {f"{part}_fraction": value / total for part, value in parts.items() if part != "total"}
    record = {
        "format": RUN_FORMAT,
        "status": "done",
        "request": request.to_json(),
        "saes": request.names,
        "rows_seen": request.used_rows,
        "rows_asked": request.asked_rows,
        "epochs": request.epochs,
        "order_digest": f"sha256:{run.order_digest}",
        "final": run.last,
        "warnings": warnings_of(run),
        "seconds": {**parts, **fractions},
        "versions": versions(),
        "machine": {
            "device": str(request.device),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "source": request.source.info,
    }
    tidy(run.folder)
    write_sealed(run.folder / RUN_FILE, record)  # last: a folder that says "done" is complete


def save_snapshot(run: Run) -> None:
    """Write the SAEs of a run as they are after this step, with their seeds and the rows that they have seen."""
    from ..store.native import save

    folder = run.folder
    assert folder is not None
    saes: dict[str, SAE] = {}
    for name, learner in run.named_learners():
        known = source_facts(run.request.source) | {
            "config": config_to_dict(learner.config),
            "seed": learner.seed,
            "data_seed": run.request.settings.data_seed,
            "rows_seen": learner.rows_seen,
        }
        saes[name] = unscaled(finish(whole(learner), known), run.request.source)

    def write() -> None:
        for name, sae in saes.items():
            save(sae, folder / SNAPSHOTS / f"step-{run.step:08d}" / name)

    agreed(run.mesh, write)


def provenance_of(run: Run, index: int) -> dict[str, Any]:
    """Return what the file of a learner's SAE says about its training."""
    learner, name = run.learners[index], run.request.names[index]
    record, fall = run.last[name], fall_of(run.curves.get(name, []), learner.resolved)
    starts = run.request.to_json().get("start")
    return source_facts(run.request.source) | {
        "config": config_to_dict(learner.config),
        "seed": learner.seed,
        "data_seed": run.request.settings.data_seed,
        "rows_seen": learner.rows_seen,
        "rows_digest": f"sha256:{run.order_digest}",
        "versions": versions(),
        "resolved": {key: getattr(learner.resolved, key) for key in ("lr", "dead_after_rows", "batch_rows")},
        "metrics": {key: record[key] for key in ("fvu", "l0", "dead_fraction")} | {FALL: fall},
        **(
            {} if learner.is_transcoder else {"row_variance": record["row_variance"]}
        ),  # that of its targets says nothing
        **({"start": starts[index]} if starts else {}),
    }


def source_facts(source: Source) -> dict[str, Any]:
    """Return what an SAE's provenance says about its rows."""
    parts = source.info.get(PARTS)
    return place_facts(source.info) | {"data_digest": source.info.get("digest")} | ({PARTS: parts} if parts else {})


def versions() -> dict[str, str]:
    """Return the releases of the packages that decide the numbers."""
    return {**library_versions(with_model=True), "saekit": release(), "safetensors": version("safetensors")}


def _claim_new(folder: Path, request: Request) -> None:
    foreign = [path.name for path in folder.iterdir() if path.name == LOG_FILE or (path / "sae.json").exists()]
    if foreign:
        raise ConfigError(
            f"train: `out` must be empty or hold a run; `{folder}` holds {listed(foreign)} and no "
            f"{RUN_FILE}. Give another folder."
        )
    record = {
        "format": RUN_FORMAT,
        "status": "running",
        "request": request.to_json(),
        "versions": versions(),
        "source": request.source.info,
    }
    write_sealed(folder / RUN_FILE, record)


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = differences(then, now)
    if different:
        raise ConfigError(
            f"train: a resumed run must have the settings it began with; {different}. "
            "Repeat the old settings or give another folder."
        )
